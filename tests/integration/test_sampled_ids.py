"""What is sampled is what is scored and trained: log-probabilities from the engine to the first training step.

The engine's own report while it sampled is compared with plain forward passes over prompt + response_ids of the data
file, and with the logps that a first training step on the same file logs. The tiny model samples ids that no text
encodes to (unknown ones), and ends responses with a second stop token, which generation_config.json lists.
"""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import python
from tiny import save_tiny_policy, tiny_tokenizer

from common.cli import UserError
from common.models import encode_prompt, encode_response, load_causal_lm, load_tokenizer, stop_token_ids
from common.record_stream import read_records
from common.records import write_records

PROMPTS = ["hello there", "a cat", "what is this? please say.", "no", "why, oh why", "zebra", "who", "do it: now!"]
MAX_NEW_TOKENS, SEED = 24, 3
TOLERANCE = 1e-3  # nats per response, float32


def small_policy(folder: Path) -> Path:
    save_tiny_policy(folder / "policy", 0, sharpness=6.0, hidden=64, layers=2, heads=2)
    file = folder / "policy" / "generation_config.json"
    letter = tiny_tokenizer().convert_tokens_to_ids("e")
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, letter]}))
    return folder / "policy"


@pytest.fixture(scope="module", params=["tiny", "135M"])
def policy(request, tmp_path_factory):
    """(folder of a policy, the template that its prompts take)."""
    if request.param == "tiny":
        return small_policy(tmp_path_factory.mktemp("tiny")), "none"
    return request.getfixturevalue("assets") / "policy", "chat"


@pytest.fixture(scope="module", params=["vllm", "hf"])
def sampled(request, policy, tmp_path_factory):
    """(policy, the data file that generate.py wrote, what the same engine reports: [prompt][response] → log pi)."""
    (name, template), folder, backend = policy, tmp_path_factory.mktemp("sampled"), request.param
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    result = python(
        "generation/generate.py",
        *("--model_name_or_path", name, "--dataset_name_or_path", folder / "prompts.jsonl", "--template", template),
        *("--sampler", "online", "--temperature", 1, "--max_new_tokens", MAX_NEW_TOKENS, "--seed", SEED),
        *("--dtype", "float32", "--backend", backend, "--output_file", folder / "data.json"),
    )
    assert result.returncode == 0, result.stderr
    report = folder / "report.json"
    report_of = python(__file__, backend, name, folder / "data.json", report, PYTHONPATH=os.pathsep.join(sys.path))
    assert report_of.returncode == 0, report_of.stderr
    return name, folder / "data.json", json.loads(report.read_text())


def plan_of(file: Path, tokenizer):
    """The requests of generate.py, made anew from the prompts that it wrote."""
    from array import array

    from bandit.mixtures import MIXTURES
    from generation.prompts import Prompt
    from generation.sampling import Plan

    instances, _ = read_records(file)
    prompts = [Prompt("", i["prompt"], array("I", encode_prompt(tokenizer, i["prompt"])), "") for i in instances]
    return list(Plan(prompts, 0, MIXTURES["online"].pairs(0.1), 2, SEED).requests({}))


def vllm_reports(policy: str, requests: list, stop: list[int]) -> list[tuple[list[int], float]]:
    """(ids, sum of the log-probabilities that vLLM gives with them) of each request."""
    from generation.backend_vllm import VLLMGenerator

    engine = VLLMGenerator(policy, None, dtype="float32", max_length=256)
    from vllm import SamplingParams

    outputs = engine.llm.generate(
        [{"prompt_token_ids": request.prompt_ids} for request in requests],
        [
            SamplingParams(
                temperature=1.0,
                seed=r.seed,
                logprobs=0,
                max_tokens=MAX_NEW_TOKENS,
                stop_token_ids=stop,
                detokenize=False,
            )
            for r in requests
        ],
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    return [(list(answer.token_ids), answer.cumulative_logprob) for answer in answers]


def hf_reports(policy: str, requests: list, stop: list[int]) -> list[tuple[list[int], float]]:
    """The same of the transformers back end, from the logits that it draws each token from."""
    from generation import backend_hf
    from generation.sampling import Sampling

    found, draw, steps = [], backend_hf.sample, []

    def recorded(logits, temperature, generators):
        tokens = draw(logits, temperature, generators)
        steps.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        return tokens

    backend_hf.sample = recorded
    generator = backend_hf.HFGenerator(policy, None, "float32", max_num_seqs=len(requests))
    for row, response in enumerate(generator.generate(requests, Sampling(1.0, MAX_NEW_TOKENS, stop))):
        found.append((response.token_ids, math.fsum(step[row].item() for step in steps[: len(response.token_ids)])))
    return found


def forward_passes(policy: str, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """log pi of each response after its prompt: one pass each, no cache, no padding."""
    model = load_causal_lm(policy, "policy", "float32")
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).double().sum().item())
    return sums


