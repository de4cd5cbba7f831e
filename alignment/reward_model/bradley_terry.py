"""The Bradley-Terry loss and its trainer: same texts, tokens and padding as annotation uses.

Not trl's RewardTrainer: it pads with the tokenizer's own pad token, which scores the wrong token where that is EOS.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from annotate_data.scorer import pad_right
from annotate_data.texts import chat_text, encode
from common.cli import UserError


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(r_chosen - r_rejected) over a batch of rewards [B] and [B]."""
    return -F.logsigmoid(chosen - rejected).mean()


def accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Share of pairs [B] whose chosen answer has the higher reward; ties count half."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def pair_texts(tokenizer, pair: dict) -> tuple[str, str]:
    """What the reward model reads for the chosen and for the rejected answer."""
    user = [{"role": "user", "content": pair["prompt"]}]
    where = f"prompt {pair['prompt'][:60]!r}"
    return chat_text(tokenizer, user, pair["chosen"], where), chat_text(tokenizer, user, pair["rejected"], where)


def pair_tokens(tokenizer, pairs: list[dict]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (chosen, rejected), one a pair."""
    chosen, rejected = zip(*(pair_texts(tokenizer, pair) for pair in pairs), strict=True)
    limit = tokenizer.model_max_length
    return list(zip(encode(tokenizer, chosen, limit)[0], encode(tokenizer, rejected, limit)[0], strict=True))


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
    """A `Trainer` whose data are (chosen, rejected) token lists."""

    def __init__(self, model, arguments, train_dataset) -> None:
        super().__init__(model, arguments, train_dataset=train_dataset, data_collator=_columns)
        # The loss is a mean over the batch, so the trainer has to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """-log sigmoid(r_chosen - r_rejected) of one batch, both answers in one forward pass."""
        # Padded here and not in the collator: the padding id is the model's for this batch alone, and batches
        # are fetched ahead.
        config = self.accelerator.unwrap_model(model).config
        padded = pad_right(inputs["chosen"] + inputs["rejected"], config)
        if padded is None:
            raise UserError("a batch uses every id of the vocabulary; use a smaller --batch_size")
        outputs = model(**{name: tensor.to(self.args.device) for name, tensor in padded.items()})
        chosen, rejected = outputs.logits[:, 0].float().chunk(2)
        loss = bradley_terry_loss(chosen, rejected)
        return (loss, outputs) if return_outputs else loss


def _columns(pairs: list[tuple[list[int], list[int]]]) -> dict[str, list[list[int]]]:
    chosen, rejected = zip(*pairs, strict=True)
    return {"chosen": list(chosen), "rejected": list(rejected)}
