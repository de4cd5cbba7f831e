"""Small data files, command lines of `run_dpo.py`, and an oracle for its losses.

The oracle knows nothing of batches, padding or chunks: one sequence at a time through `transformers`.
"""

import json
import math
import random
from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.models import encode_response, tokenizer_fingerprint
from dpo_iteration import run_dpo

BETA, SCALE = 0.1, 4.0


def text(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("abcdefgh .") for _ in range(rng.randint(low, high)))


def make_instances(seed: int = 0, rows: int = 4) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "prompt": text(rng, 3, 20),
            "responses": [text(rng, 2, 14) for _ in range(3)],
            "rewards": [rng.gauss(0, 0.3) for _ in range(3)],
            "stop_reasons": [rng.choice(["stop", "length"]) for _ in range(3)],
        }
        for _ in range(rows)
    ]


def write_data(path: Path, instances: list[dict]) -> Path:
    path.write_text(json.dumps({"type": "text_only", "instances": instances}))
    return path


def flags(models, data: Path, output: Path, **more) -> list[str]:
    """A command line; `more` overrides, and a value of None leaves a flag out."""
    options = {
        "model_name_or_path": models[0],
        "ref_model": models[1],
        "train_file": data,
        "output_dir": output,
        "margin_scale": SCALE,
        "beta": BETA,
        "max_length": 64,
        "max_prompt_length": 32,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    options.update(more)
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def train(*arguments, **more) -> list[float]:
    """Runs the script's main and returns the logged losses."""
    run_dpo.main(flags(*arguments, **more))
    return losses(arguments[2])


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def logp(model, tokenizer, prompt: str, response: str, ended: bool) -> float:
    """Sum of log pi(token | all before), one sequence, no padding."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [2] * ended
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].double()
    table = logits.log_softmax(-1)
    return sum(table[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(response_ids))


def expected_loss(models, instances: list[dict], scale: float = SCALE) -> float:
    """Mean rev_kl over max_min pairs, from scratch."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    policy, ref = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in models)
    total = 0.0
    for instance in instances:
        rewards = instance["rewards"]
        h = 0.0
        for sign, i in ((1, rewards.index(max(rewards))), (-1, rewards.index(min(rewards)))):
            ended = instance["stop_reasons"][i] == "stop"
            sample = tokenizer, instance["prompt"], instance["responses"][i], ended
            h += sign * (logp(policy, *sample) - logp(ref, *sample))
        p = 1 / (1 + math.exp(-scale * (max(rewards) - min(rewards))))
        q = 1 / (1 + math.exp(-BETA * h))
        total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    return total / len(instances)


# --- Data files with the ids that were sampled -------------------------------------------------------------------

TURN = 35  # the last id of the tiny vocabulary, here a second stop token


def sampled_instances(rows: int = 4) -> list[dict]:
    """Instances whose ids are not what their texts encode to: control tokens, a second stop token, cut ends."""
    tokenizer, instances = tiny_tokenizer(), make_instances(rows=rows)
    for instance in instances:
        ids = [encode_response(tokenizer, text, False) for text in instance["responses"]]
        ids[0] = [*ids[0], 3, *ids[0], TURN]  # an unknown token in the middle, then the second stop token
        ids[1] = [*ids[1], 2]
        instance["response_ids"] = ids
        instance["stop_reasons"] = ["stop", "stop", "length"]
        instance["num_tokens"] = [len(one) for one in ids]
    return instances


def write_sampled(path: Path, instances: list[dict], fingerprint: str | None = None) -> Path:
    made_with = fingerprint or tokenizer_fingerprint(tiny_tokenizer())
    content = {"instances": instances, "settings": {"generate": {"tokenizer": made_with}}}
    path.write_text(json.dumps(content))
    return path
