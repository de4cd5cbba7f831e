"""The drivers: what they would run, and how they refuse. Nothing of torch is started."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ALIGNMENT, PROJECT, bash, run, settings
from plans import fake_nvidia_smi, flag, in_turn, plan, refused, values
from tiny import save_tiny_reward_model

from bandit.mixtures import get_mixture
from common.cli import UserError
from evaluation import get_kl
from scripts import machine, stages
from scripts.resolve import check_files, resolve
from scripts.settings import Settings, show

SAMPLERS = ("offline", "online", "gshf", "mixp")
ALL = " ".join(SAMPLERS)
RECIPE_OF = {
    "sample_train_safe_rlhf.sh": "safe_rlhf",
    "sample_train_iterative_prompt.sh": "iterative_prompt",
    "sample_eval_safe_rlhf.sh": "safe_rlhf",
    "sample_eval_iterative_prompt.sh": "iterative_prompt",
    "sample_kl.sh": "safe_rlhf",
}
TRAIN = "sample_train_safe_rlhf.sh"


@pytest.mark.parametrize("driver", RECIPE_OF)
def test_a_refusal_names_the_command_that_was_typed(driver):
    assert refused(driver, NOPE=1) == f"{driver}: error: NOPE: no such setting; --help lists all"


def test_no_more_train_prompts_are_evaluated_than_trained_on(tmp_path):
    for given, end in ((80, "40"), (16, "16")):
        [words, *_] = [words for _, words in plan("sample_eval_safe_rlhf.sh", RECIPE="quickstart", TRAIN_END=given)]
        assert values(in_turn(words)[0], "--end") == ["496", end]


def test_a_reader_that_has_seen_enough_is_no_failure():
    done = run(["bash", "-c", f"bash {ALIGNMENT / TRAIN} DRY_RUN=1 | head -2"])
    assert done.stdout.startswith("\n[generate 1 online] ") and done.stderr == ""


def test_iteration_one_is_trained_once_and_shared():
    expected = ["generate 1 online", "annotate 1 online", "train 1 online"]
    for n in (2, 3):
        expected += [f"generate {n} {ALL}", f"annotate {n} {ALL}", *(f"train {n} {sampler}" for sampler in SAMPLERS)]
    assert [stage for stage, _ in plan(TRAIN)] == expected


def test_each_stage_reads_what_the_one_before_wrote():
    commands = dict(plan(TRAIN, RUN_DIR="/run"))
    base = "PKU-Alignment/alpaca-7b-reproduced"
    for n in (2, 3):
        generations = in_turn(commands[f"generate {n} {ALL}"])
        annotate = commands[f"annotate {n} {ALL}"]
        responses = [flag(words, "--output_file") for words in generations]
        assert responses == values(annotate, "--dataset_name_or_path")
        assert responses == [f"/run/data/gen_data_iter{n}_{sampler}.json" for sampler in SAMPLERS]
        for i, sampler in enumerate(SAMPLERS):
            before = "/run/models/rlhflow_iter1" if n == 2 else f"/run/models/rlhflow_iter2_{sampler}"
            generate, train = generations[i], commands[f"train {n} {sampler}"]
            assert flag(generate, "--model_name_or_path") == flag(train, "--model_name_or_path") == before
            assert flag(generate, "--ref_model_name_or_path") == flag(train, "--ref_model") == base
            assert flag(generate, "--sampler") == sampler
            rewarded = f"/run/data/data_with_rewards_iter{n}_{sampler}.json"
            assert values(annotate, "--output_file")[i] == flag(train, "--train_file") == rewarded
            assert flag(train, "--output_dir") == f"/run/models/rlhflow_iter{n}_{sampler}"


def test_every_iteration_samples_anew():
    commands = plan(TRAIN, SAMPLERS="offline")
    seeds = [flag(words, "--seed") for stage, words in commands if stage.startswith("generate")]
    assert len(set(seeds)) == 3


def test_a_null_is_its_sampler_with_other_random_numbers():
    commands = dict(plan(TRAIN, SAMPLERS="mixp mixp-null", ITERS=2, LABELS="sampled", RUN_DIR="/run"))
    mixp, null = in_turn(commands["generate 2 mixp mixp-null"])
    assert flag(mixp, "--sampler") == "mixp" and flag(null, "--sampler") == "mixp-null"
    assert get_mixture("mixp-null") is get_mixture("mixp")
    assert flag(mixp, "--seed") != flag(null, "--seed")
    mixp, null = commands["train 2 mixp"], commands["train 2 mixp-null"]
    assert all(flag(mixp, name) != flag(null, name) for name in ("--seed", "--label_seed"))
    own = ("--seed", "--label_seed", "--train_file", "--output_dir")
    changed = [before for before, a, b in zip(["", *mixp], mixp, null, strict=False) if a != b]
    assert sorted(changed) == sorted(own)  # nothing else differs


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
        "train": {"--max_length": "256", "--max_prompt_length": "128", "--margin_scale": "4"},
    },
    "iterative_prompt": {
        "generate": {
            "--template": "alpaca",
            "--max_prompt_characters": "256",
            "--max_input_length": "256",
            "--max_new_tokens": "128",
            "--temperature": "0.7",
        },
        "train": {"--max_length": "384", "--max_prompt_length": "256", "--margin_scale": "1"},
    },
}
BATCH = {"safe_rlhf": 16, "iterative_prompt": 32}
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
    commands = plan(f"sample_train_{recipe}.sh")
    [generate] = [words for stage, words in commands if stage.startswith("generate 2")]
    train = dict(commands)["train 2 online"]
    assert len(in_turn(generate)) == 4
    for line in in_turn(generate):
        assert {name: flag(line, name) for name in PUBLISHED[recipe]["generate"]} == PUBLISHED[recipe]["generate"]
    expected = PUBLISHED[recipe]["train"] | COMMON
    assert {name: flag(train, name) for name in expected} == expected
    each, accumulated = (
        int(flag(train, name)) for name in ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    )
    assert 8 * each * accumulated == BATCH[recipe]
    assert any(word.endswith("configs/zero3.yaml") for word in train)


def test_mixp_of_the_two_experiments():
    safe, iterative = (
        in_turn(next(words for stage, words in plan(f"sample_train_{recipe}.sh") if stage.startswith("generate 2")))[
            3
        ]
        for recipe in PUBLISHED
    )
    assert (flag(safe, "--sampler"), flag(iterative, "--sampler")) == ("mixp", "mixp-iterative")
    assert len(values(iterative, "--dataset_name_or_path")) == 4


def test_evaluation_covers_every_model_on_test_and_train_prompts():
    commands = plan("sample_eval_safe_rlhf.sh", RUN_DIR="/run", JUDGE_MODEL="judge/model", GPUS=1)
    assert [stage for stage, _ in commands] == ["evaluate", *["annotate_evaluation"] * 2, "summarize"]
    generations = in_turn(dict(commands)["evaluate"])
    assert len(generations) == 2 + 2 * 4
    assert flag(generations[0], "--model_name_or_path") == "PKU-Alignment/alpaca-7b-reproduced"
    for words in generations:
        assert (values(words, "--start"), values(words, "--end")) == (["10000", "0"], ["12000", "10000"])
        assert (flag(words, "--temperature"), flag(words, "--K")) == ("0.1", "1")
    written = [name for words in generations for name in values(words, "--output_file")]
    assert "/run/eval/test_prompts/base_iter0.json" in written
    assert "/run/eval/train_prompts/mixp_iter3.json" in written
    scorers = [("sfairXC/FsfairX-LLaMA3-RM-v0.1", "_rewards"), ("judge/model", "_judge")]
    for (scorer, suffix), (_, words) in zip(scorers, commands[1:3], strict=True):
        assert flag(words, "--reward_name_or_path") == scorer
        assert values(words, "--dataset_name_or_path") == written
        assert values(words, "--output_file") == [name.replace(".json", f"{suffix}.json") for name in written]


def test_given_checkpoints_are_evaluated_without_training():
    models = {"one": "owner/one", "two": "/a=b/two"}
    given = {"RUN_DIR": "/run", "GPUS": 1, "MODELS": " ".join(f"{name}={path}" for name, path in models.items())}
    commands = dict(plan("sample_eval_safe_rlhf.sh", **given))
    lines = in_turn(commands["evaluate"])
    paths = ["PKU-Alignment/alpaca-7b-reproduced", *models.values()]
    assert [flag(line, "--model_name_or_path") for line in lines] == paths
    assert flag(lines[1], "--output_file") == "/run/eval/test_prompts/one.json"
    assert values(commands["summarize"], "--models") == list(models) and "--samplers" not in commands["summarize"]
    measured = in_turn(dict(plan("sample_kl.sh", **given))["kl"])
    assert [flag(line, "--output_file") for line in measured] == [
        "/run/results/kl_one.json",
        "/run/results/kl_two.json",
    ]
    for wrong in ("one", "one=", "../one=x"):
        assert "MODELS" in refused("sample_kl.sh", MODELS=wrong)


def test_reward_and_kl_of_the_same_responses():
    commands = dict(plan("sample_kl.sh", RUN_DIR="/run", GPUS=1, SCORE_KL=True))
    sampled = [flag(line, "--output_file") for line in in_turn(commands["kl_responses"])]
    assert len(sampled) == 10 and sampled[0] == "/run/eval/kl_prompts/base_iter0.json"
    assert values(commands["annotate_kl"], "--dataset_name_or_path") == sampled
    lines = in_turn(commands["kl"])
    assert [flag(line, "--responses") for line in lines] == sampled[1:]
    temperatures = {flag(line, "--temperature") for line in [*lines, *in_turn(commands["kl_responses"])]}
    assert temperatures == {"0.7"} and not any("--dataset_name_or_path" in line for line in lines)
    assert flag(commands["summarize"], "--margin_scale") == "4"


def test_what_scores_responses_is_given_no_flag_of_sampling():
    given = {"SEED": 3, "BACKEND": "hf", "MAX_NEW_TOKENS": 9, "TRUST_REMOTE_CODE": 1, "TEMPLATE": "chat"}
    scoring, sampling = (
        in_turn(dict(plan("sample_kl.sh", RUN_DIR="/run", GPUS=1, SCORE_KL=by_score, **given))["kl"])
        for by_score in (True, False)
    )
    for line in scoring:
        args = get_kl.parser().parse_args(line[line.index("--model_name_or_path") :])
        get_kl.check_only_scoring(args)
        assert args.trust_remote_code
    assert {(flag(line, "--seed"), flag(line, "--max_new_tokens")) for line in sampling} == {("3000", "9")}


def test_where_temperatures_agree_reward_and_kl_share_their_responses(tmp_path):
    given = {"RUN_DIR": tmp_path, "GPUS": 1, "SCORE_KL": True, "KL_TEMPERATURE": 0.1}
    commands = dict(plan("sample_kl.sh", **given))
    files = [file for line in in_turn(commands["kl_responses"]) for file in values(line, "--output_file")]
    assert len(files) == 20 and {Path(file).parent.name for file in files} == {"test_prompts", "train_prompts"}
    measured = [flag(line, "--responses") for line in in_turn(commands["kl"])]
    assert measured == [file for file in files if "test_prompts" in file][1:]
    evaluation = dict(plan("sample_eval_safe_rlhf.sh", **given))
    for stage, same in (("kl_responses", "evaluate"), ("annotate_kl", "annotate_evaluation")):
        assert commands[stage] == evaluation[same]  # which makes nothing twice, and compares what is there
    several = dict(plan("sample_kl.sh", **given, EVAL_K=2))
    assert "kl_prompts" in flag(in_turn(several["kl"])[0], "--responses")


def test_kl_is_measured_on_200_held_out_prompts():
    measured = in_turn(dict(plan("sample_kl.sh", RUN_DIR="/run", GPUS=1))["kl"])
    assert len(measured) == 9
    for words in measured:
        assert flag(words, "--start") == "10000" and flag(words, "--end") == "10200"
    assert flag(measured[0], "--output_file") == "/run/results/kl_shared_iter1.json"
    assert flag(measured[-1], "--output_file") == "/run/results/kl_mixp_iter3.json"


def test_first_iteration_checkpoint():
    commands = plan(TRAIN, ITER1_MODEL="owner/iter-1", SAMPLERS="mixp", ITERS=2)
    assert [stage for stage, _ in commands] == ["generate 2 mixp", "annotate 2 mixp", "train 2 mixp"]
    assert flag(commands[0][1], "--model_name_or_path") == "owner/iter-1"


@pytest.mark.parametrize("pairs", [[[1, [2, -1], [0, 1]]], [[1, [1.5, -0.5, 0], [0, 0.5, 0.5]]]])
def test_a_sampler_of_ones_own(tmp_path, pairs):
    """As an argument and in a recipe of one's own; iteration 1 is on-policy whatever `online` is called."""
    table = json.dumps({"mine": pairs, "online": pairs})
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"EXTENDS: safe_rlhf\nPAIRS: {table}\nSAMPLERS: [mine]\n")
    for given in ({"SAMPLERS": "mine", "PAIRS": table}, {"RECIPE": recipe}):
        commands = dict(plan(TRAIN, ITERS=2, **given))
        assert json.loads(flag(commands["generate 2 mine"], "--pairs")) == pairs
        assert "--pairs" not in commands["generate 1 online"]


