"""The table of samplers that work for language models: one row serves the bandit and the pipeline.

A response is drawn, token by token, from softmax((w_policy * logits_policy + w_second * logits_second) / T); in the
bandit an arm from pi^w_policy * pi_second^w_second, normalised. A row may weigh a third model in the same way. A pair
is two such weight vectors; a sampler is a small probability table over pairs, and, where it draws more than two
candidates, the rule that makes a pair of them.
A new sampler is a new row of `MIXTURES`. Standard library only: generation imports this file.

Sources: Shi, Zhou, Du, "The Crucial Role of Samplers in Online Direct Preference Optimization", ICLR 2025, section 5,
unless a row names another.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

POLICY = (1.0, 0.0)
SECOND = (0.0, 1.0)
# Of several pairs, best against worst among the responses of one of them: with K = 2 the same as max_min.
WITHIN = "mixed_max_min"


class WeightPair(NamedTuple):
    """With `probability`, a pair's responses come from `first` and from `second`: (w_policy, w_second[, w_third])."""

    probability: float
    first: tuple[float, ...]
    second: tuple[float, ...]


WeightPairs = tuple[WeightPair, ...]


@dataclass(frozen=True)
class Mixture:
    """One row.

    Attributes:
        pairs: the pairs, as a function of beta, the KL coefficient of the DPO loss (`pilaf` and `theory` use it).
        about: what a pair is, in a few words, and its source.
        second_model: what the second weight belongs to: `reference`, or `previous`, the policy of the iteration
            before the current one.
        third_model: the same for the third weight, in rows that have one.
        candidates: responses per prompt, K.
        choose: how two of the candidates become a pair, a rule of alignment/dpo_iteration/pairs.py: `max_min` the
            best and the worst by reward, `implicit_max_min` by implicit reward, `max_sweet` the best and the one
            nearest to two standard deviations below the mean, `random` any two.
    """

    pairs: Callable[[float], WeightPairs]
    about: str
    second_model: str = "reference"
    candidates: int = 2
    choose: str = "max_min"
    third_model: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """What the weights belong to, in their order."""
        return ("policy", self.second_model, *([self.third_model] if self.third_model else []))


def family(a: float, b: float, p: float = 1.0) -> WeightPairs:
    """The paper's mixtures: with probability p, y1 from (1 + a, -a) and y2 from (1 - b, b); else both on-policy.

    a moves the first side away from the second model, b the second side towards it.
    """
    mixed = WeightPair(p, (1 + a, -a), (1 - b, b))
    on_policy = WeightPair(1 - p, POLICY, POLICY)
    return tuple(row for row in (on_policy, mixed) if row.probability > 0)


def always(first: tuple[float, ...], second: tuple[float, ...]) -> Callable[[float], WeightPairs]:
    """One pair, at any beta."""
    return lambda beta: (WeightPair(1.0, first, second),)


