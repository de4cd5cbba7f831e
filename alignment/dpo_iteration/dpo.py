"""The trainer: losses.py on the log-probabilities that logps.py computes."""

import math
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import Trainer

from common.cli import UserError
from common.even_shares import FilledUp
from dpo_iteration.logps import SEQUENCES, forms_agree
from dpo_iteration.losses import preference_loss
from dpo_iteration.rows import PaddedRows


class DPOTrainer(Trainer):
    """`transformers.Trainer` on rows that carry margins and reference log-probabilities: there is no reference model.

    Every pair of an optimizer step weighs the same, however the step is divided into micro-batches and processes.

    Args:
        beta, loss_type: see `preference_loss`.
        share: whether prefixes are shared (logps.py), as far as the first pair bears it out.
        options: as for `Trainer`; `model` comes from `as_scorer`, batches from `rows.collate`.
    """

    # compute_loss divides by the pairs of the whole step, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        beta: float,
        loss_type: str,
        share: bool,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
        **options: object,
    ) -> None:
        held_out = None if eval_dataset is None else PaddedRows(eval_dataset)
        super().__init__(train_dataset=PaddedRows(train_dataset), eval_dataset=held_out, **options)
        self.beta, self.loss_type = beta, loss_type
        self.share = None if share else False  # None: not decided yet
        self._sums: dict[str, dict[str, Tensor]] = {"": {}, "eval_": {}}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Return the micro-batches of an optimizer step, and how many pairs they hold in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = sum((batch["weight"].sum() for batch in batches), torch.zeros(())).to(device)
        return batches, self.accelerator.reduce(pairs, "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the loss of a batch: its share of the mean over a step's pairs, or, without them, its own mean.

        Chosen and rejected responses share one forward pass.
        """
        if self.share is None:
            first = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
            self.share = forms_agree(model, first)
        sequences = {name: inputs[name] for name in SEQUENCES}
        chosen, rejected = model(**sequences, share=self.share).chunk(2)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        losses, metrics = preference_loss(chosen, rejected, *reference, inputs["margin"], self.beta, self.loss_type)
        weight = inputs["weight"]
        if model.training:
            self._add(metrics, weight, "")
        else:  # the Trainer's own mean would be one over batches, whatever they weigh
            self._add({**metrics, "loss": losses.detach()}, weight, "eval_")
        # Gradients are averaged over the processes; the mean is over all of their pairs.
        scale = (
            1 / weight.sum().clamp(min=1)  # a batch may only fill up
            if num_items_in_batch is None
            else self.accelerator.num_processes / num_items_in_batch
        )
        loss = (losses * weight).sum() * scale
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of an evaluation batch; nothing else is kept."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _get_train_sampler(self, train_dataset: PaddedRows | None = None) -> Sampler:
        """Return the Trainer's own order, filled up with weightless rows to equal shares of all processes.

        accelerate would fill them up with real pairs, which would then count twice.
        """
        sampler = super()._get_train_sampler((train_dataset or self.train_dataset).rows)
        together = self.args.world_size * self.args.per_device_train_batch_size
        if self.args.world_size == 1 or self.args.dataloader_drop_last or len(sampler) % together == 0:
            return sampler
        if isinstance(sampler, RandomSampler):  # as accelerate does where it finds one
            sampler = SeedableRandomSampler(data_source=sampler.data_source, data_seed=self.args.data_seed)
        return FilledUp(sampler, together)

    def _get_eval_sampler(self, eval_dataset: PaddedRows) -> Sampler:
        """Return the held-out rows in their order, filled up as those of training are."""
        if self.args.world_size == 1:
            return SequentialSampler(eval_dataset)
        return FilledUp(SequentialSampler(eval_dataset), self.args.world_size * self.args.eval_batch_size)

    def _add(self, metrics: dict[str, Tensor], weight: Tensor, prefix: str) -> None:
        sums = self._sums[prefix]
        for name, values in {**metrics, "pairs": torch.ones_like(weight)}.items():
            sums[name] = sums.get(name, 0.0) + (values * weight).double().sum()

    def _means(self, prefix: str) -> dict[str, float]:
        """Return means over all pairs of all processes since the last call."""
        sums, self._sums[prefix] = self._sums[prefix], {}
        if not sums:
            return {}
        total = self.accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
        by_name = dict(zip(sums, total, strict=True))
        pairs = by_name.pop("pairs")
        return {prefix + name: value / pairs for name, value in by_name.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means to what is logged; stop at a loss that is not a number."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"step {self.state.global_step}: the loss is {logs['loss']}; try a lower --learning_rate"
                )
            logs.update(self._means(""))
        elif "eval_loss" in logs:
            logs.update(self._means("eval_"))
        super().log(logs, start_time)
