"""What is trained: one logit per response, a log-linear policy, or a transformer. All runs at once.

A learner's parameters are one tensor [B, D], a row per run. `learner(parameters, rows)` returns

    logps  [B, P, N]     log-probabilities of all responses, with gradients
    nodes  [B, P, n, V]  next-token log-probabilities of all prefixes, see tree.py

All start at the reference, which is a transformer, so that only the parametrisation differs. `rows` [B] says which
seed's reference a run has; a transformer needs none, its parameters are the reference's at the start.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lab.tree import level_sizes, next_token_logps, response_logps, responses


class Transformer:
    """GPT-2 (pre-norm, learned positions, tanh-GELU), token for token what transformers' GPT2LMHeadModel computes.

    The prompt is one token of the same vocabulary. Every prefix is computed once and attends to its ancestors, so the
    log-probabilities of all V^L responses cost n positions per prompt.
    """

    def __init__(self, setting) -> None:
        self.prompts, self.vocabulary, self.length = setting.prompts, setting.vocabulary, setting.length
        self.width, self.depth, self.heads = setting.width, setting.depth, setting.heads
        self.sizes = level_sizes(self.vocabulary, self.length)
        v, w = self.vocabulary, self.width
        self.shapes: dict[str, tuple[int, ...]] = {"wte": (v, w), "wpe": (self.length, w)}
        for layer in range(self.depth):
            block = {
                "ln_1.weight": (w,), "ln_1.bias": (w,),
                "attn.c_attn.weight": (w, 3 * w), "attn.c_attn.bias": (3 * w,),
                "attn.c_proj.weight": (w, w), "attn.c_proj.bias": (w,),
                "ln_2.weight": (w,), "ln_2.bias": (w,),
                "mlp.c_fc.weight": (w, 4 * w), "mlp.c_fc.bias": (4 * w,),
                "mlp.c_proj.weight": (4 * w, w), "mlp.c_proj.bias": (w,),
            }  # fmt: skip
            self.shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
        self.shapes |= {"ln_f.weight": (w,), "ln_f.bias": (w,), "lm_head": (v, w)}

    def tensors(self, parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return GPT-2's tensors by name, each [B, ...], from the flat parameters [B, D]."""
        parts = parameters.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: p.view(-1, *self.shapes[name]) for p, name in zip(parts, self.shapes, strict=True)}

    def initial(self, runs: int, generator: torch.Generator) -> torch.Tensor:
        """Return random parameters [runs, D]: matrices of variance 1 / fan-in, norms at the identity."""
        parts = []
        for name, shape in self.shapes.items():
            if name.endswith("bias"):
                # The last norm's bias starts at 1: the sum of its output is then about `width` at every position,
                # and a row of the head in checkpoint.py can rule out the stop token.
                values = torch.full((runs, *shape), float(name == "ln_f.bias"))
            elif len(shape) == 1:
                values = torch.ones(runs, *shape)
            else:
                fan_in = shape[1] if name in ("wte", "wpe", "lm_head") else shape[0]
                values = torch.randn(runs, *shape, generator=generator) * fan_in**-0.5
            parts.append(values.flatten(1))
        return torch.cat(parts, dim=1)

    def __call__(self, parameters: torch.Tensor, rows: torch.Tensor | None = None):
        """Return (logps, nodes), see the top of the file."""
        nodes = self._next_tokens(self._hidden(parameters), parameters)
        return response_logps(nodes, self.length), nodes

    def features(self, parameters: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the gradients of all responses' log-probabilities in the head, [B, P, N, V width].

        A token's is (one-hot - probabilities) x hidden state; a response's is their sum along its path.
        """
        hidden = self._hidden(parameters)
        nodes = self._next_tokens(hidden, parameters)
        residuals = torch.eye(self.vocabulary) - nodes.exp().unsqueeze(-2)  # [B, P, n, V: token, V: row of the head]
        hidden = hidden.view(*nodes.shape[:3], 1, 1, self.width)
        steps = (residuals.unsqueeze(-1) * hidden).flatten(-2)  # [B, P, n, V, F]
        # `response_logps` sums anything along paths: features take the place of runs.
        runs, size = len(steps), steps.shape[-1]
        sums = response_logps(steps.movedim(-1, 1).flatten(0, 1), self.length)
        return sums.unflatten(0, (runs, size)).movedim(1, -1)

    def _hidden(self, parameters: torch.Tensor) -> torch.Tensor:
        """Return what the head sees, [B, P n, width]."""
        t = self.tensors(parameters)
        x = self._embed(t)
        for layer in range(self.depth):
            names = {name.split(".", 2)[2]: name for name in self.shapes if name.startswith(f"h.{layer}.")}
            x = self._block(x, {short: t[name] for short, name in names.items()})
        return _norm(x, t["ln_f.weight"], t["ln_f.bias"])

    def _next_tokens(self, hidden: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """Return next-token log-probabilities, [B, P, n, V]."""
        nodes = torch.bmm(hidden, self.tensors(parameters)["lm_head"].mT).log_softmax(-1)
        return nodes.view(-1, self.prompts, sum(self.sizes), self.vocabulary)

    def _embed(self, t: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return embeddings of all nodes, [B, P n, width]: a node's token is the last of its prefix."""
        (runs, v, w), p = t["wte"].shape, self.prompts
        tokens = t["wte"].unsqueeze(1) + t["wpe"].unsqueeze(2)  # [B, L, V, w]
        levels = [tokens[:, 0, :p].unsqueeze(2)]  # the prompt's token is its number
        for depth in range(1, self.length):
            level = tokens[:, depth].view(runs, 1, 1, v, w).expand(runs, p, self.sizes[depth - 1], v, w)
            levels.append(level.reshape(runs, p, -1, w))
        return torch.cat(levels, dim=2).view(runs, -1, w)

    def _block(self, x: torch.Tensor, t: dict[str, torch.Tensor]) -> torch.Tensor:
        qkv = _linear(_norm(x, t["ln_1.weight"], t["ln_1.bias"]), t["attn.c_attn.weight"], t["attn.c_attn.bias"])
        x = x + _linear(self._attend(*qkv.split(self.width, -1)), t["attn.c_proj.weight"], t["attn.c_proj.bias"])
        hidden = _linear(_norm(x, t["ln_2.weight"], t["ln_2.bias"]), t["mlp.c_fc.weight"], t["mlp.c_fc.bias"])
        return x + _linear(F.gelu(hidden, approximate="tanh"), t["mlp.c_proj.weight"], t["mlp.c_proj.bias"])

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Let nodes attend to themselves and their ancestors: node i of depth d has i // V^(d-j) at depth j."""
        runs, h = q.shape[0], self.heads
        split = [t.view(runs, self.prompts, -1, h, self.width // h).split(self.sizes, dim=2) for t in (q, k, v)]
        out = []
        for query, depth in zip(split[0], range(self.length), strict=True):
            # Grouped by ancestor, [B, P, V^j, V^(d-j), heads, size]: its key and value are the same for a group.
            groups = [query.unflatten(2, (size, -1)) for size in self.sizes[: depth + 1]]
            pairs = zip(groups, split[1], strict=False)
            scores = [(group * key.unsqueeze(3)).sum(-1).flatten(2, 3) for group, key in pairs]
            shares = (torch.stack(scores, -1) * (self.width // h) ** -0.5).softmax(-1).unbind(-1)
            mixed = [
                share.unflatten(2, (size, -1)).unsqueeze(-1) * value.unsqueeze(3)
                for share, size, value in zip(shares, self.sizes, split[2], strict=False)
            ]
            out.append(sum(m.flatten(2, 3) for m in mixed))
        return torch.cat(out, dim=2).view(runs, -1, self.width)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=1e-5), weight.unsqueeze(1))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias.unsqueeze(1), x, weight)


class Scores:
    """pi(y|x) proportional to pi_ref(y|x) exp(scores(parameters)): the table and the log-linear policy."""

    def __init__(self, setting, ref_logps: torch.Tensor) -> None:
        self.prompts, self.vocabulary, self.length = setting.prompts, setting.vocabulary, setting.length
        self.ref_logps = ref_logps
        # Features [N, F] of a response, the same for all prompts; None where each response has a score of its own.
        self.features_of = structure(self.vocabulary, self.length) if setting.learner == "linear" else None

    def initial(self) -> torch.Tensor:
        """Return zeros [seeds, D]: the reference."""
        seeds, _, size = self.ref_logps.shape
        per_prompt = size if self.features_of is None else self.features_of.shape[1]
        return torch.zeros(seeds, self.prompts * per_prompt)

    def __call__(self, parameters: torch.Tensor, rows: torch.Tensor):
        """Return (logps, nodes), see the top of the file."""
        scores = parameters.view(len(parameters), self.prompts, -1)
        if self.features_of is not None:
            scores = scores @ self.features_of.T
        logps = (self.ref_logps[rows] + scores).log_softmax(-1)
        with torch.no_grad():
            nodes = next_token_logps(logps, self.vocabulary, self.length)
        return logps, nodes

    def features(self, parameters: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the gradients of all responses' scores, [B, P, N, D]: a block of the parameters per prompt.

        The gradient of a log-probability is this less its mean under the policy, which differences do not see.
        """
        own = torch.eye(self.ref_logps.shape[-1]) if self.features_of is None else self.features_of
        blocks = torch.einsum("pq,nf->pnqf", torch.eye(self.prompts), own).flatten(2)
        return blocks.expand(len(parameters), *blocks.shape)


def structure(vocabulary: int, length: int) -> torch.Tensor:
    """Return what rewards and references are made of, [N, F]: counts of tokens and of bigrams, the first-last pair.

    The constant directions (the counts sum to L, L - 1 and 1) are taken out, columns have mean 0.
    """
    tokens = responses(vocabulary, length)
    one_hot = F.one_hot(tokens, vocabulary).float()
    bigrams = torch.einsum("nti,ntj->nij", one_hot[:, :-1], one_hot[:, 1:]).flatten(1)
    ends = torch.einsum("ni,nj->nij", one_hot[:, 0], one_hot[:, -1]).flatten(1)
    features = torch.cat([one_hot.sum(1), bigrams, ends], dim=1)
    return features - features.mean(0)


def make_learner(setting, reference: torch.Tensor, ref_logps: torch.Tensor) -> tuple[Callable, torch.Tensor]:
    """Return the learner and its parameters at the reference, [seeds, D].

    Args:
        reference: the reference transformers' parameters [seeds, D'].
        ref_logps: their responses' log-probabilities [seeds, P, N].
    """
    if setting.learner == "transformer":
        return Transformer(setting), reference
    learner = Scores(setting, ref_logps)
    return learner, learner.initial()
