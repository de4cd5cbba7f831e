"""Generation with transformers: policy, second model and any others run in step, each with its KV cache.

Slower than vLLM and simple enough to be read in a minute: the oracle in the tests, and the way where vLLM is absent.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from common.models import default_device, give_memory_back, load_causal_lm
from generation.sampling import Request, Response, Sampling


class HFGenerator:
    """Samples responses with one, two or more transformers models.

    Args:
        policy, second: model folders or names; None for one that no request needs.
        others: further models; a request has one weight per model: policy, second, others.
        dtype: float32 or bfloat16.
        max_num_seqs: how many responses are sampled at a time.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        policy: str | None,
        second: str | None,
        dtype: str,
        max_num_seqs: int = 20,
        trust_remote_code: bool = False,
        others: Sequence[str | None] = (),
    ) -> None:
        self.device = default_device()
        self.models = [
            name and load_causal_lm(name, what, dtype, trust_remote_code).to(self.device)
            for name, what in ((policy, "policy"), (second, "second model"), *((name, "model") for name in others))
        ]
        self.batch_size = max_num_seqs

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Response]:
        """Yield the responses of one batch after the other."""
        waiting = iter(requests)
        while batch := list(itertools.islice(waiting, self.batch_size)):
            yield from self._generate_batch(batch, sampling)

    def close(self) -> None:
        """Give the models' memory back."""
        self.models = None
        give_memory_back()

    @torch.inference_mode()
    def _generate_batch(self, batch: list[Request], sampling: Sampling) -> list[Response]:
        ids, mask = left_pad([request.prompt_ids for request in batch], self.device)
        weights = torch.tensor([request.weights for request in batch], device=self.device)
        generators = [torch.Generator(self.device).manual_seed(request.seed) for request in batch]
        caches = [None] * len(self.models)
        sampled: list[list[int]] = [[] for _ in batch]
        stopped = [False] * len(batch)
        stop = set(sampling.stop_token_ids)
        for _ in range(sampling.max_new_tokens):
            logits = self._mixed_logits(ids, mask, weights, caches)
            tokens = sample(logits, sampling.temperature, generators)
            for row, token in enumerate(tokens.tolist()):
                if not stopped[row]:
                    sampled[row].append(token)
                    stopped[row] = token in stop
            if all(stopped):
                break
            ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
        reasons = ["stop" if ended else "length" for ended in stopped]
        return [Response(request.key, *rest) for request, *rest in zip(batch, sampled, reasons, strict=True)]

    def _mixed_logits(
        self, ids: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor, caches: list
    ) -> torch.Tensor:
        """Return the models' weighted logits of the next token, float32 [batch, vocabulary]; updates `caches`."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        each = []
        for side, model in enumerate(self.models):
            if model is None:
                continue
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=caches[side],
                use_cache=True,
                logits_to_keep=1,
            )
            caches[side] = output.past_key_values
            each.append(weights[:, side, None] * output.logits[:, -1].float())
        narrowest = min(logits.shape[-1] for logits in each)  # ids that not every model knows belong to no token
        return sum(logits[:, :narrowest] for logits in each)


def left_pad(sequences: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both [batch, longest]; the pad id is 0, which the mask hides."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences], device=device)
    return ids, mask


def sample(logits: torch.Tensor, temperature: float, generators: list[torch.Generator]) -> torch.Tensor:
    """Draw one token per row from softmax(logits / temperature), each with its own generator; argmax at 0.

    Dividing the probabilities by exponential noise and taking the largest is a draw from them (Gumbel-max).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    noise = torch.stack([torch.empty_like(probabilities[0]).exponential_(generator=g) for g in generators])
    return (probabilities / noise).argmax(dim=-1)
