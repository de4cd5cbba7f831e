"""One optimizer step of reward training by plain gradient descent (rate 0.5), in one process or several.

Reads   argv: a model's folder, a file of pairs; 12 slots of which as many hold a pair as there are pairs.
Writes  argv: the weights after the step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "alignment"))

from common.models import load_reward_model, load_tokenizer  # isort: skip (before torch)

import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from reward_model.bradley_terry import BradleyTerryTrainer, pair_tokens
from reward_model.preference_data import read_pairs

folder, data, output = sys.argv[1:]
torch.manual_seed(0)
model = load_reward_model(folder, "float32", needs_head=False, num_labels=1)
tokenizer = load_tokenizer(folder, "model")
tokenizer.model_max_length = 200
arguments = TrainingArguments(
    output_dir=output + ".trainer",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=3,
    num_train_epochs=1,
    max_grad_norm=0,
    optim="sgd",
    learning_rate=0.5,
    lr_scheduler_type="constant",
    use_cpu=True,
    ddp_backend="gloo",
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
    disable_tqdm=True,
)
trainer = BradleyTerryTrainer(model, arguments, pair_tokens(tokenizer, read_pairs(data)))
trainer.train()
assert trainer.state.global_step == 1
if trainer.is_world_process_zero():
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, output)
