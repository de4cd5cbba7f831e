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


# Ends a response of which only the text is known: one of the stop tokens, but which one is not known.
ANY_STOP = -1


class Sequence(NamedTuple):
    """A prompt with all ids that were sampled; `ended` says that the last one is a stop token (or `ANY_STOP`)."""

    prompt: list[int]
    response: list[int]
    ended: bool


class Score(NamedTuple):
    """Sums over the tokens of a response.

    Attributes:
        kl: the exact KL of the next token's distributions.
        log_ratio: log pi - log pi_ref of what was sampled.
        log_ratio_at_one: the same at T = 1, whatever T the sampling had: the published scripts' estimator.
    """

    kl: float
    log_ratio: float
    log_ratio_at_one: float | None = None


def token_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(policy || reference) of each row, from log-probabilities [N, V]; [N].

    Tokens of policy probability 0 add 0, also where a model gives them the logit -inf.
    """
    terms = policy.exp() * (policy - reference)
    return torch.where(policy == -math.inf, 0.0, terms).sum(dim=-1)


def token_log_prob(log_probs: torch.Tensor, targets: torch.Tensor, stop_ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each target, from log-probabilities [N, V]; [N]. `ANY_STOP` is their sum's."""
    found = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    if not stop_ids:
        return found
    return torch.where(targets == ANY_STOP, log_probs[:, stop_ids].logsumexp(dim=-1), found)


class LanguageModel:
    """A causal model of which first the hidden states are computed, then the logits of a few positions at a time.

    Where a model changes its logits after the head (some scale or cap them), its own forward pass computes them all.
    The model may be spread over devices (`device_map`): states and logits are then on that of its last parts.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)  # where its offloaded weights come to; they say "meta"
        self.device = model.device if device is None else torch.device(device)
        self.body = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings()
        self.vocabulary = self.head.weight.shape[0]
        self.has_plain_head = self._has_plain_head()

    @torch.inference_mode()
    def _has_plain_head(self) -> bool:
        ids = torch.arange(min(8, self.vocabulary), device=self.device)[None]
        logits = self.head(self.body(input_ids=ids).last_hidden_state)
        return torch.equal(logits, self.model(input_ids=ids).logits.to(logits.device))

    def states(
        self, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Return (states [B, T, ...], the function that makes float32 logits of some of them)."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        if self.has_plain_head:
            hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden, lambda chosen: self.head(chosen).float()
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits, torch.Tensor.float


def check_same_width(policy: LanguageModel, reference: LanguageModel) -> None:
    """Raise `UserError` unless both models give logits for the same number of ids."""
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
    published: bool = False,
) -> list[Score]:
    """Return the scores of a batch of responses: one forward pass of each model, logits in chunks of positions."""
    device = policy.device
    ids, mask = _pad_right(sequences, device)
    rows, columns, targets = (torch.tensor(values, device=device) for values in _positions(sequences))
    sides = [model.states(ids, mask) for model in (policy, reference)]
    chunk = max(1, CHUNK_ELEMENTS // policy.vocabulary)
    found: list[list[torch.Tensor]] = [[], [], []]
    for i in range(0, len(targets), chunk):
        row, column, wanted = (values[i : i + chunk] for values in (rows, columns, targets))
        logits = [head(states[row.to(states.device), column.to(states.device)]).to(device) for states, head in sides]
        p, q = ((side / temperature).log_softmax(dim=-1) for side in logits)
        found[0].append(token_kl(p, q))
        found[1].append(token_log_prob(p, wanted, stop_ids) - token_log_prob(q, wanted, stop_ids))
        if published:
            p, q = (token_log_prob(side.log_softmax(dim=-1), wanted, stop_ids) for side in logits)
            found[2].append(p - q)
    lengths = [len(sequence.response) for sequence in sequences]
    sums = [[part.sum().item() for part in torch.cat(v).double().split(lengths)] for v in found if v]
    return [Score(*values) for values in zip(*sums, strict=True)]


def _pad_right(sequences: list[Sequence], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask [B, T]. The padding's id is 0: no position that counts can see it.

    The last sampled token is only predicted, so it is not read.
    """
    rows = [sequence.prompt + sequence.response[:-1] for sequence in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _positions(sequences: list[Sequence]) -> tuple[list[int], list[int], list[int]]:
    """Return (row, column, target) of every sampled token; the logits of column c predict token c + 1."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for row, sequence in enumerate(sequences):
        first, tokens = len(sequence.prompt) - 1, len(sequence.response)
        found[0].extend([row] * tokens)
        found[1].extend(range(first, first + tokens))
        found[2].extend(sequence.response)
    return found


def batches(sequences: list[Sequence], size: int) -> Iterator[list[int]]:
    """Yield indices of `sequences` in batches of similar length, longest first."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].prompt) - len(sequences[i].response))
    for i in range(0, len(order), size):
        yield order[i : i + size]


def mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None where one value cannot tell."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarize(groups: list[list[tuple[Sequence, Score]]]) -> dict:
    """Return the result over prompts.

    Args:
        groups: for every prompt its responses with their scores. Several responses of a prompt are not independent
            of each other, so they are averaged before the standard error is taken.
    """

    def over_prompts(field: str) -> list[float]:
        return [math.fsum(getattr(score, field) for _, score in group) / len(group) for group in groups]

    everything = [pair for group in groups for pair in group]
    per_prompt = over_prompts("kl")
    kl, stderr = mean_and_stderr(per_prompt)
    log_ratio, log_ratio_stderr = mean_and_stderr(over_prompts("log_ratio"))
    tokens = sum(len(sequence.response) for sequence, _ in everything)
    found = {}
    if everything[0][1].log_ratio_at_one is not None:
        found["published_kl"], found["published_stderr"] = mean_and_stderr(over_prompts("log_ratio_at_one"))
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
        **found,
        "kl_of_prompts": per_prompt,
    }
