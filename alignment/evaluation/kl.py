"""KL divergence of a policy from its reference, per response, by exact sums over the vocabulary.

KL(pi || pi_ref | x) = E_y sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)) for responses y of the policy. The inner
KL is computed exactly and only the prefixes are sampled: less variance than log pi(y|x) - log pi_ref(y|x), which has
the same expectation. Both models are tempered as the sampling was: softmax(logits / T).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from common.cli import UserError

# Most float32 logits of one model that exist at a time: 128 MiB.
CHUNK_ELEMENTS = 2**25


class Sequence(NamedTuple):
    """A prompt with a response; `ended` says whether a stop token (not in `response`) came after it."""

    prompt: list[int]
    response: list[int]
    ended: bool

    @property
    def tokens(self) -> int:
        """How many tokens were sampled, the stop token counted."""
        return len(self.response) + self.ended


class Score(NamedTuple):
    """Sums over the tokens of a response: the exact per-token KL, and log pi - log pi_ref of what was sampled."""

    kl: float
    log_ratio: float


def token_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of each row, from log-probabilities [N, V]; [N].

    Tokens of policy probability 0 add 0, also where a model gives them the logit -inf.
    """
    terms = policy.exp() * (policy - reference)
    return torch.where(policy == -math.inf, 0.0, terms).sum(dim=-1)


def token_log_prob(log_probs: torch.Tensor, targets: torch.Tensor, stop_ids: list[int]) -> torch.Tensor:
    """Log-probability of each target, from log-probabilities [N, V]; target -1 is "any of the stop tokens"; [N]."""
    stop = log_probs[:, stop_ids].logsumexp(dim=-1)
    return torch.where(targets < 0, stop, log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0])


class LanguageModel:
    """A causal model of which first the hidden states are computed, then the logits of a few positions at a time.

    Where a model changes its logits after the head (some scale or cap them), its own forward pass computes them all.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.body = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings()
        self.vocabulary = self.head.weight.shape[0]
        self.has_plain_head = self._has_plain_head()

    @torch.inference_mode()
    def _has_plain_head(self) -> bool:
        ids = torch.arange(min(8, self.vocabulary), device=self.model.device)[None]
        return torch.equal(self.head(self.body(input_ids=ids).last_hidden_state), self.model(input_ids=ids).logits)

    def states(
        self, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """(states [B, T, ...], the function that makes float32 logits of some of them)."""
        if self.has_plain_head:
            hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden, lambda chosen: self.head(chosen).float()
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits, torch.Tensor.float


def check_same_width(policy: LanguageModel, reference: LanguageModel) -> None:
    """Raises `UserError` unless both models give logits for the same number of ids."""
    if policy.vocabulary != reference.vocabulary:
        raise UserError(
            f"policy and reference give logits for {policy.vocabulary} and {reference.vocabulary} ids; "
            "resize one model's embeddings to the other's"
        )


@torch.inference_mode()
def score_sequences(
    policy: LanguageModel,
    reference: LanguageModel,
    sequences: list[Sequence],
    temperature: float,
    stop_ids: list[int],
) -> list[Score]:
    """Scores of a batch of responses: one forward pass of each model, logits in chunks of positions."""
    device = policy.model.device
    ids, mask = _pad_right(sequences, device)
    rows, columns, targets = (torch.tensor(values, device=device) for values in _positions(sequences))
    sides = [model.states(ids, mask) for model in (policy, reference)]
    chunk = max(1, CHUNK_ELEMENTS // policy.vocabulary)
    kl, log_ratio = [], []
    for i in range(0, len(targets), chunk):
        where = rows[i : i + chunk], columns[i : i + chunk]
        p, q = ((logits(states[where]) / temperature).log_softmax(dim=-1) for states, logits in sides)
        kl.append(token_kl(p, q))
        wanted = targets[i : i + chunk]
        log_ratio.append(token_log_prob(p, wanted, stop_ids) - token_log_prob(q, wanted, stop_ids))
    lengths = [sequence.tokens for sequence in sequences]
    sums = ([part.sum().item() for part in torch.cat(v).double().split(lengths)] for v in (kl, log_ratio))
    return [Score(*pair) for pair in zip(*sums, strict=True)]


def _pad_right(sequences: list[Sequence], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [B, T]. The padding's id is 0: no position that counts can see it."""
    rows = [sequence.prompt + sequence.response for sequence in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _positions(sequences: list[Sequence]) -> tuple[list[int], list[int], list[int]]:
    """(row, column, target) of every sampled token; the logits of column c predict token c + 1."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for row, sequence in enumerate(sequences):
        first = len(sequence.prompt) - 1
        found[0].extend([row] * sequence.tokens)
        found[1].extend(range(first, first + sequence.tokens))
        found[2].extend([*sequence.response, *([-1] if sequence.ended else [])])
    return found


def batches(sequences: list[Sequence], size: int) -> Iterator[list[int]]:
    """Indices of `sequences` in batches of similar length, longest first."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].prompt) - len(sequences[i].response))
    for i in range(0, len(order), size):
        yield order[i : i + size]


def mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None where one value cannot tell."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarize(groups: list[list[tuple[Sequence, Score]]]) -> dict:
    """The result over prompts.

    Args:
        groups: for every prompt its responses with their scores. Several responses of a prompt are not independent
            of each other, so they are averaged before the standard error is taken.
    """
    everything = [pair for group in groups for pair in group]
    per_prompt = [math.fsum(score.kl for _, score in group) / len(group) for group in groups]
    ratios = [math.fsum(score.log_ratio for _, score in group) / len(group) for group in groups]
    kl, stderr = mean_and_stderr(per_prompt)
    log_ratio, log_ratio_stderr = mean_and_stderr(ratios)
    tokens = sum(sequence.tokens for sequence, _ in everything)
    return {
        "kl": kl,
        "stderr": stderr,
        "kl_per_token": math.fsum(score.kl for _, score in everything) / tokens,
        "num_prompts": len(groups),
        "num_responses": len(everything),
        "mean_tokens": tokens / len(everything),
        "truncated_fraction": sum(not sequence.ended for sequence, _ in everything) / len(everything),
        "log_ratio_kl": log_ratio,
        "log_ratio_stderr": log_ratio_stderr,
        "kl_of_prompts": per_prompt,
    }