def test_fewer_gpus_keep_the_global_batch_and_machines_are_counted():
    train = dict(plan(TRAIN, GPUS=2))["train 1 online"]
    assert (flag(train, "--per_device_train_batch_size"), flag(train, "--gradient_accumulation_steps")) == ("2", "4")
    assert flag(train, "--main_process_port") == "0"  # any that is free: runs may share a machine
    machines = {"GPUS": 8, "NUM_MACHINES": 2, "MACHINE_RANK": 1, "MASTER_ADDR": "head"}
    train = dict(plan(TRAIN, **machines))["train 1 online"]
    assert flag(train, "--num_processes") == "16" and flag(train, "--gradient_accumulation_steps") == "1"
    assert flag(train, "--per_device_train_batch_size") == "1"  # 16 pairs are not two for each of 16 processes
    assert flag(train, "--machine_rank") == "1" and flag(train, "--main_process_ip") == "head"
    assert flag(train, "--main_process_port") == "29500"


@pytest.mark.parametrize(
    ("given", "ray", "generation", "annotation"),
    [
        ({"GPUS": 8}, {}, "8", "8"),
        ({"GPUS": 8, "TENSOR_PARALLEL_SIZE": 4}, {}, "2", "8"),
        ({"GPUS": 2, "TENSOR_PARALLEL_SIZE": 2}, {}, None, "2"),
        ({"GPUS": 1}, {}, None, None),
        ({"GPUS": 8}, {"RAY_ADDRESS": "head:6379"}, "all", "all"),
        ({"GPUS": 8, "NUM_ENGINES": 5}, {"RAY_ADDRESS": "head:6379"}, "5", "5"),
        ({"GPUS": 8, "NUM_ENGINES": 1}, {}, None, None),
        ({"RECIPE": "quickstart"}, {}, None, None),
    ],
)
def test_every_gpu_has_an_engine_and_one_engine_needs_no_ray(given, ray, generation, annotation):
    commands = dict(plan(TRAIN, environment=ray, ITERS=1, **given))
    for stage, count in {"generate 1 online": generation, "annotate 1 online": annotation}.items():
        assert values(commands[stage], "--num_engines") == ([count] if count else [])
    size = str(given.get("TENSOR_PARALLEL_SIZE", 1))
    assert flag(commands["generate 1 online"], "--tensor_parallel_size") == size
    for stage, words in plan("sample_eval_safe_rlhf.sh", environment=ray, **given):
        if stage == "evaluate":  # on Ray, engines share a model's prompts; else each engine has its own models
            by_ray = "RAY_ADDRESS" in ray or "NUM_ENGINES" in given
            assert values(words, "--num_engines")[:1] == ([generation] if by_ray and generation else [])


