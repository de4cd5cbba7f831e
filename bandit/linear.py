"""Log-linear policies whose features are shared by many prompts, with exact gradients over all prompts and pairs.

pi(y | x) is proportional to pi_ref(y | x) exp(phi(x, y) . theta). With v = beta theta the implicit reward is
u(x, y) = phi(x, y) . v, and one step of size lr on the mean over prompts of DPO's loss moves v by the mean over
prompts of Phi_x^T times the tabular increment of u(x, .): the samplers and their closed forms are the tabular ones,
one environment a prompt. Weights sum to 1 for each prompt. With as many features as |Y| - 1 a prompt, orthonormal and
centred, this is the tabular case itself.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bandit import exact
from bandit.problem import Bandit, make_bandit
from bandit.samplers import Sampler, get_sampler
from bandit.steps import laplacian
from bandit.tuned import EXACT_SCALES, TOLERANCE


@dataclass(frozen=True)
class Problem:
    """Instances of one kind.

    Attributes:
        bandit: rewards and log_ref of the prompts of all instances, [instances * prompts, |Y|].
        features: [instances, prompts, |Y|, d].
    """

    bandit: Bandit
    features: np.ndarray

    @property
    def flat(self) -> np.ndarray:
        """The features of a prompt after those of another, [instances, prompts * |Y|, d]."""
        return self.features.reshape(len(self.features), -1, self.features.shape[3])

    def implicit_rewards(self, v: np.ndarray) -> np.ndarray:
        """u [instances * runs * prompts, |Y|] of v = beta theta [instances, runs, d]; [instances, d] is one run's."""
        v = v.reshape(len(v), -1, v.shape[-1])
        return (v @ self.flat.swapaxes(1, 2)).reshape(-1, self.bandit.num_actions)

    def pull_back(self, increments: np.ndarray) -> np.ndarray:
        """Mean over prompts of Phi_x^T increments, [instances, runs, d], from [instances * runs * prompts, |Y|]."""
        instances, prompts, num_actions, _ = self.features.shape
        return increments.reshape(instances, -1, prompts * num_actions) @ self.flat / prompts

    @cached_property
    def closest(self) -> np.ndarray:
        """The implicit rewards nearest to the rewards (themselves where realizable), as `implicit_rewards`."""
        rewards = self.bandit.rewards.reshape(len(self.features), -1)
        fits = [np.linalg.lstsq(phi, r)[0] for phi, r in zip(self.flat, rewards, strict=True)]
        return self.implicit_rewards(np.stack(fits))


@dataclass(frozen=True)
class Variant:
    """A kind of problem.

    Attributes:
        about: for `--help` and the figure.
        decay: the k-th feature direction has length k^-decay; 0: all directions alike.
        outside: share of the rewards' variance that no parameter can express.
    """

    about: str
    decay: float = 0.0
    outside: float = 0.0


VARIANTS = {
    "realizable": Variant("rewards in the features' span, all directions alike"),
    "correlated": Variant("rewards in the span, k-th direction of length 1/sqrt(k)", decay=0.5),
    "misspecified": Variant("a quarter of the rewards' variance outside the span", outside=0.25),
}


def num_directions(num_prompts: int, num_actions: int) -> int:
    """The most independent features: with so many the problem is tabular, and nothing is misspecified."""
    return num_prompts * (num_actions - 1)