def theory(beta: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return DPO-Mix-P's second pair with pi_ref for uniform: pi_ref (pi/pi_ref)^beta, pi_ref (pi_ref/pi)^beta."""
    return (beta, 1 - beta), (-beta, 1 + beta)


MIXTURES = {
    "offline": Mixture(always(SECOND, SECOND), "both from the reference: vanilla DPO"),
    "online": Mixture(always(POLICY, POLICY), "both from the policy: on-policy DPO"),
    "gshf": Mixture(always(SECOND, POLICY), "reference x policy: hybrid, Xiong et al., arXiv 2312.11456"),
    "mixp": Mixture(lambda beta: family(0.5, 0.5), "1.5/-0.5 x 0.5/0.5: the paper's, Safe-RLHF"),
    "mixp-iterative": Mixture(
        lambda beta: family(0.5, 0.5, 0.7),
        "0.3 online, 0.7 mixp: the paper's, Iterative-Prompt",
        choose=WITHIN,
    ),
    "pilaf": Mixture(
        lambda beta: family(beta, beta, 0.5),
        "1/2 online, 1/2 (1+beta)/-beta x (1-beta)/beta: Feng et al., arXiv 2502.04270",
        choose=WITHIN,
    ),
    "simplemix": Mixture(
        lambda beta: (WeightPair(0.5, POLICY, POLICY), WeightPair(0.5, SECOND, SECOND)),
        "half the pairs on-policy, half off-policy (here: from the reference): SIMPLEMIX, arXiv 2505.02363",
        choose=WITHIN,
    ),
    "xpo": Mixture(
        always(POLICY, SECOND),
        "policy x reference, the pair of XPO (its optimism bonus is a loss, not a sampler): arXiv 2405.21046",
    ),
    "theory": Mixture(
        lambda beta: (WeightPair(1.0, *theory(beta)),),
        "beta/(1-beta) x -beta/(1+beta): DPO-Mix-P's second pair around the reference",
    ),
    "theory-mix": Mixture(
        lambda beta: (WeightPair(0.5, SECOND, SECOND), WeightPair(0.5, *theory(beta))),
        "half offline, half theory: DPO-Mix-P around the reference, its two pairs equally often",
        choose=WITHIN,
    ),
    "nash-md": Mixture(
        always(POLICY, (0.875, 0.125)),
        "policy x 0.875/0.125: the pair of Nash-MD (its loss is another), arXiv 2312.00886",
    ),
    "history": Mixture(
        always(POLICY, SECOND), "policy x the policy of the iteration before", second_model="previous"
    ),
    "history-mixp": Mixture(
        always((1.5, -0.25, -0.25), (0.5, 0.25, 0.25)),
        "mixp with half of the reference's weights on the policy of the iteration before",
        third_model="previous",
    ),
    "best-worst": Mixture(
        always(POLICY, POLICY),
        "best and worst of 8 on-policy responses, by reward: West-of-N, arXiv 2401.12086",
        candidates=8,
    ),
    "best-sweet": Mixture(
        always(POLICY, POLICY),
        "best of 8 on-policy responses and the one nearest to mean - 2 sd of their rewards: arXiv 2502.16825",
        candidates=8,
        choose="max_sweet",
    ),
    "implicit-best-worst": Mixture(
        always(POLICY, POLICY),
        "highest and lowest implicit reward beta log(pi/pi_ref) of 8 on-policy responses: DICE, arXiv 2406.09760",
        candidates=8,
        choose="implicit_max_min",
    ),
    "random-pairs": Mixture(
        always(POLICY, POLICY),
        "two at random of 8 on-policy responses: the baseline of every choice",
        candidates=8,
        choose="random",
    ),
}

# A member of the family by name: mix_A_B_P, which file names can hold; mix:A,B,P means the same.
_FAMILY = re.compile(r"mix[:_]([^:_,]+)[_,]([^:_,]+)[_,]([^:_,]+)")


# `online-null` is `online` with other random numbers, in the pipeline and in the lab: it shows what chance does.
NULL = "-null"


def get_mixture(name: str) -> Mixture:
    """Return a row of the table, or the family's member `mix_A_B_P`, see `family`; `NAME-null` is the row of NAME.

    Raises:
        ValueError: the name is neither.
    """
    name = name.removesuffix(NULL)
    if name in MIXTURES:
        return MIXTURES[name]
    if not name.startswith(("mix:", "mix_")):
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(MIXTURES)}, mix_A_B_P")
    try:
        a, b, p = (float(part) for part in _FAMILY.fullmatch(name).groups())
    except (AttributeError, ValueError):
        raise ValueError(f"sampler {name!r}: expected mix_A_B_P with three numbers") from None
    if not (math.isfinite(a) and math.isfinite(b) and 0 <= p <= 1):
        raise ValueError(f"sampler {name!r}: A and B must be finite and P in [0, 1]")
    about = f"{p:g} of {1 + a:g}/{-a:g} x {1 - b:g}/{b:g}, else online"
    return Mixture(lambda beta: family(a, b, p), about, choose=WITHIN if 0 < p < 1 else "max_min")
