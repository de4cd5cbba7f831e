"""Online DPO of many runs at once: samplers x learning rates x seeds, one row of parameters each.

pi starts at the reference; per update
    pairs    M prompts, K candidates each by the sampler's weights; two by rule or design; a Bradley-Terry label
    loss     mean over pairs of LOSSES[...](beta h), the pipeline's function
    step     Adam or SGD, learning rate linearly to 0
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from lab.design import Design
from lab.environment import Environment, Setting, exact_values
from lab.learners import Transformer, make_learner
from lab.sampling import ALPHA, LabSampler, Weights, choose_two, draw_responses, first_wins, lab_sampler, pair_law
from tqdm import tqdm

from dpo_iteration.losses import LOSSES
from generation.sampling import stream_seed

# Runs per tensor program; a fixed number, so that a compiled learner is compiled once.
CHUNK = 64
POINTS = 10  # times that a run is measured


@dataclass(frozen=True)
class Runs:
    """What B runs of one chunk are: their samplers, learning rates and seeds (numbers into the environment)."""

    samplers: list[LabSampler]
    lrs: torch.Tensor
    seeds: torch.Tensor


def run_all(setting: Setting, env: Environment, names: list[str], lrs: list[float], compiled: bool = False):
    """Train every sampler at every learning rate on every seed.

    Returns:
        (values [3, samplers, lrs, seeds, POINTS], float64, see `exact_values`; the updates at which they were taken).
        A run that diverges has a value gap of +inf.
    """
    seeds = len(env.rewards)
    learner = forward_of(setting, env, compiled)
    cells = list(product(range(len(names)), range(len(lrs)), range(seeds)))
    # Samplers with equal numbers of candidates share chunks.
    cells.sort(key=lambda cell: lab_sampler(names[cell[0]]).row.candidates)
    values = np.full((3, len(names), len(lrs), seeds, POINTS), np.nan)
    chunks = chunks_of(cells, [lab_sampler(names[s]).row.candidates for s, _, _ in cells])
    for chunk in tqdm(chunks, f"runs, {CHUNK} at a time"):
        filled = chunk + chunk[-1:] * (CHUNK - len(chunk)) if compiled else chunk
        index = torch.tensor(filled)
        samplers = [lab_sampler(names[s]) for s in index[:, 0].tolist()]
        runs = Runs(samplers, torch.tensor(lrs)[index[:, 1]], index[:, 2])
        trace, _ = train(setting, env, learner, runs)
        s, l, e = index[: len(chunk)].T.numpy()
        values[:, s, l, e] = trace[:, : len(chunk)]
    return values, measured_at(setting)


def chunks_of(cells: list, keys: list) -> list[list]:
    """Return the cells in chunks of at most CHUNK with equal keys; equal keys stand together."""
    chunks: list[list] = []
    for i, cell in enumerate(cells):
        if not chunks or keys[i] != keys[i - 1] or len(chunks[-1]) == CHUNK:
            chunks.append([])
        chunks[-1].append(cell)
    return chunks


def measured_at(setting: Setting) -> np.ndarray:
    """Return the numbers of updates after which the runs are measured, the last at the end."""
    return np.linspace(0, setting.updates, POINTS + 1).round().astype(int)[1:]


def forward_of(setting: Setting, env: Environment, compiled: bool) -> Callable:
    """Return the learner, for the transformer as one compiled program where asked for."""
    learner, _ = make_learner(setting, env.reference, env.ref_logps)
    if compiled and setting.learner == "transformer":
        return _compiled(
            setting.prompts, setting.vocabulary, setting.length, setting.width, setting.depth, setting.heads
        )
    return learner


@lru_cache
def _compiled(prompts: int, vocabulary: int, length: int, width: int, depth: int, heads: int) -> Callable:
    setting = Setting(prompts=prompts, vocabulary=vocabulary, length=length, width=width, depth=depth, heads=heads)
    return torch.compile(Transformer(setting), dynamic=False)


def train(setting: Setting, env: Environment, learner: Callable, runs: Runs) -> tuple[np.ndarray, torch.Tensor]:
    """Train one chunk.

    Returns:
        (values [3, B, POINTS], the final parameters [B, D]).
    """
    plain, start = make_learner(setting, env.reference, env.ref_logps)
    parameters = start[runs.seeds].clone().requires_grad_()
    optimizer = OPTIMIZERS[setting.optimizer](parameters)
    rounds = setting.iterations or setting.updates
    per_round = setting.updates // rounds
    points, values = measured_at(setting), []
    previous, weights = env.ref_nodes[runs.seeds], Weights(runs.samplers, setting.beta)
    designed = designed_runs(runs)
    design = Design([runs.samplers[run].design for run in designed]) if designed else None
    for update in range(setting.updates):
        logps, nodes = learner(parameters, runs.seeds)
        if update in points:
            values.append(measure(setting, env, runs, logps))
        number, step = divmod(update, per_round)
        if step == 0:
            if design:
                with torch.no_grad():
                    design.see(plain.features(parameters[designed], runs.seeds[designed]), logps[designed])
            data = collect(setting, env, runs, weights, logps.detach(), nodes.detach(), previous, number, design)
            previous = nodes.detach()
            if setting.restart:
                optimizer = OPTIMIZERS[setting.optimizer](parameters)
        if setting.pairs:
            loss = loss_of(setting, env, runs, logps, data.batch(setting, number, step))
        else:
            loss = (logps * expected_gradient(setting, env, runs, logps.detach(), *data)).sum()
        (gradient,) = torch.autograd.grad(loss, parameters)
        done, last = (step, per_round) if setting.restart else (update, setting.updates)
        optimizer((runs.lrs * (1 - done / last)).unsqueeze(1), gradient)
    with torch.no_grad():
        logps, _ = learner(parameters, runs.seeds)
    values.append(measure(setting, env, runs, logps))
    return torch.stack(values, dim=-1).numpy(), parameters.detach()


def measure(setting: Setting, env: Environment, runs: Runs, logps: torch.Tensor) -> torch.Tensor:
    """Return exact values [3, B]; a run that left the numbers has the gap +inf."""
    values = exact_values(logps.detach(), env.ref_logps[runs.seeds], env.rewards[runs.seeds], setting.beta)
    values[0] = values[0].nan_to_num(nan=float("inf"))
    return values


# --- Data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The labelled pairs of a sampling round: prompts [M], winner and loser [B, M], the second candidate [B, M]."""

    prompts: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    other: torch.Tensor

    def batch(self, setting: Setting, number: int, step: int) -> "Pairs":
        """Return the pairs of one update: in order in the first epoch, shuffled in each later one."""
        size, total = setting.pairs, len(self.prompts)
        if size == total:
            return self
        epoch, first = divmod(step * size, total)
        order = torch.arange(total)
        if epoch:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(1000 * number + epoch))
        index = order[first : first + size]
        return Pairs(self.prompts[index], *(t[:, index] for t in (self.chosen, self.rejected, self.other)))


