"""generate.py through its real command line: the contract, resuming; wrong input is in test_bad_input.py."""

import itertools
import json

import mixture_loop
import pytest
import torch
from commands import engine_starts, python
from tiny import CHARACTERS, save_tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from common.journal import Journal, journal_path
from common.models import load_causal_lm
from common.record_stream import read_records
from generation.prompts import text_digest

PROMPTS = ["hello there", "a cat", "what is this? please say.", "no", "why, oh why", "zebra"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a policy, a reference (another shape) and prompts."""
    folder = tmp_path_factory.mktemp("generate")
    save_tiny_policy(folder / "policy", 0, hidden=64, layers=2, heads=2)
    save_tiny_policy(folder / "reference", 1, hidden=128, layers=1, heads=2)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return folder


def generate(place, output, *more, backend="hf", sampler=("--sampler", "mixp")):
    return python(
        "generation/generate.py",
        *("--model_name_or_path", place / "policy", "--ref_model_name_or_path", place / "reference"),
        *("--dataset_name_or_path", place / "prompts.jsonl", *sampler),
        *("--temperature", 1.0, "--max_new_tokens", 8, "--max_input_length", 40, "--seed", 5),
        *("--output_file", output, "--backend", backend, *more),
    )


def one_line_error(result, *parts):
    """Exit code 2 and one line on standard error that holds `parts`; no stack trace."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def finished(place):
    result = generate(place, place / "vllm.json", "--K", 4, backend="vllm")
    assert result.returncode == 0, result.stderr
    return place / "vllm.json"


def test_output_is_the_contract(place, finished):
    instances, settings = read_records(finished, ("responses", "pairs", "stop_reasons", "num_tokens"))
    assert [i["prompt"] for i in instances] == PROMPTS
    assert all(len(i["responses"]) == 4 and set(i["stop_reasons"]) <= {"stop", "length"} for i in instances)
    assert all(n <= 8 for i in instances for n in i["num_tokens"])
    assert all([len(ids) for ids in i["response_ids"]] == i["num_tokens"] for i in instances)
    made = settings["generate"]
    assert (made["K"], made["temperature"], made["seed"], made["backend"]) == (4, 1.0, 5, "vllm")
    assert made["sampler"] == [[1.0, [1.5, -0.5], [0.5, 0.5]]]
    assert not journal_path(finished).exists()


def test_second_run_does_nothing_and_other_settings_are_refused(place, finished):
    before = finished.read_bytes()
    again = generate(place, finished, "--K", 4, backend="vllm")
    assert again.returncode == 0 and "already complete" in again.stdout
    one_line_error(generate(place, finished, "--K", 2, backend="vllm"), "K=4", "K=2")
    assert finished.read_bytes() == before


def test_continuing_gives_the_same_file(place, finished, tmp_path):
    """A journal with some of the responses, as a kill leaves it, in an order that a kill may leave."""
    instances, settings = read_records(finished)
    output = tmp_path / "out.json"
    begun = Journal(output, settings["generate"])
    for index, j in [(4, 1), (0, 0), (0, 3), (2, 2), (5, 0)]:
        instance = instances[index]
        row = {"text": instance["responses"][j], "ids": instance["response_ids"][j]}
        row |= {"stop_reason": instance["stop_reasons"][j], "prompt": text_digest(instance["prompt"])}
        begun.add(f"{index}.{j}", row)
    begun.close(done=False)
    with open(journal_path(output), "a") as file:
        file.write('{"crc32": "0", "key": "1.1", "row": {"te')
    result = generate(place, output, "--K", 4, backend="vllm")
    assert result.returncode == 0, result.stderr
    assert output.read_bytes() == finished.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_slices_are_parts_of_the_whole_and_policy_alone_equals_its_side_of_gshf(place, tmp_path):
    """(1, 0) in the mixture engine against an engine of the policy alone, same seeds."""
    both = generate(place, tmp_path / "gshf.json", backend="vllm", sampler=("--sampler", "gshf"))
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    alone = python(
        "generation/generate.py",
        *("--model_name_or_path", place / "policy", "--dataset_name_or_path", place / "prompts.jsonl"),
        *("--sampler", "online", "--temperature", 1.0, "--max_new_tokens", 8, "--max_input_length", 40),
        *("--seed", 5, "--start", 0, 2, "--end", 2, 6, "--output_file", *parts),
    )
    assert (both.returncode, alone.returncode) == (0, 0), both.stderr + alone.stderr
    gshf, _ = read_records(tmp_path / "gshf.json")
    online = read_records(parts[0])[0] + read_records(parts[1])[0]
    assert [i["prompt"] for i in online] == PROMPTS
    assert [i["responses"][1] for i in gshf] == [i["responses"][1] for i in online]
    assert [i["responses"][0] for i in gshf] != [i["responses"][0] for i in online]


def test_command_lines_in_turn_write_what_each_writes_alone(place, tmp_path):
    """Four command lines with two engines, one of two models and one of a single model; then a wrong one."""
    save_tiny_policy(tmp_path / "other", 2, hidden=64, layers=2, heads=2)  # of the policy's shape
    save_tiny_policy(tmp_path / "like_reference", 3, hidden=128, layers=1, heads=2)
    runs = {  # sampler and policy
        "mixture": ("mixp", place / "policy"),
        "other_mixture": ("mixp", tmp_path / "other"),
        "reference": ("offline", place / "policy"),
        "single": ("online", tmp_path / "like_reference"),
    }

    def flags(output, sampler, policy):
        return (
            *("--model_name_or_path", policy, "--ref_model_name_or_path", place / "reference"),
            *("--dataset_name_or_path", place / "prompts.jsonl", "--sampler", sampler, "--K", 4),
            *("--temperature", 1.0, "--max_new_tokens", 8, "--max_input_length", 40, "--seed", 5),
            *("--output_file", output),
        )

    def generate(*command_lines):
        words = [word for line in command_lines for word in ("--then", *line)][1:]
        return python("generation/generate.py", *words, VLLM_LOGGING_LEVEL="INFO")

    turns = {name: tmp_path / f"{name}_in_turn.json" for name in runs}
    in_turn = [flags(turns[name], *runs[name]) for name in runs]
    result = generate(*in_turn, (*in_turn[0], "--K", 0))
    assert result.returncode == 2 and "--K" in result.stderr.splitlines()[-1]
    assert not any(file.exists() for file in turns.values())  # found before the first command line's turn
    result = generate(*in_turn, flags(tmp_path, *runs["mixture"]))
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"generate.py: error: {tmp_path}")
    assert engine_starts(result) == 2
    for name, run in runs.items():
        alone = tmp_path / f"{name}.json"
        assert engine_starts(generate(flags(alone, *run))) == 1
        assert alone.read_bytes() == turns[name].read_bytes()
    texts = [[i["responses"] for i in read_records(file)[0]] for file in turns.values()]
    assert all(a != b for a, b in itertools.combinations(texts, 2))


