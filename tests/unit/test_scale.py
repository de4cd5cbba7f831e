"""The size calculator against transformers' own models, real caches, real files, and sums done by hand."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from commands import PROJECT, run
from safetensors import safe_open
from tiny import save_tiny_policy, save_tiny_reward_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from benchmarks import cost, scale, stage_cost
from benchmarks.cost import REWARD_MODEL, SHAPES, Hardware, Shape, Workload
from scripts import memory

SCRIPT = PROJECT / "benchmarks" / "scale.py"
PLAIN = Hardware(memory_share=1, bandwidth_share=1, flops_share=1, link_share=1, latency=0, overhead=0)


def script(*words) -> "object":
    return run([sys.executable, str(SCRIPT), *map(str, words)])


def llama(shape: Shape, **options) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        **options,
    )


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny model with fewer KV heads than heads."""
    return save_tiny_policy(
        tmp_path_factory.mktemp("scale") / "p", 0, hidden=48, layers=3, heads=3, key_value_heads=1
    )


@pytest.mark.parametrize("shape", [*SHAPES.values(), replace(SHAPES["7B"], tied=True)])
def test_parameters_are_those_of_transformers(shape):
    with torch.device("meta"):
        assert shape.parameters == count(LlamaForCausalLM(llama(shape)))


def test_parameters_of_a_reward_model():
    with torch.device("meta"):
        model = LlamaForSequenceClassification(llama(REWARD_MODEL, num_labels=1))
    assert REWARD_MODEL.parameters == count(model)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"head_dim": 8}])
def test_shape_and_file_of_a_saved_model(options, tmp_path):
    """Read from its config.json: parameters, and the bytes of the tensors in its file."""
    folder = save_tiny_policy(tmp_path / "p", 0, hidden=48, layers=3, heads=3, key_value_heads=1, **options)
    shape = scale.read_shape(str(folder))
    assert shape.parameters == count(AutoModelForCausalLM.from_pretrained(folder))
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
    assert memory.model_file_bytes(shape, bytes_each=4) == sum(t.numel() * t.element_size() for t in tensors)