@pytest.mark.parametrize(
    ("given", "visible", "shares"),
    [
        ({"GPUS": 1}, None, [None]),
        ({"GPUS": 4}, None, ["0", "1", "2", "3"]),
        ({"GPUS": 4, "TENSOR_PARALLEL_SIZE": 2}, "7,5,3,1", ["7,5", "3,1"]),
        ({"GPUS": 8, "ITERS": 1}, None, ["0", "1"]),  # no more engines than models
    ],
)
def test_evaluation_and_kl_give_every_gpu_models_of_its_own(given, visible, shares):
    environment = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    for driver, stage in (("sample_eval_safe_rlhf.sh", "evaluate"), ("sample_kl.sh", "kl")):
        whole = dict(plan(driver, RUN_DIR="/run", **{**given, "GPUS": 1, "TENSOR_PARALLEL_SIZE": 1}))[stage]
        parts = [words for name, words in plan(driver, environment, RUN_DIR="/run", **given) if name == stage]
        expected = shares[: len(in_turn(whole))] if len(in_turn(whole)) > 1 else [None]
        found = [words[1].split("=")[1] if words[0] == "env" else None for words in parts]
        assert found == expected
        models = [flag(line, "--model_name_or_path") for words in parts for line in in_turn(words)]
        assert sorted(models) == sorted(flag(line, "--model_name_or_path") for line in in_turn(whole))