def make_problem(
    variant: Variant, num_prompts: int, num_actions: int, d: int, beta: float, num_envs: int, seed: int
) -> Problem:
    """num_envs random instances: uniform reference, rewards of mean 0 within a prompt and of standard deviation 1.

    The features' directions are random orthonormal vectors among those that sum to 0 within each prompt (the rest
    changes no policy); d is at most their number, `num_directions`.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3, d)))
    shape = (num_envs, num_prompts, num_actions)

    def centred(x: np.ndarray) -> np.ndarray:
        return x - x.mean(axis=2, keepdims=True)

    basis = np.linalg.qr(centred(rng.standard_normal((*shape, d))).reshape(num_envs, -1, d)).Q
    inside = np.matvec(basis, rng.standard_normal((num_envs, d)))
    other = centred(rng.standard_normal(shape)).reshape(num_envs, -1)
    other -= np.matvec(basis, np.vecmat(other, basis))
    outside = variant.outside if d < num_directions(num_prompts, num_actions) else 0.0
    rewards = np.sqrt(1 - outside) * inside / inside.std(axis=1, keepdims=True)
    if outside:
        rewards += np.sqrt(outside) * other / other.std(axis=1, keepdims=True)
    features = basis * np.arange(1, d + 1) ** -variant.decay
    return Problem(make_bandit(rewards.reshape(-1, num_actions), beta), features.reshape(*shape, d))


def hessian(problem: Problem, sampler: Sampler, u: np.ndarray) -> np.ndarray:
    """Near an optimum v moves towards it by lr * hessian @ (optimum - v), [instances, d, d], weights as at u.

    It is the mean over prompts of Phi_x^T (2 beta^2 / Z_x) L_x Phi_x, L_x the Laplacian of steps.laplacian.
    """
    instances, prompts, num_actions, _ = problem.features.shape
    weights, _ = sampler.weights(u, problem.bandit)
    blocks = laplacian(weights, u) * (2 * problem.bandit.beta**2 / weights.sum(axis=(1, 2)))[:, None, None]
    moved = blocks.reshape(instances, prompts, num_actions, num_actions) @ problem.features
    return problem.flat.swapaxes(1, 2) @ moved.reshape(problem.flat.shape) / prompts


def limit_and_condition(problem: Problem, sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """The stability limit and the condition number, [instances].

    The limit is 2 / the largest curvature at the start or at the optimum; the condition number is the optimum's: the
    error of the best constant step falls by (condition - 1) / (condition + 1) an update there.
    """
    start = np.linalg.eigvalsh(hessian(problem, sampler, np.zeros_like(problem.bandit.rewards)))
    end = np.linalg.eigvalsh(hessian(problem, sampler, problem.closest))
    return 2 / np.maximum(start[:, -1], end[:, -1]), end[:, -1] / np.maximum(end[:, 0], 1e-300)


def run(problem: Problem, sampler: Sampler, lr: np.ndarray, num_iter: int) -> dict[str, np.ndarray]:
    """Iterates from the reference; lr [instances], or [instances, runs] for several runs side by side.

    Returns:
        `value_diff` and `param_diff`, means over prompts of the tabular series, [*lr.shape, num_iter]; column t is
        the state after t updates.
    """
    instances, prompts, *_, d = problem.features.shape
    lr_of_runs = lr.reshape(instances, -1)
    runs = lr_of_runs.shape[1]
    rows = np.arange(instances * prompts).reshape(instances, 1, prompts).repeat(runs, axis=1)
    updates = exact.Updates(problem.bandit.rows(rows.ravel()), sampler, np.repeat(lr_of_runs, prompts)[:, None])
    v = np.zeros((instances, runs, d))
    series = {name: np.empty((*lr.shape, num_iter)) for name in ("value_diff", "param_diff")}
    for t in range(num_iter):
        metrics = updates.advance(problem.implicit_rewards(v), 1)[:, :, 0]
        for name, values in series.items():
            values[..., t] = metrics[exact.METRICS.index(name)].reshape(*lr.shape, prompts).mean(axis=-1)
        v += problem.pull_back(updates.last)
    return series


def updates_needed(gaps: np.ndarray) -> np.ndarray:
    """First update after which the gap [instances, num_iter] is 1e-3 of its start; inf if none, [instances]."""
    reached = gaps <= TOLERANCE * gaps[:, :1]
    return np.where(reached.any(axis=1), reached.argmax(axis=1), np.inf)


def tuned_scale(problem: Problem, sampler: Sampler, num_iter: int) -> float:
    """The multiple of the stability limit that reaches 1e-3 of the gap first, or else ends with the smallest gap.

    What counts is the worst instance: the median would choose steps that some instances do not survive. Of multiples
    whose last gaps differ by rounding alone (or are 1e-12 of the first), the one with the smallest mean gap.
    """
    limit, _ = limit_and_condition(problem, sampler)
    gaps = run(problem, sampler, limit[:, None] * EXACT_SCALES, num_iter)["value_diff"]

    def rank(k: int) -> tuple[float, ...]:
        of_scale = np.nan_to_num(gaps[:, k], nan=np.inf)
        last, mean = np.maximum(of_scale[:, -1], 1e-12 * of_scale[:, 0]).max(), of_scale.mean(axis=1).max()
        return float(updates_needed(of_scale).max()), float(f"{last:.9g}"), float(f"{mean:.9g}")

    return EXACT_SCALES[min(range(len(EXACT_SCALES)), key=rank)]


def evaluate(
    job: tuple[str, int],
    names: list[str],
    sizes: tuple[int, int],
    beta: float,
    num_envs: int,
    num_tuning: int,
    num_iter: int,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Every sampler on num_envs instances, at step sizes tuned on num_tuning others.

    Args:
        job: variant and d.
        sizes: prompts and |Y|.

    Returns:
        {sampler: {value_diff, param_diff [num_envs, num_iter], condition [num_envs], scale []}}.
    """
    variant, d = VARIANTS[job[0]], job[1]
    tuning = make_problem(variant, *sizes, d, beta, num_tuning, seed + 1)
    problem, results = make_problem(variant, *sizes, d, beta, num_envs, seed), {}
    for name in names:
        sampler = get_sampler(name)
        scale = tuned_scale(tuning, sampler, num_iter)
        limit, condition = limit_and_condition(problem, sampler)
        series = run(problem, sampler, scale * limit, num_iter)
        results[name] = {**series, "condition": condition, "scale": np.array(scale)}
    return results


def to_rows(results: dict[tuple[str, int], dict[str, dict[str, np.ndarray]]]) -> list[dict]:
    """One row for each variant, d and sampler, for summary.csv: medians over instances."""
    table = []
    for (variant, d), samplers in results.items():
        for name, found in samplers.items():
            needed = np.quantile(updates_needed(found["value_diff"]), [0.1, 0.5, 0.9], method="inverted_cdf")
            final = np.quantile(found["value_diff"][:, -1], [0.1, 0.5, 0.9])
            row = {"variant": variant, "d": d, "sampler": name, "step": float(found["scale"])}
            row |= {"condition": float(np.median(found["condition"]))}
            row |= dict(zip(("updates_low", "updates_to_1e-3", "updates_high"), needed, strict=True))
            row |= dict(zip(("final_low", "final_value_diff", "final_high"), final, strict=True))
            table.append(row)
    return table
