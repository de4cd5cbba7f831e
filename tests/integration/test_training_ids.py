"""Training on the ids that were sampled: no response is encoded again, and a file without ids trains as before."""

import itertools
import json
import math

import pytest
import torch
from tiny import save_tiny_policy, tiny_tokenizer
from training_runs import (
    BETA,
    SCALE,
    TURN,
    flags,
    losses,
    make_instances,
    sampled_instances,
    train,
    write_data,
    write_sampled,
)
from transformers import AutoModelForCausalLM

from common.cli import UserError
from common.models import encode_prompt, encode_response
from dpo_iteration import run_dpo
from dpo_iteration.rows import open_rows


def logp_of_ids(model, prompt: list[int], ids: list[int]) -> float:
    """Sum of log pi(token | all before), one sequence, no padding."""
    with torch.no_grad():
        table = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(table[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


def expected(models, instances, responses) -> tuple[float, list[float]]:
    """(mean rev_kl of the max_min pairs, mean policy log-probabilities of chosen and rejected) on given ids."""
    policy, ref = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in models)
    total, sums = 0.0, [0.0, 0.0]
    for instance, ids in zip(instances, responses, strict=True):
        rewards, prompt = instance["rewards"], encode_prompt(tiny_tokenizer(), instance["prompt"])
        h = 0.0
        for side, (sign, i) in enumerate(((1, rewards.index(max(rewards))), (-1, rewards.index(min(rewards))))):
            ours = logp_of_ids(policy, prompt, ids[i])
            sums[side] += ours / len(instances)
            h += sign * (ours - logp_of_ids(ref, prompt, ids[i]))
        p, q = (1 / (1 + math.exp(-x)) for x in (SCALE * (max(rewards) - min(rewards)), BETA * h))
        total -= (p * math.log(q) + (1 - p) * math.log(1 - q)) / len(instances)
    return total, sums


def test_the_sampled_ids_are_trained(models, tmp_path, capsys):
    """Loss and logged log-probabilities are those of the ids; the count of texts that would differ is printed."""
    instances = sampled_instances()
    data = write_sampled(tmp_path / "d.json", instances)
    got = train(models, data, tmp_path / "out")
    wanted, sums = expected(models, instances, [instance["response_ids"] for instance in instances])
    assert got[0] == pytest.approx(wanted, abs=2e-6)
    entry = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert [entry["logps/chosen"], entry["logps/rejected"]] == pytest.approx(sums, abs=1e-4)
    used = [i for one in instances for i in (f(range(3), key=one["rewards"].__getitem__) for f in (max, min))]
    assert f"{used.count(0)} responses whose text would encode differently" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["other tokenizer", "no fingerprint", "no ids", "null"])
def test_text_is_encoded_where_the_ids_are_not_the_policys(models, tmp_path, capsys, change):
    instances = sampled_instances()
    data = write_sampled(tmp_path / "d.json", instances, "0123456789abcdef")
    if change == "no fingerprint":
        write_data(data, instances)
    if change == "null":  # as joined Arrow data has it
        write_sampled(data, [{**instance, "response_ids": None} for instance in instances])
    if change == "no ids":
        for instance in instances:
            del instance["response_ids"]
        write_sampled(data, instances)
    got = train(models, data, tmp_path / "out")
    from_text = [
        [
            encode_response(tiny_tokenizer(), text, why == "stop")
            for text, why in zip(instance["responses"], instance["stop_reasons"], strict=True)
        ]
        for instance in instances
    ]
    assert got[0] == pytest.approx(expected(models, instances, from_text)[0], abs=2e-6)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{data}: it")]
    assert len(printed) == 1 and "response_ids" in printed[0] and "encode differently" not in printed[0]


def test_text_of_control_tokens_in_responses_is_text(models, tmp_path):
    """A response that spells out EOS does not end there."""
    instances = make_instances(rows=1)
    instances[0]["responses"] = ["ab</s>cd", "ef", "gh"]
    instances[0]["rewards"] = [1.0, 0.0, 0.5]
    rows = rows_of(models, write_data(tmp_path / "d.json", instances), tmp_path)
    ended = instances[0]["stop_reasons"][0] == "stop"
    assert rows[0]["chosen_ids"].count(2) == ended and len(rows[0]["chosen_ids"]) > 4