def collect(
    setting: Setting,
    env: Environment,
    runs: Runs,
    weights: Weights,
    logps,
    nodes,
    previous,
    number: int,
    design: Design | None = None,
) -> Pairs | tuple[torch.Tensor, torch.Tensor]:
    """Draw, choose and label the pairs of sampling round `number` with the current policy.

    With --pairs 0: return what the law is made of instead, the next-token log-probabilities of both models.
    """
    follows = torch.tensor([s.row.second_model == "previous" for s in runs.samplers]).view(-1, 1, 1, 1)
    second = torch.where(follows, previous, env.ref_nodes[runs.seeds])
    if not setting.pairs:
        return nodes, second
    rounds = setting.iterations or setting.updates
    count = setting.pairs * setting.updates // rounds // setting.epochs
    count_each = runs.samplers[0].row.candidates
    prompts = torch.arange(count) % setting.prompts
    uniforms = random_numbers(runs, number, (count, 2 + count_each * setting.length))
    tokens = uniforms[..., 2:].unflatten(-1, (count_each, setting.length))
    sides = weights.draw(uniforms[..., 0])
    candidates = draw_responses(nodes, second, prompts, sides, tokens, setting.temperature)
    drawn = chosen_two(env, runs, logps, prompts, candidates, number)
    if design:
        scores = setting.beta * at(logps - env.ref_logps[runs.seeds], prompts, candidates).float()
        is_mixed = [len(sampler.row.pairs(setting.beta)) > 1 for sampler in runs.samplers]
        # A row with an on-policy part leaves those pairs as they are drawn.
        fixed = torch.tensor(is_mixed).unsqueeze(1) & (sides[:, :, 0, 0] == 1)
        which = designed_runs(runs)
        drawn[which] = design.choose(prompts, candidates[which], scores[which], fixed[which])
    rewards = at(env.rewards[runs.seeds], prompts, drawn)
    first = first_wins(rewards[..., 0] - rewards[..., 1], setting.label_noise, uniforms[..., 1])
    chosen, rejected = (torch.where(first, drawn[..., i], drawn[..., 1 - i]) for i in (0, 1))
    return Pairs(prompts, chosen, rejected, drawn[..., 1])


