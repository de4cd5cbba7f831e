"""LoRA on the quickstart's model, all three stages: vLLM on the merged folder gives what base + adapter gives."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import python
from peft import PeftModel

from common.models import encode_prompt, load_causal_lm, load_tokenizer, stop_token_ids
from common.record_stream import read_records

PROMPTS = ["What is a cat?", "Name a colour.", "Why is the sky blue?", "Write one word."]
MAX_NEW_TOKENS = 8
TOLERANCE = 1e-3  # nats per response, float32


def three_stages(policy: Path, folder: Path) -> None:
    """Generate, annotate and train an adapter, as a user starts them."""
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "r.py").write_text(
        "def score(prompt, responses, fields):\n    return [(sum(map(ord, r)) % 97) / 97 for r in responses]\n"
    )
    stages = [
        ("generation/generate.py", "--model_name_or_path", policy, "--dataset_name_or_path", folder / "p.jsonl",
         "--template", "chat", "--sampler", "online", "--temperature", 1, "--max_new_tokens", MAX_NEW_TOKENS,
         "--dtype", "float32", "--backend", "vllm", "--output_file", folder / "gen.json"),
        ("annotate_data/get_rewards.py", "--dataset_name_or_path", folder / "gen.json", "--reward_function",
         f"{folder / 'r.py'}:score", "--output_file", folder / "rewards.json"),
        ("dpo_iteration/run_dpo.py", "--model_name_or_path", policy, "--ref_model", policy, "--train_file",
         folder / "rewards.json", "--output_dir", folder / "out", "--use_lora", True, "--learning_rate", 1e-3,
         "--max_steps", 4, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
         "--max_length", 128, "--max_prompt_length", 100, "--use_cpu", True, "--bf16", False,
         "--save_strategy", "no"),
    ]  # fmt: skip
    for script, *words in stages:
        result = python(script, *words)
        assert result.returncode == 0, result.stderr[-3000:]


def greedy(model, prompt: list[int], stop: list[int]) -> list[int]:
    """The likeliest token each time, one whole pass per token."""
    ids = []
    while len(ids) < MAX_NEW_TOKENS and not (ids and ids[-1] in stop):
        with torch.no_grad():
            ids.append(model(torch.tensor([prompt + ids])).logits[0, -1].argmax().item())
    return ids


def log_probability(model, prompt: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).double().sum().item()


def test_vllm_on_the_merged_model_is_base_and_adapter(assets, tmp_path):
    policy = assets / "policy"
    three_stages(policy, tmp_path)
    tokenizer = load_tokenizer(str(policy), "policy")
    prompts = [encode_prompt(tokenizer, i["prompt"]) for i in read_records(tmp_path / "gen.json")[0]]
    stop = stop_token_ids(tokenizer, str(policy))
    (tmp_path / "ask.json").write_text(json.dumps([prompts, stop]))
    words = [tmp_path / "out", tmp_path / "ask.json", tmp_path / "report.json"]
    done = python(__file__, *words, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    base = load_causal_lm(str(policy), "policy", "float32").eval()
    before = [log_probability(base, prompt, ids) for prompt, (ids, _) in zip(prompts, found, strict=True)]
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert [ids for ids, _ in found] == [greedy(adapted, prompt, stop) for prompt in prompts]
    after = [log_probability(adapted, prompt, ids) for prompt, (ids, _) in zip(prompts, found, strict=True)]
    assert [value for _, value in found] == pytest.approx(after, abs=TOLERANCE)
    assert min(abs(a - b) for a, b in zip(after, before, strict=True)) > 20 * TOLERANCE


def main() -> None:
    """Write vLLM's greedy responses and their log-probabilities, in a process of its own."""
    from generation.backend_vllm import VLLMGenerator

    policy, ask, report = sys.argv[1:]
    engine = VLLMGenerator(policy, None, dtype="float32", max_length=256)
    from vllm import SamplingParams

    prompts, stop = json.loads(Path(ask).read_text())
    sampling = SamplingParams(
        temperature=0, logprobs=0, max_tokens=MAX_NEW_TOKENS, stop_token_ids=stop, detokenize=False
    )
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    Path(report).write_text(json.dumps([(list(a.token_ids), a.cumulative_logprob) for a in answers]))


if __name__ == "__main__":
    main()