def test_a_tokenizer_without_eos_ends_no_response(models, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    names = [save_tiny_policy(tmp_path / name, seed, tokenizer) for seed, name in enumerate("pr")]
    instances = make_instances()
    rows = rows_of(names, write_data(tmp_path / "d.json", instances), tmp_path)
    assert len(rows) == 4 and not any(2 in row["chosen_ids"] + row["rejected_ids"] for row in rows)


def rows_of(models, data, tmp_path, **more):
    """The rows that a training is given; its working folder is looked at when the reference pass begins."""
    seen = []

    def stop(rows, *_):
        seen.extend(rows)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_dpo, "add_reference_logps", stop)
        run_dpo.main(flags(models, data, tmp_path / "rows", **more))
    assert len(open_rows(tmp_path / "rows.partial" / "rows.arrow")) == len(seen)
    return seen


def test_cutting_dropping_and_implicit_rewards_go_by_ids(models, tmp_path, capsys):
    instances = sampled_instances(rows=2)
    instances[0]["response_ids"] = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 8, TURN]]
    instances[0]["prompt"] = "a"  # BOS and one letter: 3 tokens are left for a response
    instances[0]["rewards"] = [1.0, 0.5, 0.75]
    data = write_sampled(tmp_path / "d.json", instances)
    rows = rows_of(models, data, tmp_path, max_length=5, max_prompt_length=2)
    assert all(len(row["chosen_ids"]) <= 3 for row in rows) and len(rows) == 1  # the first is [5, 6, 7] twice
    assert "1 pairs dropped: identical after cutting" in capsys.readouterr().out
    both = train(models, data, tmp_path / "implicit", choose_type="implicit_max_min")
    assert len(both) == 1 and json.loads(data.with_name("d.json.candidates_policy_logps.json").read_text())["logps"]
    cached = json.loads(data.with_name("d.json.candidates_reference_logps.json").read_text())["logps"]
    ref = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32).eval()
    for (first, second), instance in zip(cached[::2], instances, strict=True):
        prompt = encode_prompt(tiny_tokenizer(), instance["prompt"])
        wanted = [logp_of_ids(ref, prompt, ids) for ids in instance["response_ids"][:2]]
        assert [first, second] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("where", [0, 1])
def test_ids_that_the_policy_does_not_know_are_refused(models, tmp_path, where):
    instances = sampled_instances()
    instances[where]["response_ids"][2][0] = 36
    data = write_sampled(tmp_path / "d.json", instances)
    with pytest.raises(UserError, match=f"d.json: row {where}: .*response_ids"):
        run_dpo.main(flags(models, data, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_a_row_without_the_ids_that_others_have_is_refused(models, tmp_path):
    instances = sampled_instances()
    instances[1]["response_ids"] = None
    with pytest.raises(UserError, match="d.json: row 1: .*response_ids"):
        run_dpo.main(flags(models, write_sampled(tmp_path / "d.json", instances), tmp_path / "out"))


def test_sampled_labels_train_hard_losses(models, tmp_path):
    """rev_kl on drawn labels is the sigmoid loss of the same draws; another label seed draws others."""
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    runs = itertools.product(("rev_kl", "sigmoid"), (0, 1))
    got = {
        (loss, seed): train(
            models,
            data,
            tmp_path / f"{loss}{seed}",
            loss_type=loss,
            labels="sampled",
            label_seed=seed,
            margin_scale=1,
        )
        for loss, seed in runs
    }
    assert got["rev_kl", 0] == pytest.approx(got["sigmoid", 0], abs=1e-6)
    assert got["rev_kl", 0] != pytest.approx(got["rev_kl", 1], abs=1e-4)
    assert losses(tmp_path / "rev_kl0") == got["rev_kl", 0]
    settings = json.loads((tmp_path / "rev_kl0" / "settings.json").read_text())["train"]
    assert (settings["labels"], settings["label_seed"]) == ("sampled", 0)


def test_label_noise_of_one_half_says_nothing(models, tmp_path):
    """p = 1/2 for every pair: with the policy as its own reference the loss is log 2 whatever the rewards are."""
    data = write_data(tmp_path / "d.json", make_instances())
    got = train((models[0], models[0]), data, tmp_path / "out", label_noise=0.5)
    assert got[0] == pytest.approx(math.log(2), abs=1e-6)
    noisy = train(models, data, tmp_path / "noisy", label_noise=0.2)
    assert noisy[0] != pytest.approx(train(models, data, tmp_path / "clean")[0], abs=1e-4)