def test_three_models_of_unlike_shape_and_width_by_both_back_ends(place, tmp_path):
    """A row that weighs policy, reference and previous policy; the last gives logits for ids that are no tokens."""
    previous = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path / "previous", 2, hidden=96, heads=3))
    previous.resize_token_embeddings(previous.config.vocab_size + 5)
    previous.save_pretrained(tmp_path / "previous")
    models, tokenizer = [place / "policy", place / "reference", tmp_path / "previous"], tiny_tokenizer()
    weights = [(1.5, -0.25, -0.25), (0.5, 0.25, 0.25)]
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [[mixture_loop.greedy(models, prompt, side, 8) for side in weights] for prompt in ids]
    for backend in ("vllm", "hf"):
        output, flags = tmp_path / f"{backend}.json", ("--previous_model_name_or_path", models[2])
        result = generate(
            place, output, *flags, "--temperature", 0, backend=backend, sampler=("--sampler", "history-mixp")
        )
        assert result.returncode == 0, result.stderr
        instances, settings = read_records(output)
        assert [i["response_ids"] for i in instances] == expected
        made = settings["generate"]
        assert [made[what] for what in ("policy", "reference", "previous")] == list(map(str, models))
        assert made["sampler"] == [[1.0, *map(list, weights)]]
        # The same as a table of one's own: the finished file is recognized.
        pairs = ("--pairs", json.dumps(made["sampler"]))
        again = generate(place, output, *flags, "--temperature", 0, backend=backend, sampler=pairs)
        assert again.returncode == 0 and "already complete" in again.stdout
    assert read_records(tmp_path / "vllm.json")[0] == read_records(tmp_path / "hf.json")[0]
    one_line_error(generate(place, output, sampler=pairs), "--previous_model_name_or_path")


