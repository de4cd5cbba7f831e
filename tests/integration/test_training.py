"""`run_dpo.py` on tiny models, in this process: losses against plain forward passes and trl, files, errors."""

import gc
import json
import math

import pytest
import torch
from datasets import Dataset
from tiny import save_tiny_policy, tiny_tokenizer
from training_runs import (
    BETA,
    SCALE,
    expected_loss,
    flags,
    logp,
    losses,
    make_instances,
    train,
    weights,
    write_data,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common.cli import UserError
from dpo_iteration import reference, run_dpo
from dpo_iteration.dpo import DPOTrainer
from dpo_iteration.pairs import PreferencePair
from dpo_iteration.rows import Encoder, build_rows, split_by_prompt


def test_first_loss_is_that_of_plain_forward_passes(models, tmp_path):
    instances = make_instances()
    got = train(models, write_data(tmp_path / "d.json", instances), tmp_path / "out")
    assert got[0] == pytest.approx(expected_loss(models, instances), abs=2e-6)


def test_the_margin_reaches_the_loss(models, tmp_path):
    """Two files that differ in nothing but rewards (same order, other sizes): each has its predicted loss."""
    first = []
    for factor in (1, 3):
        instances = make_instances()
        for instance in instances:
            instance["rewards"] = [factor * r for r in instance["rewards"]]
        data = write_data(tmp_path / f"{factor}.json", instances)
        first.append(train(models, data, tmp_path / f"out{factor}")[0])
        assert first[-1] == pytest.approx(expected_loss(models, instances), abs=2e-6)
    assert abs(first[0] - first[1]) > 1e-3  # 500 times the tolerance above


def test_equal_models_start_from_log_two(models, tmp_path):
    """Iteration 1: the policy is the reference, h = 0, and a margin of 0 gives log 2 for every pair."""
    data = write_data(tmp_path / "d.json", make_instances())
    got = train((models[0], models[0]), data, tmp_path / "out", margin_scale=0)
    assert got[0] == pytest.approx(math.log(2), abs=1e-6)


def test_huge_margins_give_trls_sigmoid_loss(models, tmp_path):
    """The same texts through a real trl DPOTrainer: three logged losses, so gradients and updates agree too."""
    from trl import DPOConfig
    from trl import DPOTrainer as TrlTrainer

    instances = make_instances()
    rows = []
    for instance in instances:
        instance["rewards"] = [1000.0 * i for i in range(3)]
        instance["stop_reasons"] = ["stop"] * 3
        responses = instance["responses"]
        rows.append({"prompt": instance["prompt"], "chosen": responses[2], "rejected": responses[0]})
    data = write_data(tmp_path / "d.json", instances)
    ours = train(models, data, tmp_path / "out", num_train_epochs=3)

    policy, ref = (LlamaForCausalLM.from_pretrained(m, dtype=torch.float32) for m in models)
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=BETA,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=3,
        logging_steps=1,
        save_strategy="no",
        max_length=64,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = TrlTrainer(
        model=policy,
        ref_model=ref,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(models[0]),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"per_device_eval_batch_size": 1}])
def test_accumulation_is_a_larger_batch(models, tmp_path, more):
    """2 x 2 and 1 x 4: the same losses, and the same weights after two epochs."""
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    whole = train(models, data, tmp_path / "whole", num_train_epochs=2)
    parts = train(
        models,
        data,
        tmp_path / "parts",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **more,
    )
    assert len(whole) == 4
    assert parts == pytest.approx(whole, abs=1e-5)
    after, start = weights(tmp_path / "whole"), weights(models[0])
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name
        assert not torch.equal(tensor, start[name]), name


def test_a_last_smaller_batch_weighs_by_its_pairs(models, tmp_path):
    """Five pairs as 2 + 2 + 1 make one step, whose loss and gradient are those of the five together."""
    instances = make_instances(rows=5)
    data = write_data(tmp_path / "d.json", instances)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    whole = train(models, data, tmp_path / "whole", num_train_epochs=2, per_device_train_batch_size=5)
    got = train(models, data, tmp_path / "parts", num_train_epochs=2, **parts)
    assert got == pytest.approx(whole, abs=1e-5)
    assert got[0] == pytest.approx(expected_loss(models, instances), abs=2e-6)
    assert len(got) == 2 and got[1] < got[0] - 1e-3
    after = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name


