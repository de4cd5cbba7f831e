"""Optimal designs: which two of K candidates tell most about the parameters. Pair by pair, greedily.

d = phi(y1) - phi(y2) is a pair's feature, phi(y) the gradient of log pi(y) (see `features` of the learners), and
V = 1 + sum w d d^T the information of all pairs so far, w = sigma'(beta h) the variance of a label. The next pair has
the largest

    d   w d^T V^-1 d: the gain of log det V. D-optimal, ADPO, arXiv 2503.01076
    g   d^T V^-1 d with w = 1: the largest variance of an implicit reward difference, as ActiveDPO takes it (arXiv
        2505.19241); the greedy step towards a G-optimal design
    v   w d^T V^-1 I V^-1 d / (1 + w d^T V^-1 d): the loss of tr(I V^-1), I the Fisher information of the policy,
        arXiv 2606.19607

What was checked, and what is other here (docs/samplers.md has the same by row):

    d   the paper's text, its eq. 10 and Algorithm 1. There V = gamma 1 + sum beta^2 w d d^T, which is beta^2 times
        ours at gamma = beta^2; the choice is among prompts, each at most once, and theta is fitted anew
    g   a public summary with the formulas. There gradients are of a LoRA, projected at random and
        scaled to length 1 against a bias of length; responses here have one length
    v   a public summary with the formulas. There the design is one distribution over pairs, solved
        at the reference; here it is the greedy step at the current policy

Features are those at the time of collection, and for the transformer the gradients of its head; ADPO takes the last
hidden state. `g-hybrid` in sampling.py follows an abstract.
"""

import torch


class Design:
    """The designs of B runs.

    Attributes:
        features: of all responses, [B, P, N, F], as last seen.
        fisher: the policies' Fisher information, [B, F, F], as last seen.
        inverse: V^-1, [B, F, F].
    """

    def __init__(self, kinds: list[str]) -> None:
        self.is_g, self.is_v = (torch.tensor([k == kind for k in kinds]).view(-1, 1, 1) for kind in "gv")
        self.inverse: torch.Tensor | None = None

    def see(self, features: torch.Tensor, logps: torch.Tensor) -> None:
        """Take the features at the current policies, log-probabilities [B, P, N]."""
        self.features, self.fisher = features, fisher_information(features, logps)
        if self.inverse is None:
            self.inverse = torch.eye(features.shape[-1]).repeat(len(features), 1, 1)

    def choose(self, prompts, drawn, scores, fixed) -> torch.Tensor:
        """Choose two of K candidates, pair after pair.

        Args:
            prompts: [M] prompt of each pair.
            drawn: responses [B, M, K].
            scores: their implicit rewards beta log(pi / pi_ref), [B, M, K].
            fixed: [B, M], true where the pair is the first two candidates whatever they tell.

        Returns:
            Responses [B, M, 2].
        """
        rows = torch.arange(len(drawn)).unsqueeze(1)
        pairs = []
        for m, prompt in enumerate(prompts.tolist()):
            features = self.features[rows, prompt, drawn[:, m]]
            pairs.append(self.choose_one(features, scores[:, m], fixed[:, m]))
        return drawn.gather(-1, torch.stack(pairs, dim=1))

    def choose_one(self, features, scores, fixed) -> torch.Tensor:
        """Choose two of K candidates for one pair of each run, and count the pair in.

        Args:
            features, scores, fixed: [B, K, F], [B, K], [B].

        Returns:
            Positions among the candidates, [B, 2].
        """
        runs, count, _ = features.shape
        slope = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).sigmoid()
        weights = torch.where(self.is_g, torch.ones(()), slope * (1 - slope))
        variances = _of_differences(features, self.inverse)
        gains = weights * variances
        losses = weights * _of_differences(features, self.inverse @ self.fisher @ self.inverse) / (1 + gains)
        value = torch.where(self.is_v, losses, gains).triu(1)
        value[fixed, 0, 1] = float("inf")
        # Candidates may all be one response: any pair then has the value 0, and the first two are as good.
        best = value.flatten(1).argmax(1)
        best = torch.where(value.flatten(1).amax(1) > 0, best, torch.ones_like(best))
        pair = torch.stack([best // count, best % count], dim=1)
        self._count_in(features, weights, pair)
        return pair

    def _count_in(self, features, weights, pair) -> None:
        """Add w d d^T to V: Sherman-Morrison on its inverse."""
        rows = torch.arange(len(features))
        first, second = pair.unbind(1)
        d = (features[rows, first] - features[rows, second]).unsqueeze(-1)
        w = weights[rows, first, second].view(-1, 1, 1)
        along = self.inverse @ d
        self.inverse -= w * along @ along.mT / (1 + w * d.mT @ along)


def _of_differences(features: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Return d^T form d of all pairs' d, [B, K, K], from features [B, K, F]."""
    products = features @ form @ features.mT
    own = products.diagonal(dim1=1, dim2=2)
    return own.unsqueeze(-1) + own.unsqueeze(-2) - products - products.mT


def fisher_information(features: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """Return the mean over prompts of the covariance of features [B, P, N, F] under the policy, [B, F, F]."""
    pi = logps.float().exp().unsqueeze(-1)
    centred = (features - (pi * features).sum(2, keepdim=True)) * pi.sqrt()
    centred = centred.flatten(1, 2)
    return centred.mT @ centred / logps.shape[1]
