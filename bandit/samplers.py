"""The samplers: one table. A sampler is a symmetric matrix of pair weights w(y, y').

DPO's loss is symmetric in the pair, so a distribution that is not (y1 from one policy, y2 from another) is replaced
by its symmetric part: the same gradient, the same law of (winner, loser). A row gives its law in one of two forms:

- `products`: as data, a constant and a sum of products of arm distributions (`Products`); runs compiled.
- `law`: as a function of the state, the whole matrix (`Dense`); the update runs in numpy.

Weights as in Shi, Zhou, Du, "The Crucial Role of Samplers in Online Direct Preference Optimization", ICLR 2025:
DPO-Unif 1; DPO-Mix-R 2 + e^D + e^-D with D = r_y - r_y'; DPO-Mix-P the same with D = d(y, y') = u_y - u_y';
DPO-Mix-P* the same with d clipped to [-R, R], R = max r - min r of that environment.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from bandit import kernel
from bandit.mixtures import MIXTURES, POLICY, Mixture, WeightPair, always, get_mixture
from bandit.problem import Bandit, logsumexp


class Dense(NamedTuple):
    """Pair weights matrix * exp(log_scale), [envs, |Y|, |Y|] and [envs, 1]: e^d overflows long before ratios do."""

    matrix: np.ndarray
    log_scale: np.ndarray


class Arm(NamedTuple):
    """Distribution of one arm, proportional to exp(of_u * u + of_before * (u before the last update) + base)."""

    of_u: float
    of_before: float
    base: np.ndarray  # [envs, |Y|]

    def logits(self, u: np.ndarray, before: np.ndarray) -> np.ndarray:
        return self.of_u * u + self.of_before * before + self.base


@dataclass(frozen=True)
class Products:
    """The weights w(y, y') = constant + sum of mass * (a(y) b(y') + b(y) a(y')).

    Attributes:
        terms: (mass, a, b), each.
        constant: weight that every pair has.
        normalised: a and b sum to 1. A distribution has no scale of its own: w is then divided by the sum over terms
            of 2 * mass * max a * max b. So w is at most 1 (exactly 1 for the uniform pair, DPO-Unif's weight), which
            keeps the matched step below the stability limit.
        limit: |log a(y) b(y')| is clipped to it, [envs, 1].
    """

    terms: tuple[tuple[float, Arm, Arm], ...] = ()
    constant: float = 0.0
    normalised: bool = False
    limit: np.ndarray | None = None

    @property
    def fixed(self) -> bool:
        """Whether the weights are the same at every state."""
        return not any(arm.of_u or arm.of_before for _, *arms in self.terms for arm in arms)

    def weights(self, u: np.ndarray, before: np.ndarray) -> Dense:
        """The matrix at the state u [envs, |Y|], in logarithms, so that nothing overflows."""
        pair_logs, largest = [], []
        for mass, *arms in self.terms:
            logs = [arm.logits(u, before) for arm in arms]
            if self.normalised:
                logs = [log - logsumexp(log) for log in logs]
            ratio = logs[0][:, :, None] + logs[1][:, None, :]
            if self.limit is not None:
                ratio = np.clip(ratio, -self.limit[..., None], self.limit[..., None])
            pair_logs += [np.log(mass) + ratio, np.log(mass) + ratio.swapaxes(1, 2)]
            largest.append(np.log(2 * mass) + sum(log.max(axis=-1, keepdims=True) for log in logs))
        if self.constant:
            pair_logs.append(np.full((*u.shape, u.shape[1]), np.log(self.constant)))
        total = np.logaddexp.reduce(pair_logs)
        top = total.max(axis=(1, 2))[:, None]
        return Dense(np.exp(total - top[..., None]), top - (np.logaddexp.reduce(largest) if self.normalised else 0))


@dataclass(frozen=True)
class Sampler:
    """One row; exactly one of `products` and `law` is given.

    Attributes:
        about: what a pair is drawn from, for `--help`.
        products: bandit -> the law as data.
        law: (u [envs, |Y|], bandit) -> the law as a matrix.
        alpha: the theorems' loss weight alpha as a multiple of Z, the sum of the weights; None if no theorem covers
            the sampler. Mix-R and Mix-P: alpha1 + alpha2 = sum (1 + e^D) = Z / 2. Unif: alpha = 2 |Y|^2 = 2 Z.
    """

    about: str
    products: Callable[[Bandit], Products] | None = None
    law: Callable[[np.ndarray, Bandit], Dense] | None = None
    alpha: float | None = None

    def __post_init__(self):
        if (self.products is None) == (self.law is None):
            raise ValueError(f"sampler ({self.about}): give either products or a law")

    def weights(self, u: np.ndarray, bandit: Bandit, before: np.ndarray | None = None) -> Dense:
        """Pair weights at the state u, reached from the state `before` (None: from u itself, a run at rest)."""
        if self.law is not None:
            return self.law(u, bandit)
        return self.products(bandit).weights(u, u if before is None else before)

    def fixed(self, bandit: Bandit) -> bool:
        """Whether the weights are known to be the same at every state."""
        return self.products is not None and self.products(bandit).fixed


def _centred(x: np.ndarray) -> np.ndarray:
    return x - (x.max(axis=-1, keepdims=True) + x.min(axis=-1, keepdims=True)) / 2


def uniform(bandit: Bandit) -> Products:
    """Weight 1 for every pair."""
    return Products(constant=1.0)


def of_rewards(bandit: Bandit, constant: float = 2.0) -> Products:
    """constant + e^D + e^-D, D = r_y - r_y'."""
    r = _centred(bandit.rewards)
    return Products(((1.0, Arm(0.0, 0.0, r), Arm(0.0, 0.0, -r)),), constant)


def of_policy(bandit: Bandit, constant: float = 2.0, limit: np.ndarray | None = None) -> Products:
    """constant + e^d + e^-d, d = u_y - u_y', |d| clipped to `limit`."""
    zero = np.zeros_like(bandit.rewards)
    return Products(((1.0, Arm(1.0, 0.0, zero), Arm(-1.0, 0.0, zero)),), constant, limit=limit)


def times_uniform(bandit: Bandit, arm: Arm) -> Products:
    """One arm from a distribution, the other uniform."""
    return Products(((0.5, arm, Arm(0.0, 0.0, np.zeros_like(bandit.rewards))),), normalised=True)


def logit_mixture(mixture: Mixture) -> Callable[[Bandit], Products]:
    """Two draws of a row of the language-model table: each arm from pi^w_policy pi_second^w_second, normalised."""

    def products(bandit: Bandit) -> Products:
        def arm(weights: tuple[float, ...]) -> Arm:
            # log pi = u / beta + log pi_ref, and so for the policy before; the arm's constant does not matter.
            on = dict(zip(mixture.models, weights, strict=True))
            return Arm(on["policy"] / bandit.beta, on.get("previous", 0) / bandit.beta, sum(weights) * bandit.log_ref)

        pairs = mixture.pairs(bandit.beta)
        return Products(tuple((p / 2, arm(first), arm(second)) for p, first, second, *_ in pairs), normalised=True)

    return products


def extremes(pi: np.ndarray, scores: np.ndarray, draws: int) -> np.ndarray:
    """P(best = y, worst = y') of independent draws from pi, by score: [envs, |Y|, |Y|] from pi, scores [envs, |Y|].

    No draw below y' and none above y has probability S^draws, S = pi of the arms between; subtracting the cases in
    which y' or y itself does not occur leaves four such powers. Equal scores are ordered at random: best and worst
    are then shared among the arms of one score in proportion to pi.
    """
    joint = np.empty((*pi.shape, pi.shape[1]), pi.dtype)
    kernel.fill_best_and_worst(pi, scores, draws, joint)
    return joint


def best_and_worst(mixture: Mixture) -> Callable[[np.ndarray, Bandit], Dense]:
    """The best and the worst of the row's candidates, independent draws from one policy, by (implicit) reward."""

    def law(u: np.ndarray, bandit: Bandit) -> Dense:
        ((_, (policy, second), *_),) = mixture.pairs(bandit.beta)
        logits = policy * bandit.log_policy(u) + second * bandit.log_ref
        pi = np.exp(logits - logsumexp(logits))
        weights = extremes(pi, bandit.rewards if mixture.choose == "max_min" else u, mixture.candidates)
        weights = (weights + weights.swapaxes(1, 2)) / 2
        return Dense(weights, -np.log(weights.max(axis=(1, 2))[:, None]))

    return law


class NotTabular(ValueError):
    """A row of the language-model table that this simulator has no law for."""


def check_tabular(mixture: Mixture) -> None:
    """Raise NotTabular if the row has a field, a choice, or weights that are not known here."""
    known = {"pairs", "about", "second_model", "third_model", "candidates", "choose"}
    for field in fields(mixture):
        if field.name not in known and getattr(mixture, field.name) != field.default:
            raise NotTabular(f"the bandit has no law for rows with `{field.name}`")
    for name in mixture.models[1:]:
        if name not in ("reference", "previous"):
            raise NotTabular(f"the bandit has no model {name!r}")
    pairs = mixture.pairs(1.0)
    for _, first, second, *more in pairs:
        defaults = [WeightPair._field_defaults[name] for name in WeightPair._fields[3:]]
        if not len(first) == len(second) == len(set(mixture.models)) or more != defaults:
            raise NotTabular("the bandit knows pairs of two weight vectors, with a weight per model, only")
    if mixture.candidates == 2 or mixture.choose == "random":
        return
    if mixture.choose not in ("max_min", "implicit_max_min"):
        raise NotTabular(f"the bandit has no law for the choice {mixture.choose!r} of {mixture.candidates}")
    if len(pairs) > 1 or pairs[0][1] != pairs[0][2] or mixture.models[1:] != ("reference",):
        raise NotTabular("best and worst of draws from several policies have no closed form here")


def from_mixture(mixture: Mixture) -> Sampler:
    """A row of the language-model table as a sampler of arms.

    Two of N independent draws are two independent draws, so with the choice `random` only the pair counts.

    Raises:
        NotTabular: see `check_tabular`.
    """
    check_tabular(mixture)
    if mixture.candidates > 2 and mixture.choose != "random":
        return Sampler(mixture.about, law=best_and_worst(mixture))
    return Sampler(mixture.about, logit_mixture(mixture))


def tabular_rows(mixtures: dict[str, Mixture]) -> dict[str, Sampler]:
    """The rows that have a law here."""
    rows = {}
    for name, mixture in mixtures.items():
        try:
            rows[name] = from_mixture(mixture)
        except NotTabular:
            continue
    return rows


_POWER = "((pi/pi_ref)^beta, (pi_ref/pi)^beta)"

SAMPLERS = {
    "DPO-Unif": Sampler("both arms uniform", uniform, alpha=2.0),
    "DPO-Mix-R": Sampler("uniform pair mixed with (e^r, e^-r)", of_rewards, alpha=0.5),
    "DPO-Mix-P": Sampler(f"uniform pair mixed with {_POWER}", of_policy, alpha=0.5),
    "DPO-Mix-P*": Sampler(
        "DPO-Mix-P, weights clipped at the reward range", lambda b: of_policy(b, limit=b.reward_range), alpha=0.5
    ),
    "DPO-Mix-R-1": Sampler("the uniform component of DPO-Mix-R alone", uniform),
    "DPO-Mix-R-2": Sampler("(e^r, e^-r) alone", lambda b: of_rewards(b, 0.0)),
    "DPO-Mix-P-1": Sampler("the uniform component of DPO-Mix-P alone", uniform),
    "DPO-Mix-P-2": Sampler(f"{_POWER} alone", lambda b: of_policy(b, 0.0)),
    "DPO-Opt-Unif": Sampler(
        "one arm from the optimal policy, one uniform", lambda b: times_uniform(b, Arm(0.0, 0.0, b.log_optimum))
    ),
    "DPO-Policy-Unif": Sampler(
        "one arm from the current policy, one uniform", lambda b: times_uniform(b, Arm(1 / b.beta, 0.0, b.log_ref))
    ),
    "DPO-Policy-Policy": Sampler(
        "both arms from the current policy", logit_mixture(Mixture(always(POLICY, POLICY), ""))
    ),
    **tabular_rows(MIXTURES),
}


def get_sampler(name: str) -> Sampler:
    """Row of the table, or a member of the logit-mixture family, `mix_A_B_P`, see bandit/mixtures.py.

    Raises:
        ValueError: the name is neither, or the row has no law here.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if name in MIXTURES or name.startswith("mix"):
        return from_mixture(get_mixture(name))
    raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}, mix_A_B_P")