@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_any_of_the_models_stop_tokens_ends_a_response_and_is_its_last_id(tmp_path, backend):
    """generation_config.json lists `a` beside EOS: it ends responses, stands in their ids and not in their text."""
    tokenizer = tiny_tokenizer()
    letter = tokenizer.convert_tokens_to_ids("a")
    save_tiny_policy(tmp_path / "policy", 0, sharpness=1.0, hidden=64)
    file = tmp_path / "policy" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, letter]}))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    flags = ("--model_name_or_path", tmp_path / "policy", "--dataset_name_or_path", tmp_path / "prompts.jsonl")
    more = ("--K", 16, "--temperature", 1, "--max_new_tokens", 24, "--output_file", tmp_path / "out.json")
    result = python("generation/generate.py", *flags, *more, "--backend", backend)
    assert result.returncode == 0, result.stderr
    instances, _ = read_records(tmp_path / "out.json", ("response_ids", "stop_reasons", "num_tokens"))
    ends = set()
    for instance in instances:
        for text, ids, reason in zip(
            instance["responses"], instance["response_ids"], instance["stop_reasons"], strict=True
        ):
            *inner, last = ids
            assert not {2, letter} & set(inner)
            assert (reason == "stop") == (last in (2, letter))
            kept = inner if reason == "stop" else ids
            assert text == "".join(tokenizer.convert_ids_to_tokens([i for i in kept if i > 3]))
            ends.add(last if reason == "stop" else None)
    assert ends == {2, letter, None}


def test_a_template_that_writes_the_time_cannot_mix_prompts(tmp_path):
    """A journal and a result know the prompts that they were made from; the row is named."""
    tokenizer = tiny_tokenizer(characters=CHARACTERS + "0123456789")
    tokenizer.chat_template = "{{ now or strftime_now('%H:%M:%S.%f') }} {{ messages[0]['content'] }}"
    save_tiny_policy(tmp_path / "policy", 0, tokenizer=tokenizer)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "what now?"}) + "\n")
    flags = (
        *("--model_name_or_path", tmp_path / "policy", "--dataset_name_or_path", tmp_path / "prompts.jsonl"),
        *("--template", "chat", "--max_new_tokens", 4, "--backend", "hf", "--output_file", tmp_path / "out.json"),
    )
    assert python("generation/generate.py", *flags).returncode == 0
    one_line_error(python("generation/generate.py", *flags), "out.json", "prompts.jsonl: line 1")
    instances, settings = read_records(tmp_path / "out.json")
    then = instances[0]["prompt"].split()[0]
    pinned = python("generation/generate.py", *flags, "--chat_template_kwargs", json.dumps({"now": then}))
    assert pinned.returncode == 0, pinned.stderr
    # The same of a run that was stopped after its first response.
    (tmp_path / "out.json").unlink()
    begun = Journal(tmp_path / "out.json", settings["generate"])
    row = {"text": instances[0]["responses"][0], "ids": instances[0]["response_ids"][0], "stop_reason": "length"}
    begun.add("0.0", {**row, "prompt": text_digest(instances[0]["prompt"])})
    begun.close(done=False)
    one_line_error(python("generation/generate.py", *flags), "out.json.journal", "prompts.jsonl: line 1")
    assert (
        python("generation/generate.py", *flags, "--chat_template_kwargs", json.dumps({"now": then})).returncode == 0
    )
    assert read_records(tmp_path / "out.json")[0] == instances


