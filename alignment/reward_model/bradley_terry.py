"""The Bradley-Terry loss and its trainer: same texts, tokens and padding as annotation uses.

Not trl's RewardTrainer: it pads with the tokenizer's own pad token, which scores the wrong token where that is EOS.
"""

import math

import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from annotate_data.scorer import pad_right
from annotate_data.texts import chat_text, encode
from common.cli import UserError
from common.even_shares import FilledUp


def bradley_terry_losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected) of each pair [B], from rewards [B] and [B]."""
    return -F.logsigmoid(chosen - rejected)


def hits(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """1 for each pair [B] whose chosen answer has the higher reward, 1/2 for a tie, 0 else."""
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def length_matched_accuracy(right: torch.Tensor, shorter: torch.Tensor) -> float | None:
    """Accuracy with pairs weighted so that a rule that knows nothing but length gets 1/2.

    Args:
        right: `hits` of the rewards [B].
        shorter: whether the chosen answer is the shorter one [B]: 1, 0, or 1/2 where both are as long.

    Returns:
        The mean of the accuracies on pairs whose chosen answer is the shorter and the longer one (pairs of equal
        length belong half to each); None where one of them has no pair.
    """
    parts = [(shorter * right).sum() / shorter.sum(), ((1 - shorter) * right).sum() / (1 - shorter).sum()]
    mean = sum(parts).item() / 2
    return None if math.isnan(mean) else mean


def pair_texts(tokenizer, pair: dict) -> tuple[str, str]:
    """What the reward model reads for the chosen and for the rejected answer."""
    user = [{"role": "user", "content": pair["prompt"]}]
    where = f"prompt {pair['prompt'][:60]!r}"
    return chat_text(tokenizer, user, pair["chosen"], where), chat_text(tokenizer, user, pair["rejected"], where)


def pair_tokens(tokenizer, pairs: list[dict]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (chosen, rejected), one per pair."""
    texts = [pair_texts(tokenizer, pair) for pair in pairs]
    sides = [
        encode(tokenizer, [text[i] for text in texts], tokenizer.model_max_length, [pair[name] for pair in pairs])[0]
        for i, name in enumerate(("chosen", "rejected"))
    ]
    return list(zip(*sides, strict=True))


def freeze_all_but_last(model: nn.Module, layers: int) -> None:
    """Freezes everything before the last `layers` layers; final norm, pooler and head stay trainable."""
    total = model.config.get_text_config().num_hidden_layers
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == total)
    if layers > total:
        raise UserError(f"--trainable_layers {layers}: the model has {total} layers")
    first_trained = next(stack[total - layers].parameters())
    # Parameters come in the order of the forward pass: embeddings, layers, final norm or pooler, head.
    for parameter in model.parameters():
        if parameter is first_trained:
            return
        parameter.requires_grad_(False)


class BradleyTerryTrainer(Trainer):
    """A `Trainer` whose data are (chosen, rejected) token lists.

    Every pair of an optimizer step weighs the same, however the step is divided into batches and processes.
    """

    def __init__(self, model, arguments, pairs: list[tuple[list[int], list[int]]]) -> None:
        super().__init__(model, arguments, train_dataset=_Pairs(pairs), data_collator=_columns)
        # compute_loss divides by the pairs of the whole step, so the Trainer must not divide by its batches.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Returns the batches of an optimizer step, and how many pairs they hold in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(float(sum(sum(batch["weights"]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(pairs, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A batch's share of the mean of -log sigmoid(r_chosen - r_rejected) over the step; one forward pass."""
        # Padded here and not in the collator: the padding id is the model's for this batch alone, and batches
        # are fetched ahead.
        config = self.accelerator.unwrap_model(model).config
        padded = pad_right(inputs["chosen"] + inputs["rejected"], config)
        if padded is None:
            raise UserError("a batch uses every id of the vocabulary; use a smaller --batch_size")
        outputs = model(**{name: tensor.to(self.args.device) for name, tensor in padded.items()})
        chosen, rejected = outputs.logits[:, 0].float().chunk(2)
        weights = torch.tensor(inputs["weights"], device=chosen.device)
        # Gradients are averaged over the processes; the mean is over the pairs of all.
        scale = self.accelerator.num_processes / num_items_in_batch
        loss = (bradley_terry_losses(chosen, rejected) * weights).sum() * scale
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        """The Trainer's order, filled up with weightless pairs to equal shares of all processes.

        accelerate would fill it up with pairs that then count twice.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1:
            return sampler
        seeded = SeedableRandomSampler(data_source=sampler.data_source, data_seed=self.args.seed)
        return FilledUp(seeded, self.args.world_size * self.args.per_device_train_batch_size)


class _Pairs(Dataset):
    """(chosen, rejected, weight 1); under negative indices the same pairs with weight 0."""

    def __init__(self, pairs: list[tuple[list[int], list[int]]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[int], list[int], float]:
        return (*self.pairs[index], 1.0) if index >= 0 else (*self.pairs[-1 - index], 0.0)


def _columns(pairs: list[tuple[list[int], list[int], float]]) -> dict[str, list]:
    chosen, rejected, weights = zip(*pairs, strict=True)
    return {"chosen": list(chosen), "rejected": list(rejected), "weights": list(weights)}
