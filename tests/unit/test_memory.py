"""What the drivers refuse before anything is generated, against sums done by hand."""

import json
import re

import pytest
from plans import fake_nvidia_smi, flag, plan, refused

from common.cli import UserError
from scripts import memory
from scripts.resolve import resolve

TRAIN = "sample_train_safe_rlhf.sh"
SEVEN = memory.SIZES[6.7]
P = 6_738_415_616
MIB_80, MIB_24 = 81559, 24564


def settings(*words):
    return resolve(["RECIPE=safe_rlhf", "GPUS=1", "PER_DEVICE_BATCH=1", *words])


def test_a_trained_7b_has_16_bytes_per_parameter():
    assert SEVEN.parameters == P
    activations = 2 * 512 * (32 * 4096 + 8 * 4096 + 4 * 11008)
    by_hand = 16 * P + 4e9 + 2 * 5e8 + 4e9 + activations  # a sub-group in float32, a bucket, the overhead
    assert memory.training_need(settings(), SEVEN) == pytest.approx(by_hand)
    eight = 16 * P / 8 + 4 * P / 8 + 2 * 1e9 + 2 * 5e8 + 4e9 + activations
    assert memory.training_need(settings("GPUS=8"), SEVEN) == pytest.approx(eight)


def test_adapters_of_a_7b():
    """Rank 16 on all linear layers: 40.0 million, as peft prints for Llama-2-7B."""
    assert memory.lora_parameters(SEVEN, 16) == 39_976_960
    words = "USE_LORA=1", "ACCELERATE_CONFIG=single"
    rest = memory.training_need(settings(*words), SEVEN) - 2 * P
    assert 4e9 < rest < 6e9
    four_bit = memory.training_need(settings(*words, "QLORA=1"), SEVEN)
    assert four_bit == pytest.approx(rest + 0.6 * P)


