"""The bandit: rewards, reference policy, beta; and the independent random streams.

State of every run: the implicit reward u = beta (theta - log pi_ref), shape [envs, |Y|], known up to a constant per
environment. With it d(y, y') = u_y - u_y', delta(y, y') = (r - u)_y - (r - u)_y', and pi is proportional to
pi_ref exp(u / beta). A run starts at u = 0, the reference policy; the optimum is u = r.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


def logsumexp(x: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the last axis, which is kept with length 1."""
    top = x.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


def gaps(x: np.ndarray) -> np.ndarray:
    """All differences x_y - x_y': [..., |Y|] -> [..., |Y|, |Y|]."""
    return x[..., :, None] - x[..., None, :]


@dataclass(frozen=True)
class Bandit:
    """rewards and log_ref: [envs, |Y|] of one float type; beta > 0; label_noise: share of labels that are flipped.

    With flipped labels no policy fits all pairs: the optimum stays that of the rewards, which DPO then misses.
    """

    rewards: np.ndarray
    log_ref: np.ndarray
    beta: float
    label_noise: float = 0.0

    @property
    def num_actions(self) -> int:
        return self.rewards.shape[1]

    @cached_property
    def reward_range(self) -> np.ndarray:
        """R = max r - min r of each environment, [envs, 1]."""
        return np.ptp(self.rewards, axis=-1, keepdims=True)

    @cached_property
    def win_margins(self) -> np.ndarray:
        """2 P*(y beats y') - 1 = (1 - 2 label_noise) tanh((r_y - r_y') / 2), [envs, |Y|, |Y|]."""
        return (1 - 2 * self.label_noise) * np.tanh(gaps(self.rewards) / 2)

    @cached_property
    def log_optimum(self) -> np.ndarray:
        """log pi*, pi* proportional to pi_ref exp(r / beta), [envs, |Y|]."""
        return self.log_policy(self.rewards)

    @cached_property
    def best_value(self) -> np.ndarray:
        """V* = V(pi*), [envs]."""
        return self.beta * logsumexp(self.rewards / self.beta + self.log_ref)[:, 0]

    def as_float64(self) -> "Bandit":
        """The same in float64."""
        rewards, log_ref = (x.astype(np.float64, copy=False) for x in (self.rewards, self.log_ref))
        return Bandit(rewards, log_ref, self.beta, self.label_noise)

    def rows(self, part: slice | np.ndarray) -> "Bandit":
        """Some of the environments."""
        return Bandit(self.rewards[part], self.log_ref[part], self.beta, self.label_noise)

    def log_policy(self, u: np.ndarray) -> np.ndarray:
        """log pi of the state u [..., envs, |Y|]."""
        logits = u / self.beta + self.log_ref
        return logits - logsumexp(logits)


def make_bandit(
    rewards: np.ndarray,
    beta: float,
    log_ref: np.ndarray | None = None,
    dtype=np.float64,
    label_noise: float = 0.0,
) -> Bandit:
    """Bandit of rewards [|Y|] or [envs, |Y|]; log_ref of either shape, uniform if None."""
    rewards = np.atleast_2d(np.asarray(rewards, dtype))
    if log_ref is None:
        log_ref = np.full(rewards.shape[1], -np.log(rewards.shape[1]))
    log_ref = np.broadcast_to(np.asarray(log_ref, dtype), rewards.shape)
    return Bandit(rewards, log_ref, float(beta), label_noise)


def reward_stream(seed: int) -> np.random.Generator:
    """The random stream of the rewards."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))


def sampling_stream(seed: int, sampler: str, env: int) -> np.random.Generator:
    """The random stream of one sampler in one environment: no other curve changes when either is added."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, zlib.crc32(sampler.encode()), env)))


def draw_rewards(distribution: str, num_envs: int, num_actions: int, seed: int) -> np.ndarray:
    """Rewards [envs, |Y|] from N(0, 1) (`normal`) or U[0, 1] (`uniform`)."""
    stream = reward_stream(seed)
    draw = {"normal": stream.standard_normal, "uniform": stream.random}[distribution]
    return draw((num_envs, num_actions))