def test_kv_cache_is_that_of_a_real_one(policy):
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    model(torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert len(tensors) == 6 and memory.kv_bytes(scale.read_shape(str(policy)), 2 * 7) == real


def test_flops_are_those_that_torch_counts(policy):
    """One sequence of 16 tokens; torch counts every position against all 16."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(policy, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.long))
    shape = scale.read_shape(str(policy))
    norms = 2 * 16 * shape.hidden * (2 * shape.layers)  # elementwise, so torch counts no FLOP
    assert counter.get_total_flops() == cost.forward_flops(shape, 16, 16) - norms


def test_training_bytes_by_hand():
    assert memory.WEIGHT + memory.GRADIENT + memory.OPTIMIZER == 16
    # 800 parameters on 8 GPUs: 100 each; its shard's gradient is there in float32 too while it is updated.
    assert memory.training_bytes(800, 8) == 100 * (2 + 2 + 4 + 4 + 4) + 100 * 4
    # A shard of 2.5e9 is updated 1e9 at a time.
    assert memory.training_bytes(20 * 10**9, 8) == 2.5e9 * 16 + 4e9
    assert memory.checkpoint_bytes(SHAPES["7B"]) == 14 * 6_738_415_616


def test_adam_really_keeps_two_moments(policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    states = sum(t.numel() * t.element_size() for t in moments)
    assert states + 4 * count(model) == memory.OPTIMIZER * count(model)


def test_decode_step_by_hand():
    """7B on one GPU, one response of 128 + 64 tokens: all weights but the embeddings, and 192 tokens' cache."""
    shape, work = SHAPES["7B"], Workload(max_num_seqs=1)
    read = 2 * (6_738_415_616 - 32000 * 4096 - 4096) + 2 * 4096 * 64 + 192 * 524_288
    terms = stage_cost.decode_step([shape], work, PLAIN, 1, 1)
    assert terms["memory bandwidth"] == pytest.approx(read / 3.35e12, rel=1e-4)
    assert terms["interconnect"] == 0
    both = stage_cost.decode_step([shape, shape], work, PLAIN, 1, 1)
    assert both == pytest.approx({kind: 2 * seconds for kind, seconds in terms.items()})


def test_collectives_by_hand():
    eight = PLAIN.collective(8e9, 8)
    assert eight == pytest.approx(7e9 / 450e9)  # each GPU receives the 7 parts that it does not have
    assert PLAIN.collective(8e9, 64) == pytest.approx(8e9 * 63 / 64 / 400e9)  # a node's adapters together
    assert replace(PLAIN, network=1e9).collective(8e9, 64) == pytest.approx(8e9 * 63 / 64 / 8e9)
    assert PLAIN.collective(8e9, 1) == 0
    assert replace(PLAIN, latency=1e-5).collective(0, 16, operations=3) == pytest.approx(6e-5)


def test_an_engine_with_the_batch_that_fits_fits_and_one_more_response_does_not():
    work, hardware = Workload(), Hardware()
    for models in ([SHAPES["7B"]], [SHAPES["7B"]] * 2, [SHAPES["70B"]], [SHAPES["70B"]] * 2):
        parallel = stage_cost.parallel_needed(models, work, hardware, 8)
        most = stage_cost.batch_that_fits(models, work, hardware, parallel)
        for batch, fits in ((most, True), (most + 1, False)):
            full = replace(work, max_num_seqs=batch)
            caches = batch * sum(memory.kv_bytes(m, 256) / parallel for m in models)
            weights = sum(2 * m.parameters for m in models) / parallel
            assert (weights + caches <= hardware.usable) == fits
            row = stage_cost.sampling("", models, full, hardware, parallel, 10**6, engines=1)
            assert row.fits == fits and row.layout == f"1 x TP {parallel}, {batch} at a time"


def test_training_time_by_hand():
    """7B, 8 GPUs, batch 16: 1250 steps of two passes, each of which moves 3 x 2 P bytes; arithmetic is shorter."""
    shape = SHAPES["7B"]
    pass_seconds = 3 * 2 * shape.parameters * 7 / 8 / 450e9
    update_seconds = 28 * shape.parameters / 8 / 3.35e12
    row = stage_cost.training(shape, Workload(), replace(PLAIN, flops=1e18), 8)
    assert row.bound == "interconnect"
    assert row.seconds == pytest.approx(1250 * (2 * pass_seconds + update_seconds))


@pytest.mark.parametrize(("gpus", "batch"), [(1, 16), (8, 16), (16, 16), (12, 24), (64, 64)])
def test_batch_is_one_that_the_driver_takes(gpus, batch):
    assert stage_cost.global_batch(Workload(), gpus) == batch


def test_what_does_not_fit_has_no_time():
    table = scale.stage_table(scale.stages(SHAPES["70B"], 8, Workload(), Hardware()))
    [row] = [line for line in table.splitlines() if line.startswith("| training |")]
    assert "**no** | – | –" in row
    assert stage_cost.gpus_to_train(SHAPES["70B"], Workload(), Hardware()) == 24
    assert math.ceil(16 * SHAPES["70B"].parameters / Hardware().usable) == 17  # the states alone: three nodes


def test_document_holds_the_scripts_tables(tmp_path):
    printed = script()
    assert printed.returncode == 0, printed.stderr
    text = (PROJECT / "docs" / "scale.md").read_text()
    inside = text.partition(scale.BEGIN)[2].partition(scale.END)[0]
    assert inside.strip() == printed.stdout.strip(), "run: python benchmarks/scale.py --document docs/scale.md"
    copy = tmp_path / "copy.md"
    copy.write_text(text.replace(inside, "\nold\n"))
    assert script("--document", copy).returncode == 0
    assert copy.read_text() == text


def test_model_folder_and_flags(policy):
    printed = script("--model", policy, "--gpus", 2, "--gpu_memory", 24)
    assert printed.returncode == 0, printed.stderr
    parameters = count(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy)))
    assert f"| parameters | {parameters:,} |" in printed.stdout
    assert "**p on 2 GPUs**" in printed.stdout


def test_errors_are_one_line(tmp_path):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    reward = save_tiny_reward_model(tmp_path / "reward", 0)
    (reward / "config.json").write_text('{"model_type": "llama"}')
    for words, part in (
        (("--model", tmp_path / "no"), "no/config.json: No such file"),
        (("--model", encoder), "a bert model"),
        (("--model", reward), "'num_attention_heads'"),
        (("--gpus", "0"), "argument --gpus: '0'"),
        (("--document", encoder / "config.json"), "has no lines '<!-- begin"),
    ):
        done = script(*words)
        assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
