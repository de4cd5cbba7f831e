"""All responses of a prompt as a tree: sums along its paths, and how exact values are made of them.

V tokens, responses of L tokens: node i at depth d is the prefix whose tokens are the digits of i in base V. The inner
nodes of all depths stand in one axis, n = 1 + V + ... + V^(L-1), the leaves are the N = V^L responses.
Axes: B runs (or seeds), P prompts.
"""

import torch


def level_sizes(vocabulary: int, length: int) -> list[int]:
    """Return the number of inner nodes per depth."""
    return [vocabulary**depth for depth in range(length)]


def responses(vocabulary: int, length: int) -> torch.Tensor:
    """Return the tokens of all responses, [N, L]."""
    index = torch.arange(vocabulary**length)
    return torch.stack([index // vocabulary ** (length - 1 - t) % vocabulary for t in range(length)], dim=1)


def response_logps(nodes: torch.Tensor, length: int) -> torch.Tensor:
    """Sum next-token log-probabilities [B, P, n, V] along every path: log-probabilities of responses [B, P, N]."""
    levels = nodes.split(level_sizes(nodes.shape[-1], length), dim=2)
    logps = levels[0].flatten(2)
    for level in levels[1:]:
        logps = (logps.unsqueeze(-1) + level).flatten(2)
    return logps


def next_token_logps(logps: torch.Tensor, vocabulary: int, length: int) -> torch.Tensor:
    """Return the inverse of `response_logps`: [B, P, N], normalised, to [B, P, n, V]."""
    levels = []
    for _ in range(length):
        children = logps.unflatten(-1, (-1, vocabulary))
        logps = children.logsumexp(-1)
        levels.append(children - logps.unsqueeze(-1))
    return torch.cat(levels[::-1], dim=2)


def mixed(policy: torch.Tensor, second: torch.Tensor, weights: tuple[float, float], temperature: float = 1.0):
    """Return next-token log-probabilities of softmax((w_policy logits_policy + w_second logits_second) / T)."""
    return ((weights[0] * policy + weights[1] * second) / temperature).log_softmax(-1)
