"""What a sampler's row asks for: implicit rewards against plain forward passes; candidates, choices, histories."""

import json
import types

import pytest
from commands import python
from tiny import tiny_tokenizer
from training_runs import BETA, flags, logp, losses, make_instances, write_data
from transformers import AutoModelForCausalLM

from common.record_stream import read_records
from common.records import read_json
from dpo_iteration import data, reference, run_dpo
from dpo_iteration.options import parse
from dpo_iteration.rows import Encoder


def implicit_rewards(models, instance: dict) -> list[float]:
    """By one plain forward pass a model and response."""
    loaded = [AutoModelForCausalLM.from_pretrained(name) for name in models]
    tokenizer = tiny_tokenizer()
    values = []
    for response, why in zip(instance["responses"], instance["stop_reasons"], strict=True):
        ours, theirs = (logp(model, tokenizer, instance["prompt"], response, why == "stop") for model in loaded)
        values.append(BETA * (ours - theirs))
    return values


def test_implicit_rewards_are_those_of_plain_forward_passes(models, tmp_path):
    instances = make_instances(seed=3)  # three responses each: one stands in a row of its own
    options, training = parse(flags(models, write_data(tmp_path / "d.json", instances), tmp_path / "out"))
    encoder = Encoder(tiny_tokenizer(), options.max_prompt_length, options.max_length)
    found = reference.implicit_rewards(instances, 3, encoder, tmp_path, options, training, ("float32", False))
    for instance, values in zip(instances, found, strict=True):
        assert values.tolist() == pytest.approx(implicit_rewards(models, instance), abs=1e-4)


def test_training_takes_the_pair_that_the_sampler_asks_for(models, tmp_path, monkeypatch):
    instances = make_instances(seed=4, rows=6)
    seen = types.SimpleNamespace(pairs=None)
    original = data.choose_all

    def watched(*arguments, **options):
        seen.pairs = list(original(*arguments, **options))
        return iter(seen.pairs)

    monkeypatch.setattr(data, "choose_all", watched)
    content = {"instances": instances, "settings": {"generate": {"choose_type": "implicit_max_min"}}}
    (tmp_path / "d.json").write_text(json.dumps(content))
    run_dpo.main(flags(models, tmp_path / "d.json", tmp_path / "out"))
    assert losses(tmp_path / "out")
    assert read_json(tmp_path / "out/settings.json")["train"]["choose_type"] == "implicit_max_min"
    for instance, pair in seen.pairs:
        by_hand = implicit_rewards(models, instance)
        ends = {by_hand.index(max(by_hand)), by_hand.index(min(by_hand))}
        assert {pair.chosen, pair.rejected} == ends
        assert instance["rewards"][pair.chosen] > instance["rewards"][pair.rejected]


def test_an_unknown_choice_in_the_data_is_one_line(models, tmp_path):
    content = {"instances": make_instances(), "settings": {"generate": {"choose_type": "best"}}}
    (tmp_path / "d.json").write_text(json.dumps(content))
    result = python("dpo_iteration/run_dpo.py", *flags(models, tmp_path / "d.json", tmp_path / "out"))
    assert result.returncode == 2 and "choose_type 'best' is unknown" in result.stderr.splitlines()[-1]


def generate(models, tmp_path, *more):
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a cat."}, {"prompt": "a dog."}]))
    words = "--backend", "hf", "--max_new_tokens", 6, "--max_input_length", 16, "--temperature", 1.0
    policy, reference = models
    return python(
        "generation/generate.py", "--model_name_or_path", policy, "--ref_model_name_or_path", reference,
        "--dataset_name_or_path", tmp_path / "p.json", *words, "--output_file", tmp_path / "out.json", *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sampler", "count", "choice"),
    [
        ("best-worst", 8, "max_min"),
        ("implicit-best-worst", 8, "implicit_max_min"),
        ("random-pairs", 8, "random"),
    ],
)
def test_a_row_brings_its_candidates_and_its_choice(models, tmp_path, sampler, count, choice):
    result = generate(models, tmp_path, "--sampler", sampler)
    assert result.returncode == 0, result.stderr
    instances, settings = read_records(tmp_path / "out.json")
    assert [len(i["responses"]) for i in instances] == [count, count]
    assert settings["generate"]["choose_type"] == choice and settings["generate"]["K"] == count


def test_history_mixes_the_previous_policy(models, tmp_path):
    refused = generate(models, tmp_path, "--sampler", "history")
    assert refused.returncode == 2 and "--previous_model_name_or_path" in refused.stderr
    result = generate(models, tmp_path, "--sampler", "history", "--previous_model_name_or_path", models[1])
    assert result.returncode == 0, result.stderr
    rows = read_records(tmp_path / "out.json")[0]
    (tmp_path / "out.json").unlink()
    # The same weights over the same two models: xpo with the previous policy as the reference.
    assert generate(models, tmp_path, "--sampler", "xpo").returncode == 0
    assert read_records(tmp_path / "out.json")[0] == rows