def random_numbers(runs: Runs, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return uniforms [B, *shape] of a sampling round: equal for runs of equal seed and stream."""
    keys = list(zip(runs.seeds.tolist(), (s.stream for s in runs.samplers), strict=True))
    draws = {
        (seed, stream): torch.rand(shape, generator=torch.Generator().manual_seed(stream_seed(seed, stream, number)))
        for seed, stream in set(keys)
    }
    return torch.stack([draws[key] for key in keys])


def designed_runs(runs: Runs) -> list[int]:
    """Return which runs choose by a design."""
    return [run for run, sampler in enumerate(runs.samplers) if sampler.design]


def chosen_two(env: Environment, runs: Runs, logps, prompts, drawn: torch.Tensor, number: int) -> torch.Tensor:
    """Choose two of the candidates, each run by its row's rule, a designed one none: [B, M, K] to [B, M, 2]."""
    if drawn.shape[-1] == 2:
        return drawn
    result = drawn[..., :2].clone()
    rewards = at(env.rewards[runs.seeds], prompts, drawn)
    implicit = at(logps - env.ref_logps[runs.seeds], prompts, drawn)
    for run, sampler in enumerate(runs.samplers):
        if sampler.design:
            continue
        rule = sampler.row.choose
        scores = implicit if rule.startswith("implicit") else rewards
        seed = f"{int(runs.seeds[run])}/{number}"
        result[run] = choose_two(drawn[run : run + 1], scores[run : run + 1], rule, seed)[0]
    return result


def at(values: torch.Tensor, prompts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return values [B, P, N] of the responses `index` [B, M, ...] to prompts [M]."""
    flat = index + (prompts * values.shape[-1]).view(1, -1, *[1] * (index.dim() - 2))
    return values.flatten(1).gather(1, flat.flatten(1)).view_as(index)


# --- Loss and optimizers ----------------------------------------------------------------------------------------


def loss_of(setting: Setting, env: Environment, runs: Runs, logps: torch.Tensor, batch: Pairs) -> torch.Tensor:
    """Sum over runs of the mean loss over pairs: the gradient of each run's row is its own."""
    chosen, rejected = (at(logps, batch.prompts, i) for i in (batch.chosen, batch.rejected))
    reference = env.ref_logps[runs.seeds].float()
    ref_chosen, ref_rejected = (at(reference, batch.prompts, i) for i in (batch.chosen, batch.rejected))
    rewards = env.rewards[runs.seeds].float()
    margin = at(rewards, batch.prompts, batch.chosen) - at(rewards, batch.prompts, batch.rejected)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    losses = LOSSES[setting.loss](h, margin, setting.beta, chosen, rejected)
    return (losses.mean(1) + ALPHA * setting.beta * bonus_of(env, runs, logps, batch)).sum()


def expected_gradient(setting: Setting, env: Environment, runs: Runs, logps, nodes, second) -> torch.Tensor:
    """Return the gradient of the expected loss in the responses' log-probabilities [B, P, N]: no draws, no noise.

    Of `sigmoid` on Bradley-Terry labels: -beta / P sum_y' (w + w^T) (P*(y beats y') - sigma(beta h)), w the pair law.
    """
    gradient = torch.empty_like(logps)
    for run, (sampler, seed) in enumerate(zip(runs.samplers, runs.seeds.tolist(), strict=True)):
        part = slice(run, run + 1)
        law = pair_law(sampler.row, setting.beta, nodes[part], second[part], setting.length, setting.temperature)[0]
        rewards, u = env.rewards[seed].float(), setting.beta * (logps[run] - env.ref_logps[seed].float())
        wins = (
            setting.label_noise
            + (1 - 2 * setting.label_noise) * (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).sigmoid()
        )
        forces = (law + law.mT) * (wins - (u.unsqueeze(-1) - u.unsqueeze(-2)).sigmoid())
        gradient[run] = -setting.beta / setting.prompts * forces.sum(-1)
    return gradient


def bonus_of(env: Environment, runs: Runs, logps: torch.Tensor, batch: Pairs) -> torch.Tensor:
    """Return what XPO and SELM add to the loss, [B]; 0 for runs without a bonus.

    XPO: the mean of log pi(y2) over the batch, y2 from the reference. SELM: E log pi(y) under the reference, exactly.
    """
    bonus = torch.zeros(len(logps))
    kinds = [s.bonus for s in runs.samplers]
    if "pair" in kinds:
        has = torch.tensor([kind == "pair" for kind in kinds])
        bonus = bonus + has * at(logps, batch.prompts, batch.other).mean(1)
    if "reference" in kinds:
        has = torch.tensor([kind == "reference" for kind in kinds])
        bonus = bonus + has * (env.ref_logps[runs.seeds].exp() * logps).sum(-1).mean(-1).float()
    return bonus


class Adam:
    """Adam of all runs (betas 0.9, 0.99; no weight decay), with a learning rate per run."""

    def __init__(self, parameters: torch.Tensor) -> None:
        self.parameters, self.steps = parameters, 0
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)

    @torch.no_grad()
    def __call__(self, lr: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take a step; lr [B, 1]."""
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient**2, 0.01)
        scale = (self.square / (1 - 0.99**self.steps)).sqrt_().add_(1e-8)
        self.parameters.sub_(lr / (1 - 0.9**self.steps) * self.mean / scale)


class Sgd:
    """Plain gradient descent."""

    def __init__(self, parameters: torch.Tensor) -> None:
        self.parameters = parameters

    @torch.no_grad()
    def __call__(self, lr: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take a step; lr [B, 1]."""
        self.parameters.sub_(lr * gradient)


OPTIMIZERS = {"adam": Adam, "sgd": Sgd}