def test_cached_reference_equals_computed_on_the_fly(models, tmp_path, capsys):
    data = write_data(tmp_path / "d.json", make_instances())
    train(models, data, tmp_path / "one")
    cache = reference.cache_path(str(data))
    stored = json.loads(cache.read_text())["logps"]
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    ref = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32)
    for instance, (chosen, rejected) in zip(make_instances(), stored, strict=True):
        rewards = instance["rewards"]
        for value, i in ((chosen, rewards.index(max(rewards))), (rejected, rewards.index(min(rewards)))):
            ended = instance["stop_reasons"][i] == "stop"
            wanted = logp(ref, tokenizer, instance["prompt"], instance["responses"][i], ended)
            assert value == pytest.approx(wanted, abs=2e-5)
    capsys.readouterr()
    assert train(models, data, tmp_path / "two") == losses(tmp_path / "one")
    assert "read from" in capsys.readouterr().out


def test_stale_cache_is_computed_again(models, tmp_path, capsys):
    """Another reference, or other weights in the same folder: one line says so and the loss is the right one."""
    instances = make_instances()
    data = write_data(tmp_path / "d.json", instances)
    folder = save_tiny_policy(tmp_path / "ref", seed=3)
    train((models[0], folder), data, tmp_path / "one")
    save_tiny_policy(folder, seed=4)
    got = train((models[0], folder), data, tmp_path / "two")
    assert "other weights; computing" in capsys.readouterr().out
    assert got[0] == pytest.approx(expected_loss((models[0], folder), instances), abs=2e-6)
    got = train(models, data, tmp_path / "three")
    assert "other model, weights; computing" in capsys.readouterr().out
    assert got[0] == pytest.approx(expected_loss(models, instances), abs=2e-6)


def test_a_file_with_no_line_breaks_and_foreign_fields(models, tmp_path):
    """What other programs write is read too, in one line or in many."""
    instances = [{**instance, "score": {"of": [1, 2]}} for instance in make_instances()]
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(json.dumps({"instances": instances}))
    many.write_text(json.dumps({"instances": instances, "type": "text_only"}, indent=1))
    wanted = pytest.approx(expected_loss(models, instances), abs=2e-6)
    assert [train(models, data, tmp_path / data.stem)[0] for data in (one, many)] == [wanted, wanted]


def test_checkpoints_by_time(models, tmp_path, monkeypatch):
    """Each step that ends after the time has passed leaves a checkpoint; the last one leaves none."""
    saved = []
    monkeypatch.setattr(DPOTrainer, "_save_checkpoint", lambda self, *_: saved.append(self.state.global_step))
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    more = {"per_device_train_batch_size": 2, "save_steps": 1}
    train(models, data, tmp_path / "often", save_minutes=1e-9, **more)
    assert saved == [1, 2, 3]
    saved.clear()
    train(models, data, tmp_path / "never", save_minutes=60, **more)
    assert saved == []


def test_group_by_length(models, tmp_path):
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    got = train(models, data, tmp_path / "out", train_sampling_strategy="group_by_length")
    assert len(got) == 2


def test_one_model_in_memory_while_training(models, tmp_path, monkeypatch):
    seen = []
    step = DPOTrainer.training_step

    def counting_step(self, *arguments, **options):
        gc.collect()
        seen.append(sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects()))
        return step(self, *arguments, **options)

    gc.collect()
    before = sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())
    monkeypatch.setattr(DPOTrainer, "training_step", counting_step)
    train(models, write_data(tmp_path / "d.json", make_instances()), tmp_path / "out")
    assert seen == [before + 1]


def test_finished_folder(models, tmp_path, capsys):
    """A plain checkpoint with the policy's own tokenizer and settings; nothing else is left behind."""
    data = write_data(tmp_path / "d.json", make_instances())
    arguments = flags(models, data, tmp_path / "out")
    run_dpo.main(arguments)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "trainer_state.json",
        "settings.json",
    } <= files
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert not (tmp_path / "out.partial").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_cache"] and config["dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.padding_side == AutoTokenizer.from_pretrained(models[0]).padding_side
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["train"]["beta"] == BETA and settings["provenance"]["train"]["versions"]["torch"]
    entry = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
    } <= set(entry)
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"])

    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run_dpo.main(arguments)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="beta=0.1, now beta=0.2"):
        run_dpo.main(flags(models, data, tmp_path / "out", beta=0.2))
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_an_empty_output_folder_is_free(models, tmp_path):
    (tmp_path / "out").mkdir()
    assert train(models, write_data(tmp_path / "d.json", make_instances()), tmp_path / "out")