@pytest.mark.parametrize(("gpus", "visible", "used"), [(1, None, 1), (2, None, 2), (8, None, 8), (8, "0,3", 2)])
def test_gpus_are_those_that_nvidia_smi_lists(gpus, visible, used, tmp_path):
    environment = fake_nvidia_smi(tmp_path, gpus) | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    given = {"RECIPE": "iterative_prompt", "ITERS": 1, "ACCELERATE_CONFIG": "zero3_offload"}
    train = dict(plan(TRAIN, environment, **given))["train 1 online"]
    assert flag(train, "--num_processes") == str(used)


@pytest.mark.parametrize("driver", RECIPE_OF)
def test_without_a_gpu_a_driver_says_what_to_do(driver, tmp_path):
    line = refused(driver, fake_nvidia_smi(tmp_path, 0), RUN_DIR=tmp_path / "run")
    assert "quickstart" in line and not (tmp_path / "run").exists()


def test_a_gpu_that_torch_cannot_use_is_refused(tmp_path):
    """The environment of these tests has a CPU build of torch."""
    line = refused(TRAIN, fake_nvidia_smi(tmp_path, 1), RUN_DIR=tmp_path / "run", RECIPE="quickstart", GPUS=1)
    assert "torch" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"SAMPLERS": "../up"}, "SAMPLERS"),
        ({"SAMPLERS": "a;b"}, "SAMPLERS"),
        ({"SAMPLERS": "mixq"}, "mixq"),
        ({"RECIPE": "../x"}, "RECIPE"),
        ({"RECIPE": "none"}, "RECIPE"),
        ({"ITERS": 0}, "ITERS"),
        ({"ITERS": "two"}, "ITERS"),
        ({"LEARNING_RATE": "small"}, "LEARNING_RATE"),
        ({"BACKEND": "v"}, "BACKEND"),
        ({"USE_LORA": "maybe"}, "USE_LORA"),
        ({"PAIRS": "[1]"}, "PAIRS"),
        ({"PAIRS": '{"mine": [[0.5, [2, -1], [0, 1]]]}', "SAMPLERS": "mine"}, "mine"),
        ({"SAMPLERS": "mixp", "K": 7}, "mixp"),
        ({"LOSS_TYPE": "nothing"}, "LOSS_TYPE"),
        ({"QLORA": 1}, "QLORA"),
        ({"CHOOSE_TYPE": "nothing"}, "CHOOSE_TYPE"),
        ({"TEMPLATE": "nothing"}, "TEMPLATE"),
        ({"ACCELERATE_CONFIG": "nothing"}, "ACCELERATE_CONFIG"),
        ({"GPUS": 3}, "GLOBAL_BATCH"),
        ({"NUM_ENGINES": "some"}, "NUM_ENGINES"),
        ({"TENSOR_PARALLEL_SIZE": 0}, "TENSOR_PARALLEL_SIZE"),
        ({"MACHINE_RANK": 1}, "MACHINE_RANK"),
        ({"LERNING_RATE": 1}, "LEARNING_RATE"),
        ({"SAMPLER": "mixp"}, "SAMPLERS"),
        # What a later stage would refuse.
        ({"K": 1, "SAMPLERS": "online"}, "K 1"),
        ({"EPOCHS": 0}, "EPOCHS"),
        ({"KL_TEMPERATURE": 0}, "KL_TEMPERATURE"),
        ({"EVAL_TEMPERATURE": 2.5}, "EVAL_TEMPERATURE"),
        ({"MAX_PROMPT_LENGTH": 256}, "MAX_PROMPT_LENGTH"),
        ({"SAVE_DTYPE": "float32"}, "SAVE_DTYPE"),
        ({"USE_LORA": 1, "QLORA": 1}, "ACCELERATE_CONFIG"),
        # Prompts that are trained on are not tested.
        ({"TRAIN_END": 10001}, "TEST_START"),
        ({"TEST_START": 20, "TEST_END": 40}, "TRAIN_END"),
        ({"TEST_START": 12000}, "TEST_END"),
        ({"TRAIN_START": 10000}, "TRAIN_END"),
        ({"TRAIN_START": 100, "EVAL_TRAIN_END": 50}, "EVAL_TRAIN_END"),
        ({"samplers": "mixp"}, "SAMPLERS"),
        ({"RECIPE": "published"}, "MODELS"),
        ({"ACCELERATE_CONFIG": "single", "NUM_MACHINES": 2}, "NUM_MACHINES"),
        ({"GPUS": 0, "NUM_MACHINES": 2}, "NUM_MACHINES"),
    ],
)
def test_wrong_settings(given, named):
    """A misspelt one is told the nearest that there is."""
    assert named in refused(TRAIN, DRY_RUN=1, **given)


