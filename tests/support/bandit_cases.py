"""What the bandit's tests share: the loss as written, every law in the words that define it, the real scripts."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from bandit.problem import logsumexp
from bandit.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
BETA = 1.7
NAMES = [*SAMPLERS, "mix_0.3_0.2_0.6"]


def run_script(name, *arguments, cwd=ROOT, **environment):
    """Run bandit/examples/<name>.py; return the finished process."""
    command = [sys.executable, str(ROOT / "bandit" / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def random_case(num_envs=3, num_actions=6, seed=0):
    """Rewards, reference log-probabilities and a policy's logits, all [envs, |Y|]."""
    rng = np.random.default_rng(seed)
    rewards, theta = rng.normal(size=(2, num_envs, num_actions))
    log_ref = rng.normal(size=(num_envs, num_actions))
    return rewards, log_ref - logsumexp(log_ref), theta


def softmax(logits):
    return torch.softmax(torch.as_tensor(logits), dim=-1)


def defined_laws(rewards, log_ref, theta, beta=BETA):
    """Sampler -> w(y, y') of one environment as a distribution over ordered pairs, from the words that define it."""
    r, ref, pi = torch.tensor(rewards), torch.tensor(log_ref), torch.log_softmax(torch.tensor(theta), -1)
    uniform = torch.full_like(r, 1 / len(r))
    best = softmax(ref + r / beta)
    ratio = beta * (pi - ref)
    outer = torch.outer

    def lm(first, second):
        return outer(*(softmax(a * pi + b * ref) for a, b in (first, second)))

    def mixed(x):
        alpha1, alpha2 = len(r) ** 2, torch.exp(x[:, None] - x[None, :]).sum()
        return (alpha1 * outer(uniform, uniform) + alpha2 * outer(softmax(x), softmax(-x))) / (alpha1 + alpha2)

    def best_worst(scores, draws=8):
        return torch.tensor(best_and_worst_by_enumeration(pi.exp().numpy(), scores.numpy(), draws))

    def clipped():
        d, spread = ratio[:, None] - ratio[None, :], r.max() - r.min()
        w = torch.minimum(2 + d.exp() + (-d).exp(), 2 + spread.exp() + (-spread).exp())
        return w / w.sum()

    on, off = (1, 0), (0, 1)
    return {
        "DPO-Unif": lambda: outer(uniform, uniform),
        "DPO-Mix-R": lambda: mixed(r),
        "DPO-Mix-P": lambda: mixed(ratio),
        "DPO-Mix-P*": clipped,
        "DPO-Mix-R-1": lambda: outer(uniform, uniform),
        "DPO-Mix-R-2": lambda: outer(softmax(r), softmax(-r)),
        "DPO-Mix-P-1": lambda: outer(uniform, uniform),
        "DPO-Mix-P-2": lambda: outer(softmax(ratio), softmax(-ratio)),
        "DPO-Opt-Unif": lambda: outer(best, uniform),
        "DPO-Policy-Unif": lambda: outer(pi.exp(), uniform),
        "DPO-Policy-Policy": lambda: outer(pi.exp(), pi.exp()),
        "offline": lambda: lm(off, off),
        "online": lambda: lm(on, on),
        "gshf": lambda: lm(off, on),
        "mixp": lambda: lm((1.5, -0.5), (0.5, 0.5)),
        "mixp-iterative": lambda: 0.3 * lm(on, on) + 0.7 * lm((1.5, -0.5), (0.5, 0.5)),
        "pilaf": lambda: (lm(on, on) + lm((1 + beta, -beta), (1 - beta, beta))) / 2,
        "simplemix": lambda: (lm(on, on) + lm(off, off)) / 2,
        "xpo": lambda: lm(on, off),
        "history": lambda: lm(on, off),  # in the first update: before it the policy is the reference
        "best-worst": lambda: best_worst(r),
        "implicit-best-worst": lambda: best_worst(ratio),
        "random-pairs": lambda: lm(on, on),
        "mix_0.3_0.2_0.6": lambda: 0.4 * lm(on, on) + 0.6 * lm((1.3, -0.3), (0.8, 0.2)),
    }


DEFINED = list(defined_laws(*(x[0] for x in random_case())))


def best_and_worst_by_enumeration(pi, scores, draws):
    """P(best = y, worst = y') over all counts of the arms in `draws` draws; equal scores are ordered at random."""
    joint = np.zeros((len(pi), len(pi)))
    for seen in itertools.combinations_with_replacement(range(len(pi)), draws):
        counts = np.bincount(seen, minlength=len(pi))
        probability = stats.multinomial.pmf(counts, draws, pi)
        top = [y for y in seen if scores[y] == max(scores[list(seen)])]
        bottom = [y for y in seen if scores[y] == min(scores[list(seen)])]
        # All draws of one score: best and worst are two of them, in random order.
        pairs = list(itertools.permutations(seen, 2)) if top == bottom else list(itertools.product(top, bottom))
        for best, worst in pairs:
            joint[best, worst] += probability / len(pairs)
    return joint


def loss_as_written(weights, rewards, log_ref, logits, beta=BETA, noise=0.0):
    """DPO's loss over all pairs of one environment; weights [|Y|, |Y|] sum to 1 and are not differentiated."""
    h = torch.log_softmax(logits, -1) - torch.as_tensor(log_ref)
    d = beta * (h[:, None] - h[None, :])
    r = torch.as_tensor(rewards)
    wins = torch.sigmoid(r[:, None] - r[None, :])
    wins = wins * (1 - noise) + (1 - wins) * noise
    return -(torch.as_tensor(weights) * (wins * F.logsigmoid(d) + (1 - wins) * F.logsigmoid(-d))).sum()


def exact_step(bandit, sampler, lr, u):
    """What one exact update adds to the state u, of which a run starts."""
    from bandit.exact import Updates

    updates = Updates(bandit, sampler, lr)
    updates.advance(u.copy(), 1)
    return updates.last