def test_without_any_stop_token_responses_are_cut_and_it_is_said(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    save_tiny_policy(tmp_path / "policy", 0, tokenizer=tokenizer)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "what now?"}) + "\n")
    flags = ("--model_name_or_path", tmp_path / "policy", "--dataset_name_or_path", tmp_path / "prompts.jsonl")
    more = ("--max_new_tokens", 4, "--backend", "hf", "--output_file", tmp_path / "out.json")
    result = python("generation/generate.py", *flags, *more)
    assert result.returncode == 0, result.stderr
    assert "no stop token" in result.stdout
    assert read_records(tmp_path / "out.json")[0][0]["stop_reasons"] == ["length", "length"]


def test_prompts_that_leave_no_room_for_a_response_are_left_out_and_counted(place, tmp_path):
    """The reference reads 32 tokens, 8 of them new: prompts of up to 24 are sampled, whatever --max_input_length."""
    save_tiny_policy(tmp_path / "short", 1, context=32, hidden=64)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": "a" * n}) + "\n" for n in (5, 23, 24, 39, 50))
    )
    for backend in ("vllm", "hf"):
        output = tmp_path / f"{backend}.json"
        more = ("--ref_model_name_or_path", tmp_path / "short", "--dataset_name_or_path", tmp_path / "prompts.jsonl")
        result = generate(place, output, *more, backend=backend)
        assert result.returncode == 0, result.stderr
        assert [len(i["prompt"]) for i in read_records(output)[0]] == [5, 23]
        assert "3 prompts left out" in result.stdout


def test_the_second_model_is_called_what_it_is(place, tmp_path):
    """`reference` is the reference; the policy of the iteration before is `previous`."""
    flags = ("--previous_model_name_or_path", place / "reference")
    assert generate(place, tmp_path / "h.json", *flags, sampler=("--sampler", "history")).returncode == 0
    assert generate(place, tmp_path / "m.json", *flags, sampler=("--sampler", "mixp")).returncode == 0
    history, mixp = (read_records(tmp_path / name)[1]["generate"] for name in ("h.json", "m.json"))
    assert (history["reference"], history["previous"]) == (None, str(place / "reference"))
    assert mixp["reference"] == str(place / "reference") and "previous" not in mixp


def greedy(model, ids: list[int], length: int) -> list[int]:
    """Ids of an uncached loop; EOS (2) is the last one."""
    found = []
    while len(found) < length and 2 not in found:
        found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def test_an_adapter_is_its_base_and_itself(place, tmp_path, monkeypatch):
    """A LoRA adapter's folder as policy: both back ends answer as peft does."""
    from peft import LoraConfig, PeftModel, get_peft_model

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    base = load_causal_lm(str(place / "policy"), "policy", "float32")
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(place / "policy")})
    )
    tokenizer, plain = tiny_tokenizer(), load_causal_lm(str(place / "policy"), "policy", "float32")
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = [greedy(model, tokenizer(prompt)["input_ids"], 8) for prompt in PROMPTS]
        with model.disable_adapter():
            assert expected != [greedy(model, tokenizer(prompt)["input_ids"], 8) for prompt in PROMPTS]
    for backend in ("hf", "vllm"):
        more = ("--model_name_or_path", tmp_path / "adapter", "--temperature", 0)
        output = tmp_path / f"{backend}.json"
        result = generate(place, output, *more, backend=backend, sampler=("--sampler", "online"))
        assert result.returncode == 0, result.stderr
        assert [i["response_ids"][0] for i in read_records(output)[0]] == expected


def test_help_explains_every_flag():
    result = python("generation/generate.py", "--help")
    assert result.returncode == 0
    for flag in (
        "--sampler",
        "--pairs",
        "--max_num_seqs",
        "--tensor_parallel_size",
        "--gpu_memory_utilization",
    ):
        assert flag in result.stdout


def test_pickled_weights_are_converted_to_the_same_model(place, tmp_path):
    model = load_causal_lm(str(place / "policy"), "policy", "float32")
    tokenizer = tiny_tokenizer()
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    tokenizer.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    flags = ("--model_name_or_path", tmp_path / "pickled", "--output_dir", tmp_path / "safe")
    result = python("scripts/to_safetensors.py", *flags)
    assert result.returncode == 0, result.stderr
    converted = load_causal_lm(str(tmp_path / "safe"), "policy", "float32")
    for (name, a), b in zip(model.state_dict().items(), converted.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    one_line_error(python("scripts/to_safetensors.py", *flags), "exists already")