def test_what_trains_nothing_takes_any_number_of_gpus():
    for driver in ("sample_eval_safe_rlhf.sh", "sample_kl.sh"):
        assert plan(driver, GPUS=3)


def test_the_kl_stays_within_the_test_prompts():
    [words, *_] = [words for _, words in plan("sample_kl.sh", TEST_START=0, TEST_END=96, TRAIN_START=100)]
    assert (flag(words, "--start"), flag(words, "--end")) == ("0", "96")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"REWARD_FUNCTION": "no/file.py:score"}, "no/file.py"),
        ({"REWARD_FUNCTION": "score"}, "FILE.py:NAME"),
        ({"REWARD_MODEL": "/no/model"}, "REWARD_MODEL /no/model"),
        ({"JUDGE_MODEL": "../no/model"}, "JUDGE_MODEL ../no/model"),
        ({"BASE_MODEL": "./model"}, "BASE_MODEL ./model"),
        ({"ITER1_MODEL": "/no/model"}, "ITER1_MODEL /no/model"),
        ({"PROMPTS": "/no/prompts"}, "PROMPTS /no/prompts"),
        ({"GPUS": 1}, "GPUS=1"),
    ],
)
def test_what_is_not_there_is_missed_before_anything_runs(given, named, tmp_path):
    line = refused(TRAIN, RECIPE="quickstart", RUN_DIR=tmp_path / "run", **{"BASE_MODEL": PROJECT, **given})
    assert named in line and not (tmp_path / "run").exists()