def test_a_foreign_output_folder_is_refused(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="did not write it"):
        run_dpo.main(flags(models, write_data(tmp_path / "d.json", make_instances()), tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_lora_saves_a_merged_model(models, tmp_path):
    """The merged checkpoint loads without peft, is not the base, and equals base + adapter."""
    from peft import PeftModel

    data = write_data(tmp_path / "d.json", make_instances())
    got = train(models, data, tmp_path / "out", use_lora=True, learning_rate=1e-2, num_train_epochs=3, lora_r=4)
    assert got[0] == pytest.approx(expected_loss(models, make_instances()), abs=2e-6)
    assert got[-1] < got[0] - 0.01
    merged, base = weights(tmp_path / "out"), weights(models[0])
    assert set(merged) == set(base)
    adapted = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(models[0], dtype=torch.float32), tmp_path / "out" / "adapter"
    )
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(merged["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_bf16_saves_bf16_and_says_so(models, tmp_path, capsys):
    instances = make_instances()
    got = train(models, write_data(tmp_path / "d.json", instances), tmp_path / "out", bf16=True)
    assert "--save_dtype" in capsys.readouterr().out
    assert got[0] == pytest.approx(expected_loss(models, instances), abs=0.05)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_dropout_is_off_and_tied_embeddings_are_saved(models, tmp_path):
    """Dropout of 0.5 in the policy's configuration changes neither the loss nor what is saved of it."""
    shape = {"attention_dropout": 0.5, "tie_word_embeddings": True}
    policy = save_tiny_policy(tmp_path / "policy", seed=5, sharpness=3.0, **shape)
    instances = make_instances()
    data = write_data(tmp_path / "d.json", instances)
    got = train((policy, models[1]), data, tmp_path / "out")
    assert got[0] == pytest.approx(expected_loss((policy, models[1]), instances), abs=2e-6)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.attention_dropout == 0.5
    assert saved.lm_head.weight is saved.model.embed_tokens.weight


def test_published_generation_config_does_not_lose_the_model(models, tmp_path):
    """Some published models set a temperature with sampling off, which transformers refuses to save."""
    policy = save_tiny_policy(tmp_path / "policy", seed=5)
    path = policy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 0.9}))
    assert train((policy, models[1]), write_data(tmp_path / "d.json", make_instances()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.9


def test_held_out_prompts(models, tmp_path):
    """No prompt is on both sides, the split follows the seed, and evaluation is logged."""
    rows = Dataset.from_list([{"prompt": f"p{i % 10}", "row": i} for i in range(30)])
    kept, held = split_by_prompt(rows, 0.3, seed=1)
    assert len({row["prompt"] for row in held}) == 3 and len(kept) + len(held) == 30
    assert not {row["prompt"] for row in kept} & {row["prompt"] for row in held}
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)
    assert held["row"][:] == split_by_prompt(rows, 0.3, 1)[1]["row"][:] != split_by_prompt(rows, 0.3, 2)[1]["row"][:]
    assert split_by_prompt(rows, 0.0, 1) == (rows, None)

    instances = make_instances(rows=5)
    train(models, write_data(tmp_path / "d.json", instances), tmp_path / "out", eval_fraction=0.2)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert evaluated and "eval_rewards/accuracies" in evaluated[0]
    # With a learning rate of 0 the evaluation loss is that of the held-out pair under the untrained policy.
    train(models, tmp_path / "d.json", tmp_path / "zero", eval_fraction=0.2, learning_rate=0)
    history = json.loads((tmp_path / "zero" / "trainer_state.json").read_text())["log_history"]
    eval_loss = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    singles = [expected_loss(models, [instance]) for instance in instances]
    assert min(abs(eval_loss - single) for single in singles) < 2e-6
    rest = sum(singles) - min(singles, key=lambda s: abs(s - eval_loss))
    assert losses(tmp_path / "zero")[0] == pytest.approx(rest / 4, abs=2e-6)


def build(instance: dict, max_prompt_length: int = 32, max_length: int = 64):
    encoder = Encoder(tiny_tokenizer(), max_prompt_length, max_length)
    rows = list(build_rows(encoder, [(instance, PreferencePair(0, 1, 0.5))], SCALE))
    return rows[0] if rows else None, encoder.counts


def test_bos_once_and_eos_only_after_an_end():
    """BOS 1 stands once, before the prompt; EOS 2 once, after the response that stopped, not after the cut one."""
    for prompt in ("hello", "<s>hello"):
        row, _ = build({"prompt": prompt, "responses": ["ab", "cd"], "stop_reasons": ["stop", "length"]})
        assert row["prompt_ids"].count(1) == 1 and row["prompt_ids"][0] == 1 and 2 not in row["prompt_ids"]
        assert row["chosen_ids"].count(2) == 1 and row["chosen_ids"][-1] == 2 and 1 not in row["chosen_ids"]
        assert len(row["rejected_ids"]) == 2 and not {1, 2} & set(row["rejected_ids"])
    assert row["margin"] == SCALE * 0.5


def test_files_without_stop_reasons_end_every_response(models, tmp_path, capsys):
    row, _ = build({"prompt": "a", "responses": ["ab", "cd"]})
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == 2
    instances = make_instances()
    for instance in instances:
        del instance["stop_reasons"]
    got = train(models, write_data(tmp_path / "d.json", instances), tmp_path / "out")
    assert "no stop_reasons" in capsys.readouterr().out
    ended = [{**instance, "stop_reasons": ["stop"] * 3} for instance in instances]
    assert got[0] == pytest.approx(expected_loss(models, ended), abs=2e-6)


def test_long_prompts_and_responses_are_cut():
    """The prompt loses its beginning but not BOS; a cut response has no EOS; both are counted."""
    long = {"prompt": "abcdefgh", "responses": ["abcdef", "fed"], "stop_reasons": ["stop", "stop"]}
    whole, _ = build(long)
    row, counts = build(long, max_prompt_length=5, max_length=9)
    assert row["prompt_ids"] == [1, *whole["prompt_ids"][-4:]]
    assert row["chosen_ids"] == whole["chosen_ids"][:4]
    assert row["rejected_ids"] == whole["rejected_ids"] and row["rejected_ids"][-1] == 2
    assert counts["prompts cut"] == 1 and counts["responses cut"] == 1
    same, counts = build({**long, "responses": ["abcx", "abcy"]}, max_prompt_length=5, max_length=8)
    assert same is None and counts["pairs dropped: identical after cutting"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_file": "nowhere.json"}, "nowhere.json: no such file"),
        ({"ref_model": "/nowhere/model"}, "--ref_model /nowhere/model: no such folder"),
        ({"beta": -1}, "--beta"),
        ({"beta": "nan"}, "--beta"),
        ({"max_prompt_length": 64}, "--max_prompt_length: must be below --max_length"),
        ({"choose_type": "max_min_p"}, "--length_penalty"),
        ({"choose_type": "mixed_max_min"}, "row 0: no 'pairs'"),
        ({"eval_fraction": 1}, "--eval_fraction"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size"),
        ({"max_prompt_length": None, "max_length": 1}, "--max_prompt_length"),
        ({"fp16": True}, "--fp16"),
        ({"save_only_model": True}, "--save_only_model"),
        ({"no_such_flag": 1}, "unrecognized arguments: --no_such_flag 1"),
        ({"use_lora": True, "lora_target_modules": "nothing"}, "--lora_target_modules nothing"),
    ],
)
def test_wrong_input_is_one_line(models, tmp_path, change, message):
    data = write_data(tmp_path / "d.json", make_instances())
    with pytest.raises(UserError) as raised:
        run_dpo.main(flags(models, data, tmp_path / "out", **change))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_other_vocabulary_and_too_long_rows_are_refused(models, tmp_path):
    data = write_data(tmp_path / "d.json", make_instances())
    other = save_tiny_policy(tmp_path / "other", seed=1, tokenizer=tiny_tokenizer(characters="abc"))
    with pytest.raises(UserError, match="different vocabularies"):
        run_dpo.main(flags((models[0], other), data, tmp_path / "out"))
    short = save_tiny_policy(tmp_path / "short", seed=1, context=8)
    with pytest.raises(UserError, match="tokens, the models read 8"):
        run_dpo.main(flags((short, models[1]), data, tmp_path / "out"))
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 9  # fewer than the model's positions
    limited = save_tiny_policy(tmp_path / "limited", seed=1, tokenizer=tokenizer)
    with pytest.raises(UserError, match="tokens, the models read 9"):
        run_dpo.main(flags((models[0], limited), data, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_single_prompt_cannot_be_held_out(models, tmp_path):
    data = write_data(tmp_path / "d.json", make_instances(rows=1))
    with pytest.raises(UserError, match="there is only one prompt"):
        run_dpo.main(flags(models, data, tmp_path / "out", eval_fraction=0.5))


def test_nothing_to_learn_from_is_an_error(models, tmp_path):
    ties = [{**instance, "rewards": [1.0, 1.0, 1.0]} for instance in make_instances()]
    with pytest.raises(UserError, match="no prompt has two different responses"):
        run_dpo.main(flags(models, write_data(tmp_path / "d.json", ties), tmp_path / "out"))


def test_exploding_training_stops(models, tmp_path):
    data = write_data(tmp_path / "d.json", make_instances())
    with pytest.raises(UserError, match="the loss is nan|the loss is inf"):
        train(models, data, tmp_path / "out", learning_rate=1e30, num_train_epochs=5, loss_type="ipo")
    assert not (tmp_path / "out").exists()


def test_second_process_on_one_output_is_refused(tmp_path):
    from dpo_iteration import checkpoints

    lock = checkpoints.open_work(str(tmp_path / "out"), {}, {}, dict)
    with pytest.raises(UserError, match="another process is training here"):
        checkpoints.open_work(str(tmp_path / "out"), {}, {}, dict)
    lock.close()
    checkpoints.open_work(str(tmp_path / "out"), {}, {}, dict).close()
