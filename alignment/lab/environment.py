"""Environments: random rewards and references of one structure, one per seed, and exact values by enumeration."""

from dataclasses import dataclass, field

import torch
from lab.learners import Transformer, structure
from lab.tree import response_logps


@dataclass(frozen=True)
class Setting:
    """One cell of a study; each field is a flag of run_lab.py with this default."""

    learner: str = field(
        default="transformer", metadata={"help": "table (one logit per response), linear, transformer"}
    )
    optimizer: str = field(default="adam", metadata={"help": "adam (0.9, 0.99) or sgd; the lr falls linearly to 0"})
    beta: float = field(default=0.3, metadata={"help": "KL coefficient of value and loss"})
    updates: int = field(default=150, metadata={"help": "updates in all"})
    pairs: int = field(default=32, metadata={"help": "labelled pairs per update; 0: the exact expected gradient"})
    iterations: int = field(
        default=0, metadata={"help": "sampling rounds; responses come from the round's first policy. 0: every update"}
    )
    epochs: int = field(default=1, metadata={"help": "passes over the pairs of a sampling round"})
    restart: bool = field(
        default=False, metadata={"help": "restart optimizer and lr in each round, as the pipeline's runs do"}
    )
    quality: float = field(
        default=0.0, metadata={"help": "correlation q of the reference's structure with the reward"}
    )
    spread: float = field(default=1.0, metadata={"help": "standard deviation of the reference's log-probabilities"})
    label_noise: float = field(default=0.0, metadata={"help": "probability that a Bradley-Terry label is flipped"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature"})
    loss: str = field(
        default="sigmoid", metadata={"help": "sigmoid on drawn labels, rev_kl on the true margins, ..."}
    )
    prompts: int = field(default=4, metadata={"help": "prompts, at most the vocabulary: a prompt is one token"})
    vocabulary: int = field(default=4, metadata={"help": "tokens"})
    length: int = field(default=4, metadata={"help": "tokens per response"})
    width: int = field(default=16, metadata={"help": "transformer width"})
    depth: int = field(default=2, metadata={"help": "transformer layers"})
    heads: int = field(default=2, metadata={"help": "attention heads"})


@dataclass(frozen=True)
class Environment:
    """One environment per seed.

    Attributes:
        rewards: [seeds, P, N], float64, mean 0 and standard deviation 1 under the reference for each prompt.
        reference: parameters of the reference transformers, [seeds, D].
        ref_nodes: their next-token log-probabilities, [seeds, P, n, V].
        ref_logps: their responses' log-probabilities, [seeds, P, N].
    """

    rewards: torch.Tensor
    reference: torch.Tensor
    ref_nodes: torch.Tensor
    ref_logps: torch.Tensor


def make_environment(setting: Setting, seeds: list[int], fit_steps: int = 300) -> Environment:
    """Draw rewards and references of the given seeds; seed s is the same environment whatever the others are."""
    transformer = Transformer(setting)
    draws = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        reward, other = _structured(setting, generator), _structured(setting, generator)
        draws.append((reward, other, transformer.initial(1, generator)))
    reward, other, initial = (torch.cat(parts) for parts in zip(*draws, strict=True))
    q = setting.quality
    target = setting.spread * (q * reward + (1 - q**2) ** 0.5 * other)
    parameters = fitted(transformer, initial, target.log_softmax(-1).float(), fit_steps)
    with torch.no_grad():
        _, nodes = transformer(parameters)
    logps = response_logps(nodes.double(), setting.length)
    return Environment(_standardised(reward, logps.exp()), parameters, nodes, logps)


def _structured(setting: Setting, generator: torch.Generator) -> torch.Tensor:
    """Return random scores [1, P, N]: token, bigram and first-last terms of equal variance, standardised."""
    features = structure(setting.vocabulary, setting.length).double()
    v = setting.vocabulary
    scores = 0
    for part in features.split([v, v**2, v**2], dim=1):
        weights = torch.randn(setting.prompts, part.shape[1], generator=generator, dtype=torch.float64)
        term = weights @ part.T
        scores = scores + term / term.std(-1, keepdim=True, unbiased=False)
    return (scores / scores.std(-1, keepdim=True, unbiased=False)).unsqueeze(0)


def _standardised(scores: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return scores [.., N] of mean 0 and standard deviation 1 under the probabilities."""
    centred = scores - (probabilities * scores).sum(-1, keepdim=True)
    return centred / (probabilities * centred**2).sum(-1, keepdim=True).sqrt()


def fitted(transformer: Transformer, parameters: torch.Tensor, target: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the parameters after `steps` of exact maximum likelihood (Adam, lr from 0.01 linearly to 0)."""
    parameters = parameters.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        logps, _ = transformer(parameters)
        optimizer.zero_grad()
        (-(target.exp() * logps).sum(-1).mean(-1).sum()).backward()
        optimizer.step()
        schedule.step()
    return parameters.detach()


def exact_values(logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Return value gap, E r, KL to the reference, [3, B], means over prompts, from log-probabilities [B, P, N].

    V(pi) = E r - beta KL(pi || pi_ref), and V* - V(pi) = beta KL(pi || pi*) with pi* ~ pi_ref exp(r / beta).
    """
    logps = logps.double()
    optimal = (ref_logps + rewards / beta).log_softmax(-1)
    pi = logps.exp()
    gap = beta * (pi * (logps - optimal)).sum(-1)
    reward = (pi * rewards).sum(-1)
    kl = (pi * (logps - ref_logps)).sum(-1)
    return torch.stack([gap, reward, kl]).mean(-1)