def test_what_a_driver_or_a_machine_does_not_read_may_be_missing():
    given = {"RECIPE": "quickstart", "BASE_MODEL": PROJECT, "PROMPTS": "owner/prompts ./README.md", "GPUS": 0}
    missing = {"REWARD_FUNCTION": "no/file.py:score", "JUDGE_MODEL": "/no/model"}
    s = resolve(settings(**given | missing | {"SCORE_KL": False}))
    check_files(s, "sample_kl.sh")
    check_files(replace(s, MACHINE_RANK=1, NUM_MACHINES=2), TRAIN)
    with pytest.raises(UserError, match="REWARD_FUNCTION: no/file.py"):
        check_files(s, "sample_eval_safe_rlhf.sh")
    check_files(resolve(settings(RECIPE="safe_rlhf", DRY_RUN=1)), TRAIN)  # hub names


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_needs_a_chat_template(where, tmp_path):
    """Found before the responses are made that the reward model could not read."""
    model = save_tiny_reward_model(tmp_path / "model", 0)
    given = {"RECIPE": "quickstart", "BASE_MODEL": PROJECT, "PROMPTS": PROJECT, "GPUS": 0, "REWARD_MODEL": model}
    s = resolve(settings(**given, REWARD_TEMPLATE="chat"))
    check_files(s, TRAIN)
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = config.pop("chat_template", None) or (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    check_files(resolve(settings(**given, REWARD_TEMPLATE="none")), TRAIN)
    with pytest.raises(UserError, match=f"REWARD_MODEL {model}: .*REWARD_TEMPLATE is chat"):
        check_files(s, TRAIN)
    for name in ("BASE_MODEL", "ITER1_MODEL", "MODELS"):
        chat = {"TEMPLATE": "chat", "REWARD_MODEL": PROJECT, name: f"mine={model}" if name == "MODELS" else model}
        with pytest.raises(UserError, match=f"{name} {model}: .* TEMPLATE is chat"):
            check_files(resolve(settings(**given | chat)), "sample_eval_safe_rlhf.sh")
    (model / where).write_text(
        json.dumps(config | {"chat_template": template}) if where.endswith("json") else template
    )
    check_files(s, TRAIN)


@pytest.mark.parametrize(("words", "starts_one"), [(["GPUS=0"], True), (["DRY_RUN=1"], False)])
def test_a_driver_knows_which_python_runs_all_its_stages(words, starts_one, tmp_path):
    words = ["RECIPE=ablation", f"RUN_DIR={tmp_path}", f"BASE_MODEL={PROJECT}", *words]
    result = run([sys.executable, ALIGNMENT / "scripts/resolve.py", "sample_ablation.sh", *words])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[4] == (str(machine.python_of("cpu")) if starts_one else "")


def test_a_recipe_extends_a_file_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("EXTENDS: safe_rlhf\nITERS: 5\nSEED: 1\n")
    (tmp_path / "mine.yaml").write_text("EXTENDS: base.yaml\nSEED: 2\n")
    s = resolve([f"RECIPE={tmp_path / 'mine.yaml'}"])
    assert (s.ITERS, s.SEED, s.MARGIN_SCALE) == (5, 2, 4)


def test_a_reward_model_reads_chats_where_the_policy_does():
    """Otherwise it would read the policy's template as text."""
    found = [resolve([*words]).REWARD_TEMPLATE for words in ([], ["TEMPLATE=chat"], ["TEMPLATE=alpaca"])]
    assert found == ["none", "chat", "none"]
    assert resolve(["TEMPLATE=chat", "REWARD_TEMPLATE=none"]).JUDGE_TEMPLATE == "none"


@pytest.mark.parametrize("text", ["NO_SUCH: 1", "ITERS: two", "- a list", "ITERS: [", "EXTENDS: none"])
def test_a_wrong_recipe_is_refused_with_its_name(text, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text(text)
    line = refused(TRAIN, DRY_RUN=1, RECIPE=recipe)
    assert "my.yaml" in line or "EXTENDS" in text


def test_a_word_that_is_no_setting_is_refused():
    result = bash(f"alignment/{TRAIN}", "mixp", *settings(DRY_RUN=1))
    assert result.returncode == 2 and "'mixp'" in result.stderr


def test_the_environment_sets_nothing():
    exported = {"K": "7", "SAMPLERS": "mixp", "ITERS": "1", "LEARNING_RATE": "1", "SEED": "7"}
    assert plan(TRAIN, exported) == plan(TRAIN)
    said = bash(f"alignment/{TRAIN}", "DRY_RUN=1", **exported).stderr
    assert "SAMPLERS" in said and "LEARNING_RATE" in said and "K" not in said.replace("LEARNING_RATE", "").split()
    # Who asked for a dry run the old way must not get a real one.
    assert "DRY_RUN" in refused(TRAIN, {"DRY_RUN": "1"})


def test_help_lists_every_setting():
    long, short = (bash("alignment/sample_kl.sh", word).stdout for word in ("--help", "-h"))
    assert short == long
    for name in ("SAMPLERS", "LEARNING_RATE", "RUN_DIR", "KL_PROMPTS", "DRY_RUN"):
        assert f"{name}=" in long


@pytest.mark.parametrize("driver", [*RECIPE_OF, "sample_ablation.sh"])
def test_help_shows_the_values_of_the_drivers_own_recipe(driver):
    shown = bash(f"alignment/{driver}", "--help").stdout
    of_recipe = vars(resolve([f"RECIPE={RECIPE_OF.get(driver, 'ablation')}", "DRY_RUN=1"]))
    for name in ("SAMPLERS", "ITERS", "LEARNING_RATE", "TEST_END"):
        assert f"  {name}={show(of_recipe[name])}\n" in shown


def test_settings_reach_their_flags():
    """Each with a value of its own; flags that repeat a script's default are left out."""
    train = {
        "LOSS_TYPE": ("ipo", "--loss_type"),
        "CHOOSE_TYPE": ("max_min_p", "--choose_type"),
        "LENGTH_PENALTY": ("0.01", "--length_penalty"),
        "BETA": ("0.25", "--beta"),
        "ATTENTION": ("eager", "--attn_implementation"),
        "SAVE_DTYPE": ("bfloat16", "--save_dtype"),
        "LORA_R": ("8", "--lora_r"),
        "LORA_ALPHA": ("16", "--lora_alpha"),
        "LORA_TARGETS": ("q_proj,v_proj", "--lora_target_modules"),
        "OPTIMIZER": ("adafactor", "--optim"),
        "DDP_TIMEOUT": ("60", "--ddp_timeout"),
        "MAX_STEPS": ("5", "--max_steps"),
        "SAVE_MINUTES": ("20", "--save_minutes"),
        "LABELS": ("sampled", "--labels"),
        "LABEL_NOISE": ("0.25", "--label_noise"),
    }
    given = {name: value for name, (value, _) in train.items()}
    words = dict(plan(TRAIN, ITERS=1, USE_LORA=1, **given))["train 1 online"]
    assert {name: (flag(words, option), option) for name, (_, option) in train.items()} == train
    assert flag(words, "--use_lora") == "True"
    plain = dict(plan(TRAIN, ITERS=1))["train 1 online"]
    assert not {"--use_lora", "--lora_r", "--labels", "--label_noise", "--attn_implementation"} & set(plain)
    annotate = dict(plan(TRAIN, ITERS=1, TOKEN_BUDGET=64, REWARD_MAX_LENGTH=32))["annotate 1 online"]
    assert flag(annotate, "--token_budget") == "64" and flag(annotate, "--max_length") == "32"
    own = dict(plan(TRAIN, ITERS=1, REWARD_FUNCTION="rules.py:exact"))["annotate 1 online"]
    assert flag(own, "--reward_function") == "rules.py:exact" and "--reward_name_or_path" not in own
    trl = dict(plan(TRAIN, ITERS=1, TRAINER="trl", TRL_LOSS_TYPE="ipo"))["train 1 online"]
    assert flag(trl, "--loss_type") == "ipo"
    assert any(word.endswith("run_trl.py") for word in trl)


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ("avx2", False),
        ("avx512f avx512_bf16", True),  # AMD since Zen 4
        ("avx512f avx512_bf16 avx512_fp16 amx_bf16", True),
        ("avx512f avx512_bf16 avx512_fp16", False),  # the same, in a virtual machine without AMX: measured, 0.7 times
    ],
)
def test_native_bfloat16_is_where_it_is_faster(flags, faster, monkeypatch):
    monkeypatch.setattr(machine, "cpu_field", {"flags": flags}.get)
    s = resolve(["RECIPE=quickstart"])
    for found, where_faster in ((s.BF16, "True"), (s.REWARD_DTYPE, "bfloat16")):
        assert found == (where_faster if faster else None)