def test_responses_that_fit_and_one_more_does_not():
    """Policy and reference of 7B on 80 GB: 256 tokens of a response have 0.27 GB of keys and values."""
    room = 50e9
    count = memory.batch_that_fits([SEVEN, SEVEN], 256, room, 1)
    each = 2 * 256 * 2 * 32 * 4096 * 2
    assert 4 * P + count * each <= room < 4 * P + (count + 1) * each


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("PKU-Alignment/alpaca-7b-reproduced", 6.7),
        ("openlm-research/open_llama_3b_v2", 3.2),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.2),
        ("meta-llama/Llama-2-70b-hf", 69.0),
        ("sfairXC/FsfairX-LLaMA3-RM-v0.1", None),
        ("owner/model-b7", None),
    ],
)
def test_size_by_name(name, size, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert memory.find_shape(name) == (memory.SIZES[size] if size else None)


def test_shape_of_a_folder_and_of_the_hubs_cache(tmp_path, monkeypatch):
    config = {
        "num_attention_heads": 4,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "vocab_size": 99,
    }
    for folder in (tmp_path / "model", tmp_path / "models--owner--name-7b/snapshots/abc"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    expected = memory.Shape(2, 64, 4, 4, 128, 99, 16)
    assert memory.find_shape(str(tmp_path / "model")) == memory.find_shape("owner/name-7b") == expected


def test_7b_does_not_train_whole_on_one_gpu_and_what_is_named_does(tmp_path):
    card = fake_nvidia_smi(tmp_path, 1, MIB_80)
    line = refused(TRAIN, card, DRY_RUN=1)
    assert "117 GB" in line or "118 GB" in line
    for words in ({"USE_LORA": 1, "ACCELERATE_CONFIG": "single"}, {"ACCELERATE_CONFIG": "zero3_offload"}):
        assert all(f"{name}={value}" in line for name, value in words.items())
        assert plan(TRAIN, card, ITERS=1, **words)
    assert plan(TRAIN, fake_nvidia_smi(tmp_path / "x", 2, MIB_80), ITERS=1)


@pytest.mark.parametrize(("recipe", "mebibytes"), [("one_gpu_80gb", MIB_80), ("one_gpu_24gb", MIB_24)])
@pytest.mark.parametrize("driver", [TRAIN, "sample_eval_safe_rlhf.sh", "sample_kl.sh"])
def test_recipes_of_one_gpu_fit_on_it(recipe, mebibytes, driver, tmp_path):
    commands = plan(driver, fake_nvidia_smi(tmp_path, 1, mebibytes), RECIPE=recipe)
    for stage, words in commands:
        if stage.startswith("train"):
            assert flag(words, "--use_lora") == "True" and words[1].endswith("run_dpo.py")
        assert "--num_engines" not in words


def test_what_is_said_to_fit_is_not_refused(tmp_path):
    """70B: 4-bit weights cannot be sharded, GPUs have equal shares of 32 pairs, and not one of two machines."""
    card = fake_nvidia_smi(tmp_path, 8, MIB_80)
    given = {"RECIPE": "one_gpu_24gb", "BASE_MODEL": "meta-llama/Llama-2-70b-hf", "LORA_R": 64, "DRY_RUN": 1}
    line = refused(TRAIN, card, ACCELERATE_CONFIG="zero2", QLORA=0, **given)
    assert "USE_LORA=1 QLORA=1 ACCELERATE_CONFIG=single" in line
    assert int(re.search(r"; ACCELERATE_CONFIG=zero3 on (\d+) GPUs", line)[1]) in (2, 4, 8)
    line = refused(TRAIN, card, NUM_MACHINES=2, QLORA=0, USE_LORA=0, ACCELERATE_CONFIG="zero3", **given)
    assert "single" not in line and re.search(r"zero3 on (16|32) GPUs", line)


def test_on_a_machine_of_eight_they_still_train_one_process_with_the_same_batch(tmp_path):
    """accelerate would start one process for any number and divide the batch by it."""
    one, eight = (fake_nvidia_smi(tmp_path / str(n), n, MIB_80) for n in (1, 8))
    trainings = [dict(plan(TRAIN, gpus, RECIPE="one_gpu_80gb"))["train 2 mixp"] for gpus in (one, eight)]
    assert trainings[0] == trainings[1]
    together = [
        flag(trainings[0], f"--{name}") for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    assert together == ["4", "4"]  # 16 pairs


def test_zero2_holds_all_weights_and_a_share_of_the_rest(tmp_path):
    activations = 2 * 512 * (32 * 4096 + 8 * 4096 + 4 * 11008)
    by_hand = 2 * P + 14 * P / 8 + 4 * P / 8 + 2 * 5e8 + 4e9 + activations
    assert memory.training_need(settings("GPUS=8", "ACCELERATE_CONFIG=zero2"), SEVEN) == pytest.approx(by_hand)
    assert plan(TRAIN, fake_nvidia_smi(tmp_path, 8, MIB_80), ITERS=1, ACCELERATE_CONFIG="zero2")


def test_a_smaller_gpu_is_refused(tmp_path):
    assert "one_gpu" not in refused(TRAIN, fake_nvidia_smi(tmp_path, 1, MIB_24), DRY_RUN=1, RECIPE="one_gpu_80gb")
    line = refused("sample_kl.sh", fake_nvidia_smi(tmp_path, 1, 40960), DRY_RUN=1, RECIPE="one_gpu_80gb")
    assert "KL_DTYPE=bfloat16" in line


@pytest.mark.parametrize(("size", "dtype", "hint"), [(8, "float32", None), (4, "bfloat16", None), (4, "float32", 8)])
def test_both_70b_models_of_the_kl_are_spread_over_the_gpus_of_an_engine(size, dtype, hint, tmp_path):
    """552 GB in float32 are 69 GB on each of 8 GPUs and 138 GB on each of 4."""
    card = fake_nvidia_smi(tmp_path, 8, MIB_80)
    given = {"BASE_MODEL": "meta-llama/Llama-2-70b-hf", "TENSOR_PARALLEL_SIZE": size, "KL_DTYPE": dtype}
    if hint is None:
        assert plan("sample_kl.sh", card, **given)
    else:
        assert f"TENSOR_PARALLEL_SIZE={hint}" in refused("sample_kl.sh", card, DRY_RUN=1, **given)


def test_an_engine_that_does_not_fit_is_told_how_many_gpus_share_it(tmp_path):
    given = {"BASE_MODEL": "meta-llama/Llama-2-70b-hf", "DRY_RUN": 1}
    line = refused("sample_eval_safe_rlhf.sh", fake_nvidia_smi(tmp_path, 8, MIB_80), **given)
    assert "TENSOR_PARALLEL_SIZE=4" in line


def test_responses_at_a_time_come_from_the_memory(tmp_path):
    found = {}
    for name, mebibytes in (("small", 49140), ("large", MIB_80)):
        commands = dict(plan("sample_eval_safe_rlhf.sh", fake_nvidia_smi(tmp_path / name, 1, mebibytes)))
        found[name] = int(flag(commands["evaluate"], "--max_num_seqs"))
    assert 8 <= found["small"] < found["large"] <= 256
    commands = dict(plan("sample_eval_safe_rlhf.sh", fake_nvidia_smi(tmp_path / "own", 1), MAX_NUM_SEQS=5))
    assert flag(commands["evaluate"], "--max_num_seqs") == "5"


@pytest.mark.parametrize(
    ("recipe", "driver", "small", "enough", "hint"),
    [
        # 16 bytes for each of 3.4 billion parameters are 55 GB, and what is left over besides them.
        ("iterative_prompt", "sample_train_iterative_prompt.sh", (1, MIB_24), (1, MIB_80), "USE_LORA=1"),
        ("iterative_prompt", "sample_train_iterative_prompt.sh", (2, MIB_24), (8, MIB_24), "USE_LORA=1"),
        # Policy and reference in float32: 2 x 4 bytes for each of 6.7 billion parameters are 54 GB.
        ("published", "sample_kl.sh", (1, 49140), (1, MIB_80), "KL_DTYPE=bfloat16"),
    ],
)
def test_recipes_are_refused_on_too_small_gpus_and_planned_on_large_ones(
    recipe, driver, small, enough, hint, tmp_path
):
    run = tmp_path / "run"
    line = refused(driver, fake_nvidia_smi(tmp_path / "small", *small), RECIPE=recipe, RUN_DIR=run)
    assert hint in line and not run.exists()
    assert plan(driver, fake_nvidia_smi(tmp_path / "enough", *enough), RECIPE=recipe)


def test_offload_needs_host_memory(monkeypatch):
    s = settings("ACCELERATE_CONFIG=zero3_offload")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * P // 4096 - 1}[name])
    with pytest.raises(UserError, match="zero3_offload"):
        memory.check(s, TRAIN, 80 * 10**9)
