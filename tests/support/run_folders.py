"""Run folders made of numbers: the files that evaluation reads, without a model behind them."""

import math

import numpy as np

from common.records import write_json, write_records
from evaluation.run_files import TEST, kl_file, scored_file


def write_answers(run_dir, model, rewards, part=TEST, judge="rewards", cut=False, sha=None, **changes):
    """Write scored responses of a model, one per prompt.

    `changes`: `prompts` and `responses` (lists), `template`, `temperature`, `dtype`. `sha`: of the unscored file.
    """
    prompts = changes.get("prompts") or [f"prompt {i}" for i in range(len(rewards))]
    responses = changes.get("responses") or [f"{model.title} says {i}" for i in range(len(rewards))]
    instances = [
        {
            "prompt": prompts[i],
            "responses": [responses[i]],
            "rewards": [float(reward)],
            "stop_reasons": ["length" if cut else "stop"],
            "num_tokens": [10 + i],
        }
        for i, reward in enumerate(rewards)
    ]
    path = scored_file(run_dir, judge, part, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    generate = {"policy": model.title, "temperature": changes.get("temperature", 0.1), "dtype": changes.get("dtype")}
    annotate = {"dataset_sha256": sha or model.title, "reward_template": changes.get("template", "none")}
    write_records(path, instances, {"generate": generate, "annotate": annotate | {"reward_name_or_path": judge}})


def write_kl(run_dir, model, values, temperature=0.7, per_token=0.05, sha=None, **more):
    """Write the KL of a model, one value per prompt."""
    path = kl_file(run_dir, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model_name_or_path": model.title, "temperature": temperature}
    settings |= {"responses_sha256": sha} if sha else {}
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    result = {"kl": float(np.mean(values)), "stderr": stderr, "kl_per_token": per_token, **more}
    write_json(path, result | {"kl_of_prompts": list(values), "settings": {"kl": settings}})