def test_how_many_commands_run_at_once():
    alone, with_gpus = ["python", "x.py"], ["env", "CUDA_VISIBLE_DEVICES=0", "python", "x.py"]
    assert stages.at_once(Settings(GPUS=0, SIDE_BY_SIDE=2), "train", [alone] * 4) == 2
    assert stages.at_once(Settings(GPUS=0, SIDE_BY_SIDE=2), "annotate_evaluation", [alone] * 2) == 1
    assert stages.at_once(Settings(GPUS=8, SIDE_BY_SIDE=2), "train", [alone] * 4) == 1  # each takes all GPUs
    assert stages.at_once(Settings(GPUS=8), "evaluate", [with_gpus] * 4) == 4


def test_side_by_side_divides_the_models_and_loses_none(tmp_path):
    given = {"RECIPE": "quickstart", "RUN_DIR": tmp_path}
    alone, both = (plan("sample_eval_safe_rlhf.sh", SIDE_BY_SIDE=n, **given) for n in (1, 2))
    of = [
        [line for stage, words in commands if stage == "evaluate" for line in in_turn(words)]
        for commands in (alone, both)
    ]
    assert sorted(of[0]) == sorted(of[1]) and sum(stage == "evaluate" for stage, _ in both) == 2


def test_the_ablation_gives_every_seed_the_same_first_iteration():
    words = settings(DRY_RUN=1, RUN_DIR="/study", SEEDS="4 5", SAMPLERS="online pilaf")
    result = bash("alignment/sample_ablation.sh", *words)
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"^\[(.+?)\] (.+)$", result.stdout, re.MULTILINE)
    expected = ["generate 1 online", "annotate 1 online", "train 1 online"]
    for seed in (4, 5):
        # Two commands side by side, in most stages. Nothing is there yet that would serve both evaluation and KL.
        train = [*["generate 2 online pilaf"] * 2, "annotate 2 online pilaf", "train 2 online", "train 2 pilaf"]
        evaluate = ["evaluate", "evaluate", "annotate_evaluation", "annotate_evaluation", "summarize"]
        kl = ["kl_responses", "kl_responses", "annotate_kl", "annotate_kl", "kl", "kl", "summarize"]
        for rest in (train, evaluate, kl):
            expected += [f"seed {seed}", *rest]
    assert [stage for stage, _ in lines] == [*expected, "compare_seeds"]
    trainings = [command for stage, command in lines if stage.startswith("train 2")]
    assert all("--model_name_or_path /study/shared/models/rlhflow_iter1 " in command for command in trainings)
    assert ["--seed 4" in command for command in trainings] == [True, True, False, False]
    assert "/study/seed_5/models/rlhflow_iter2_pilaf" in trainings[-1]
    assert "SEEDS" in refused("sample_ablation.sh", SEEDS="1;2")


@pytest.mark.parametrize("names", [[".venv"], [".venv", ".venv-rlhflow"], [".venv-rlhflow"]])
def test_assets_are_unpacked_where_their_packages_are(names, tmp_path, monkeypatch):
    """The quickstart makes `.venv`, which has them; environments for GPUs, which win elsewhere, do not."""
    for name in names:
        python = tmp_path / name / "bin/python"
        python.parent.mkdir(parents=True)
        python.touch(0o755)
    monkeypatch.setattr(machine, "PROJECT", tmp_path)
    for stage in (stages.unpack, stages.human_labels):
        [command] = stage(Settings(ASSETS="/assets"))
        assert command[0] == str(tmp_path / names[0] / "bin/python")
    of_gpus, of_cpu = (stages.python(Settings(GPUS=gpus), "rlhflow") for gpus in (1, 0))
    assert of_gpus == str(tmp_path / names[-1] / "bin/python") and of_cpu == str(tmp_path / names[0] / "bin/python")