def test_the_engine_reports_what_forward_passes_over_the_files_ids_give(sampled):
    policy, file, reported = sampled
    instances, settings = read_records(file, ("response_ids", "stop_reasons"))
    tokenizer = load_tokenizer(str(policy), "policy")
    ids = [ids for instance in instances for ids in instance["response_ids"]]
    assert [found for found, _ in reported] == ids
    prompts = [encode_prompt(tokenizer, instance["prompt"]) for instance in instances for _ in range(2)]
    exact = forward_passes(str(policy), prompts, ids)
    assert [value for _, value in reported] == pytest.approx(exact, abs=TOLERANCE)
    if policy.parent.name != "assets":  # that the cases of which this is about are there
        texts = [text for instance in instances for text in instance["responses"]]
        ended = [reason == "stop" for instance in instances for reason in instance["stop_reasons"]]
        again = [encode_response(tokenizer, text, end) for text, end in zip(texts, ended, strict=True)]
        assert sum(a != b for a, b in zip(again, ids, strict=True)) >= 4
        assert {i[-1] for i, end in zip(ids, ended, strict=True) if end} == set(
            stop_token_ids(tokenizer, str(policy))
        )


def test_a_first_training_step_sees_the_same_log_probabilities(sampled, tmp_path):
    policy, file, reported = sampled
    instances, settings = read_records(file, ("response_ids",))
    chosen = [index % 2 for index in range(len(instances))]
    scored = [{**i, "rewards": [float(k == best) for k in (0, 1)]} for i, best in zip(instances, chosen, strict=True)]
    write_records(tmp_path / "data.json", scored, settings)
    result = python(
        "dpo_iteration/run_dpo.py",
        *("--model_name_or_path", policy, "--ref_model", policy, "--train_file", tmp_path / "data.json"),
        *("--output_dir", tmp_path / "out", "--max_length", 256, "--max_prompt_length", 128, "--use_cpu", True),
        *("--per_device_train_batch_size", len(instances), "--gradient_accumulation_steps", 1, "--max_steps", 1),
        *("--logging_steps", 1, "--save_strategy", "no", "--learning_rate", 0, "--bf16", False),
    )
    assert result.returncode == 0, result.stderr
    [first, *_] = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    values = [value for _, value in reported]
    for name, sides in (("chosen", chosen), ("rejected", [1 - side for side in chosen])):
        mean = math.fsum(values[2 * index + side] for index, side in enumerate(sides)) / len(sides)
        assert first[f"logps/{name}"] == pytest.approx(mean, abs=TOLERANCE)


def test_a_model_and_what_is_trained_from_it_stop_at_the_same_ids(tmp_path):
    """Without generation_config.json its config.json lists them, which transformers then saves with its weights."""
    save_tiny_policy(tmp_path / "base", 0)
    config, generation = (tmp_path / "base" / f"{name}config.json" for name in ("", "generation_"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [2, 7, 13]}))
    generation.unlink()
    load_causal_lm(str(tmp_path / "base"), "policy", "float32").save_pretrained(tmp_path / "trained")
    for folder in ("base", "trained"):
        assert stop_token_ids(tiny_tokenizer(), str(tmp_path / folder)) == [2, 7, 13], folder
    generation.write_text("{")
    with pytest.raises(UserError, match="generation_config"):
        stop_token_ids(tiny_tokenizer(), str(tmp_path / "base"))


def main() -> None:
    """Write the engine's report, in a process of its own: one engine per process."""
    backend, policy, file, report = sys.argv[1:]
    tokenizer = load_tokenizer(policy, "policy")
    reports = {"vllm": vllm_reports, "hf": hf_reports}[backend]
    found = reports(policy, plan_of(Path(file), tokenizer), stop_token_ids(tokenizer, policy))
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
