"""Draws of responses and labels for all runs at once, by the rows of bandit/mixtures.py and the pipeline's choices.

Axes: B runs, M pairs per update, K candidates per pair, L tokens.
"""

import random
from dataclasses import dataclass

import torch
from lab.tree import level_sizes, mixed, response_logps

from bandit.mixtures import MIXTURES, NULL, Mixture, WeightPair, always, get_mixture
from dpo_iteration.pairs import CHOOSE_TYPES


@dataclass(frozen=True)
class LabSampler:
    """A row of the table as the lab runs it.

    Attributes:
        row: its weights, candidates and choice.
        stream: which random numbers it uses; samplers of one stream share theirs, and are paired by it.
        bonus: a loss term that pushes responses of the reference down, see `train.bonus_of`; its weight is ALPHA.
        design: the kind of optimal design that takes two of the candidates in place of the rule, see design.py.
    """

    row: Mixture
    stream: int = 0
    bonus: str | None = None
    design: str | None = None


# SELM's code: 0.001 and 0.0001; XPO's paper, by a public summary: 1e-5 falling to 0, not times beta. Without effect
# in runs as short as these.
ALPHA = 0.03
ONLINE = MIXTURES["online"]
# Of eight candidates from the policy a design takes two; (0, 0) is the uniform law.
POOL = Mixture(always((1.0, 0.0), (1.0, 0.0)), "two of 8 on-policy responses by a design", candidates=8)
UNIFORM = WeightPair(0.5, (0.0, 0.0), (0.0, 0.0))
# Rows that exist in the lab alone; the pipeline has no such loss, choice or check.
LAB_ONLY = {
    # XPO, arXiv 2405.21046, as in TRL's XPOTrainer: + alpha log pi(y2), y2 the pair's response of the reference. The
    # paper's sum runs over all pairs so far, here over those of the update.
    "xpo-bonus": LabSampler(MIXTURES["xpo"], bonus="pair"),
    # SELM, arXiv 2405.19332, as in its selm_trainer.py: + alpha beta log(pi/pi_ref) of a response of the reference;
    # there one greedy response, of a reference that is each iteration's first policy.
    "selm": LabSampler(ONLINE, bonus="reference"),
    "temperature": LabSampler(
        Mixture(always((1.5, 0.0), (0.5, 0.0)), "mixp without its reference: policy at T = 2/3 x policy at T = 2")
    ),
    "d-optimal": LabSampler(POOL, design="d"),
    "g-optimal": LabSampler(POOL, design="g"),
    "v-optimal": LabSampler(POOL, design="v"),
    # Half on-policy, half a G-optimal design that owes nothing to the policy: after arXiv 2601.08421 ("preferential
    # G-optimal design"), of which the abstract alone could be read. Here a greedy choice among 8 uniform responses.
    "g-hybrid": LabSampler(
        Mixture(
            lambda beta: (WeightPair(0.5, (1.0, 0.0), (1.0, 0.0)), UNIFORM),
            "half online, half designed",
            candidates=8,
        ),
        design="g",
    ),
}


def lab_sampler(name: str) -> LabSampler:
    """Return a row by name: of the lab, of the table, or `mix_A_B_P`.

    Raises:
        ValueError: no such name, or a row that the lab cannot draw from.
    """
    if name in LAB_ONLY:
        return LAB_ONLY[name]
    row = get_mixture(name)
    if row.third_model:
        raise ValueError(f"sampler {name!r} weighs three models, the lab has two")
    return LabSampler(row, stream=int(name.endswith(NULL)))


# --- Responses --------------------------------------------------------------------------------------------------


class Weights:
    """The rows of weights of B runs with equal numbers of candidates, ready to be drawn from."""

    def __init__(self, samplers: list[LabSampler], beta: float) -> None:
        tables = [sampler.row.pairs(beta) for sampler in samplers]
        most = max(len(table) for table in tables)
        self.candidates = samplers[0].row.candidates
        self.bounds, self.sides = torch.ones(len(tables), most), torch.zeros(len(tables), most, 2, 2)
        for run, table in enumerate(tables):
            total = 0.0
            for i, (probability, first, second) in enumerate(table):
                total += probability
                # The last bound is exactly 1, whatever the probabilities' rounding.
                self.bounds[run, i] = total if i < len(table) - 1 else 1.0
                self.sides[run, i] = torch.tensor([first, second])

    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        """Draw each pair's row, from uniforms [B, M] in [0, 1).

        Returns:
            [B, M, K, 2]: (w_policy, w_second) of each candidate, the first half from the first side.
        """
        component = (uniforms.unsqueeze(-1) >= self.bounds.unsqueeze(1)).sum(-1)  # [B, M]
        sides = self.sides[torch.arange(len(self.sides)).unsqueeze(1), component]  # [B, M, 2, 2]
        return sides.repeat_interleave(self.candidates // 2, dim=2)


def draw_responses(policy, second, prompts, weights, uniforms, temperature: float = 1.0) -> torch.Tensor:
    """Draw responses token by token, as generation does, by the inverse of the cumulative distribution.

    Args:
        policy, second: next-token log-probabilities [B, P, n, V].
        prompts: [M] prompt of each pair.
        weights: [B, M, K, 2].
        uniforms: [B, M, K, L].

    Returns:
        Response numbers [B, M, K].
    """
    runs, _, nodes, vocabulary = policy.shape
    sizes = level_sizes(vocabulary, uniforms.shape[-1])
    tables = torch.cat([policy, second], dim=-1).flatten(1, 2)  # [B, P n, 2 V]
    node = torch.zeros(weights.shape[:3], dtype=torch.long)
    start = 0
    for depth, size in enumerate(sizes):
        index = (prompts * nodes + start).view(1, -1, 1) + node
        both = tables.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, 2 * vocabulary))
        both = both.view(*node.shape, 2, vocabulary)
        logits = (weights.unsqueeze(-1) * both).sum(-2) / temperature
        below = logits.softmax(-1).cumsum(-1)[..., :-1]
        token = (uniforms[..., depth].unsqueeze(-1) >= below).sum(-1)
        node = node * vocabulary + token
        start += size
    return node


def pair_law(row: Mixture, beta: float, policy, second, length: int, temperature: float = 1.0) -> torch.Tensor:
    """Return the exact law of a row's first and second candidate, [B, P, N, N], by enumeration."""
    law = 0
    for probability, *sides in row.pairs(beta):
        first, other = (response_logps(mixed(policy, second, side, temperature), length).exp() for side in sides)
        law = law + probability * first.unsqueeze(-1) * other.unsqueeze(-2)
    return law


# --- Pairs and labels -------------------------------------------------------------------------------------------


def choose_two(candidates: torch.Tensor, scores: torch.Tensor, rule: str, seed: str) -> torch.Tensor:
    """Choose two of K candidates by the pipeline's rule, pair by pair: [B, M, K] to [B, M, 2].

    With K = 2 every rule takes both.
    """
    if candidates.shape[-1] == 2:
        return candidates
    rng, choose = random.Random(seed), CHOOSE_TYPES[rule]
    chosen = [choose(row, None, rng) for row in scores.flatten(0, 1).tolist()]
    return candidates.gather(-1, torch.tensor(chosen).view(*candidates.shape[:2], 2))


def first_wins(margins: torch.Tensor, label_noise: float, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw Bradley-Terry labels: P(first wins) = sigma(margin), each label flipped with probability `label_noise`."""
    return uniforms < label_noise + (1 - 2 * label_noise) * margins.sigmoid()
