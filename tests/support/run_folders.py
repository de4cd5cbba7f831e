"""Run folders made of numbers: the files that evaluation reads, without a model behind them."""

import math

import numpy as np

from common.records import write_json, write_records
from evaluation.run_files import answers_file, kl_file


def write_answers(run_dir, model, rewards, part="test", judge="reward", template="none", cut=False, prompts=None):
    """Scored responses of a model, one a prompt."""
    instances = [
        {
            "prompt": prompts[i] if prompts else f"prompt {i}",
            "responses": [f"{model.title} says {i}"],
            "rewards": [float(reward)],
            "stop_reasons": ["length" if cut else "stop"],
            "num_tokens": [10 + i],
        }
        for i, reward in enumerate(rewards)
    ]
    path = answers_file(run_dir, judge, part, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    generate = {"policy": model.title, "temperature": 0.1}
    annotate = {"dataset_sha256": model.title, "reward_template": template, "reward_name_or_path": judge}
    write_records(path, instances, {"generate": generate, "annotate": annotate})


def write_kl(run_dir, model, values, temperature=0.7):
    """The KL of a model, one value a prompt."""
    path = kl_file(run_dir, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"kl": {"model_name_or_path": model.title, "temperature": temperature}}
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    write_json(path, {"kl": float(np.mean(values)), "stderr": stderr, "kl_of_prompts": values, "settings": settings})
