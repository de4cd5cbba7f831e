"""The five drivers: what they would run, and how they refuse."""

import os
import re
import shlex

import pytest
from commands import bash

SAMPLERS = ("offline", "online", "gshf", "mixp")
DRIVERS = {
    "sample_train_safe_rlhf.sh": "safe_rlhf",
    "sample_train_iterative_prompt.sh": "iterative_prompt",
    "sample_eval_safe_rlhf.sh": "safe_rlhf",
    "sample_eval_iterative_prompt.sh": "iterative_prompt",
    "sample_kl.sh": "safe_rlhf",
}


def plan(driver: str, **environment) -> list[tuple[str, list[str]]]:
    """(stage, words of its command) for each command that a driver would run."""
    result = bash(f"alignment/{driver}", DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^\[(.+?)\] (.+)$", result.stdout, re.MULTILINE)
    return [(stage, shlex.split(command)) for stage, command in found]


def flag(words: list[str], name: str, count: int = 1):
    position = words.index(name) + 1
    values = words[position : position + count]
    return values[0] if count == 1 else values


def in_turn(words: list[str]) -> list[list[str]]:
    """The flags of each of the command lines that one process runs."""
    places = [i for i, word in enumerate(words) if word == "--then"]
    return [words[start + 1 : end] for start, end in zip([1, *places], [*places, len(words)], strict=True)]


def test_iteration_one_is_trained_once_and_shared():
    stages = [stage for stage, _ in plan("sample_train_safe_rlhf.sh")]
    expected = ["generate iter1", "annotate iter1 online", "train iter1 online"]
    for n in (2, 3):
        expected.append(f"generate iter{n}")
        for sampler in SAMPLERS:
            expected += [f"{step} iter{n} {sampler}" for step in ("annotate", "train")]
    assert stages == expected


def test_each_stage_reads_what_the_one_before_wrote():
    commands = dict(plan("sample_train_safe_rlhf.sh", RUN_DIR="/run"))
    for number, sampler in enumerate(SAMPLERS):
        for n, before in ((2, "/run/models/rlhflow_iter1"), (3, f"/run/models/rlhflow_iter2_{sampler}")):
            generate = in_turn(commands[f"generate iter{n}"])[number]
            annotate = commands[f"annotate iter{n} {sampler}"]
            train = commands[f"train iter{n} {sampler}"]
            base = "PKU-Alignment/alpaca-7b-reproduced"
            assert flag(generate, "--model_name_or_path") == flag(train, "--model_name_or_path") == before
            assert flag(generate, "--ref_model_name_or_path") == flag(train, "--ref_model") == base
            assert flag(generate, "--output_file") == f"/run/data/gen_data_iter{n}_{sampler}.json"
            assert flag(annotate, "--dataset_name_or_path") == flag(generate, "--output_file")
            assert flag(annotate, "--output_file") == f"/run/data/data_with_rewards_iter{n}_{sampler}.json"
            assert flag(train, "--train_dir") == flag(annotate, "--output_file")
            assert flag(train, "--output_dir") == f"/run/models/rlhflow_iter{n}_{sampler}"
            assert flag(generate, "--sampler") == sampler


def test_every_iteration_samples_anew():
    commands = plan("sample_train_safe_rlhf.sh", SAMPLERS="offline")
    seeds = [flag(words, "--seed") for stage, words in commands if stage.startswith("generate")]
    assert len(set(seeds)) == 3


# The published settings, from the paper's appendix.
PUBLISHED = {
    "safe_rlhf": {
        "generate": {
            "--template": "safe_rlhf",
            "--max_prompt_characters": "128",
            "--max_input_length": "128",
            "--max_new_tokens": "128",
            "--temperature": "0.7",
            "--start": "0",
            "--end": "10000",
        },
        "train": {
            "--max_length": "256",
            "--max_prompt_length": "128",
            "--per_device_train_batch_size": "1",
            "--gradient_accumulation_steps": "2",
            "--margin_scale": "4",
        },
    },
    "iterative_prompt": {
        "generate": {
            "--template": "alpaca",
            "--max_prompt_characters": "256",
            "--max_input_length": "256",
            "--max_new_tokens": "128",
            "--temperature": "0.7",
        },
        "train": {
            "--max_length": "384",
            "--max_prompt_length": "256",
            "--per_device_train_batch_size": "2",
            "--gradient_accumulation_steps": "2",
            "--margin_scale": "1",
        },
    },
}
COMMON = {
    "--loss_type": "rev_kl",
    "--beta": "0.1",
    "--learning_rate": "5e-7",
    "--lr_scheduler_type": "cosine",
    "--warmup_steps": "100",
    "--num_train_epochs": "2",
    "--num_processes": "8",
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_hold_the_published_settings(recipe):
    commands = dict(plan(f"sample_train_{recipe}.sh"))
    for step, settings in PUBLISHED[recipe].items():
        lines = in_turn(commands["generate iter2"]) if step == "generate" else [commands["train iter2 online"]]
        assert len(lines) == (len(SAMPLERS) if step == "generate" else 1)
        for name, value in (settings | (COMMON if step == "train" else {})).items():
            assert [flag(words, name) for words in lines] == [value] * len(lines), name
    assert any(word.endswith("configs/zero3.yaml") for word in commands["train iter2 online"])


def test_mixp_of_the_two_experiments():
    safe, iterative = (
        in_turn(dict(plan(f"sample_train_{recipe}.sh"))["generate iter2"])[SAMPLERS.index("mixp")]
        for recipe in PUBLISHED
    )
    assert flag(safe, "--sampler") == "mixp"
    assert flag(iterative, "--pairs") == "[[0.3,[1,0],[1,0]],[0.7,[1.5,-0.5],[0.5,0.5]]]"
    assert len([w for w in iterative if w.startswith("RLHFlow/iterative-prompt-v1-iter")]) == 4


def test_evaluation_covers_every_model_on_test_and_train_prompts():
    commands = plan("sample_eval_safe_rlhf.sh", RUN_DIR="/run", JUDGE_MODEL="judge/model")
    generations = in_turn(dict(commands)["evaluate: generate"])
    assert len(generations) == 2 + 2 * 4
    assert flag(generations[0], "--model_name_or_path") == "PKU-Alignment/alpaca-7b-reproduced"
    for words in generations:
        assert flag(words, "--start", 2) == ["10000", "0"] and flag(words, "--end", 2) == ["12000", "10000"]
        assert (flag(words, "--temperature"), flag(words, "--K")) == ("0.1", "1")
    written = {name for words in generations for name in flag(words, "--output_file", 2)}
    assert "/run/data/test_gen_data_iter0_base_0.json" in written
    assert "/run/data/test_gen_data_iter1_mixp_3.json" in written
    annotations = [words for stage, words in commands if "annotate" in stage]
    assert [flag(w, "--reward_name_or_path") for w in annotations] == [
        "sfairXC/FsfairX-LLaMA3-RM-v0.1",
        "judge/model",
    ]
    for words in annotations:
        assert set(flag(words, "--dataset_name_or_path", 20)) == written
    assert commands[-1][0] == "summarize"


def test_kl_is_measured_on_200_held_out_prompts():
    measured = in_turn(dict(plan("sample_kl.sh", RUN_DIR="/run"))["KL"])
    assert len(measured) == 9
    for words in measured:
        assert flag(words, "--start") == "10000" and flag(words, "--end") == "10200"
    assert flag(measured[-1], "--output_file") == "/run/results/kl_mixp_3.json"


def test_first_iteration_checkpoint():
    commands = plan("sample_train_safe_rlhf.sh", ITER1_MODEL="owner/iter-1", SAMPLERS="mixp", ITERS="2")
    assert [stage for stage, _ in commands] == [
        "generate iter2",
        "annotate iter2 mixp",
        "train iter2 mixp",
    ]
    assert flag(commands[0][1], "--model_name_or_path") == "owner/iter-1"


def test_a_sampler_of_ones_own():
    pairs = "[[1,[2,-1],[0,1]]]"
    commands = plan("sample_train_safe_rlhf.sh", SAMPLERS="mine", PAIRS_mine=pairs, ITERS="2")
    assert flag(dict(commands)["generate iter2"], "--pairs") == pairs


def test_fewer_gpus_keep_the_global_batch_and_machines_are_counted():
    train = dict(plan("sample_train_safe_rlhf.sh", GPUS="2"))["train iter1 online"]
    assert flag(train, "--gradient_accumulation_steps") == "8"
    train = dict(plan("sample_train_safe_rlhf.sh", GPUS="8", NUM_MACHINES="2", MACHINE_RANK="1", MASTER_ADDR="head"))[
        "train iter1 online"
    ]
    assert flag(train, "--num_processes") == "16" and flag(train, "--gradient_accumulation_steps") == "1"
    assert flag(train, "--machine_rank") == "1" and flag(train, "--main_process_ip") == "head"


@pytest.mark.parametrize(
    ("environment", "generation", "annotation"),
    [
        ({"GPUS": "8"}, "8", "8"),
        ({"GPUS": "8", "TENSOR_PARALLEL_SIZE": "4"}, "2", "8"),
        ({"GPUS": "2", "TENSOR_PARALLEL_SIZE": "2"}, None, "2"),
        ({"GPUS": "1"}, None, None),
        ({"GPUS": "8", "RAY_ADDRESS": "head:6379"}, "all", "all"),
        ({"GPUS": "8", "RAY_ADDRESS": "head:6379", "NUM_ENGINES": "5"}, "5", "5"),
        ({"GPUS": "8", "NUM_ENGINES": "1"}, None, None),
        ({"RECIPE": "quickstart"}, None, None),
    ],
)
def test_every_gpu_has_an_engine_and_one_engine_needs_no_ray(environment, generation, annotation):
    for driver, stages in {
        "sample_train_safe_rlhf.sh": ("generate iter1", "annotate iter1 online"),
        "sample_eval_safe_rlhf.sh": ("evaluate: generate", "evaluate: annotate with "),
    }.items():
        commands = plan(driver, **environment)
        for stage, count in zip(stages, (generation, annotation), strict=True):
            words = next(words for name, words in commands if name.startswith(stage))
            assert (flag(words, "--num_engines") if "--num_engines" in words else None) == count
            if "generate" in stage:
                size = flag(words, "--tensor_parallel_size")
                assert size == environment.get("TENSOR_PARALLEL_SIZE", "1")


def test_the_first_of_several_machines_makes_the_data():
    several = {
        "GPUS": "8",
        "NUM_MACHINES": "2",
        "MASTER_ADDR": "head",
        "RUN_DIR": "/run",
        "GLOBAL_BATCH": "16",
    }
    first, second = (plan("sample_train_safe_rlhf.sh", MACHINE_RANK=rank, **several) for rank in "01")
    assert [stage for stage, _ in second if stage != "wait"] == [
        stage for stage, _ in first if stage.startswith("train")
    ]
    made = [flag(words, "--output_file") for stage, words in first if stage.startswith("annotate")]
    waited = [words[0] for stage, words in second if stage == "wait"]
    assert [path for path in waited if "data_with_rewards" in path] == made


def refused(driver: str, **environment) -> str:
    result = bash(f"alignment/{driver}", **environment)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("driver", DRIVERS)
def test_without_a_gpu_a_driver_says_what_to_do(driver, tmp_path):
    # On a machine that has GPUs too: an nvidia-smi that finds none.
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    line = refused(driver, RUN_DIR=tmp_path / "run", PATH=path)
    assert "needs GPUs" in line and "quickstart" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"SAMPLERS": "../up"}, "sampler '../up'"),
        ({"SAMPLERS": "a;b"}, "sampler 'a;b'"),
        ({"RECIPE": "../x"}, "RECIPE '../x'"),
        ({"RECIPE": "none"}, "no recipe 'none'"),
        ({"ITERS": "0"}, "ITERS '0'"),
        ({"ITERS": "two"}, "ITERS 'two'"),
        ({"GPUS": "3"}, "GLOBAL_BATCH 16 is not a multiple"),
        ({"NUM_ENGINES": "some"}, "NUM_ENGINES 'some'"),
        ({"TENSOR_PARALLEL_SIZE": "0"}, "TENSOR_PARALLEL_SIZE 0"),
    ],
)
def test_wrong_constants(environment, part):
    assert part in refused("sample_train_safe_rlhf.sh", DRY_RUN="1", **environment)
