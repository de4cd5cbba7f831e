"""Shared prefixes against plain forward passes, one sequence at a time; and models that must not share them.

The oracle knows nothing of batches, padding or prefixes.
"""

import json
import random

import pytest
import torch
from training_runs import flags, losses, make_instances, train, weights, write_data
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dpo_iteration import run_dpo
from dpo_iteration.logps import (
    SEQUENCES,
    SHARED,
    as_scorer,
    disable_dropout,
    find_prefixes,
    forms_agree,
    may_share,
)
from dpo_iteration.losses import preference_loss
from dpo_iteration.rows import collate

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 6}  # shorter than the sequences
ARCHITECTURES = {
    "llama": {},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},  # full and sliding layers
    "gemma2": WINDOW,  # and capped scores
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},  # learned positions
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
REFUSED = {
    "lfm2": ({"full_attn_idxs": [1], "block_multiple_of": 8}, "layers of type conv"),
    "recurrent_gemma": ({"lru_width": 32, "attention_window_size": 6}, "carries a state from token to token"),
}


def make_model(kind: str, attention: str = "sdpa", **options) -> torch.nn.Module:
    """A tiny random scorer with sharp predictions."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SHAPE, **options}, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    disable_dropout(model)
    return as_scorer(model)


def make_rows(seed: int = 0) -> list[dict]:
    """Uneven lengths, one template before all prompts, responses that begin alike; id 0 is a token like any other."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(40) for _ in range(rng.randint(low, high))]

    template, rows = [1, *ids(3, 3)], []
    for _ in range(4):
        prompt, start = template + ids(1, 8), ids(0, 2)
        chosen, rejected = start + ids(1, 12), start + ids(1, 12)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": 0.5})
    rows[1]["rejected_ids"] = rows[1]["chosen_ids"][:1]  # a response that is the beginning of the other
    rows[2]["chosen_ids"] = rows[2]["chosen_ids"] + [0, 0]
    return rows


def sequences(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    return {name: batch[name] for name in SEQUENCES}


def one_at_a_time(model, rows: list[dict]) -> torch.Tensor:
    """Sum of log pi(token | all before): one sequence, no padding."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            start = len(row["prompt_ids"])
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            table = model.logits_forward(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            sums.append(table[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum())
    return torch.stack(sums)


def gradients(model, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the loss whose log-probabilities are `logps`, by every parameter."""
    pairs = len(logps) // 2
    reference, margin = torch.linspace(-9, -30, 2 * pairs).view(2, pairs), torch.linspace(-1, 2, pairs)
    loss = preference_loss(*logps.chunk(2), *reference, margin, 0.1, "rev_kl")[0].mean()
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_prefixes_are_those_of_a_plain_loop():
    rows = make_rows()
    batch = sequences(rows)
    prefixes = find_prefixes(batch["input_ids"], batch["attention_mask"])
    width, seen = batch["input_ids"].shape[1], {}
    for s, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        for t in range(int(real.sum())):
            prefix = tuple(ids[: t + 1].tolist())
            number = seen.setdefault(prefix, len(seen))
            assert prefixes.index[s, t] == number
            assert number < len(seen) - 1 or prefixes.first[number] <= s * width + t
    assert len(prefixes.first) == len(seen) < batch["attention_mask"].sum()
    tokens = batch["input_ids"].flatten()[prefixes.first].tolist()
    assert tokens == [prefix[-1] for prefix in seen]


def test_sequences_with_nothing_in_common():
    ids = torch.tensor([[3, 4, 0], [5, 4, 6]])
    prefixes = find_prefixes(ids, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert prefixes.first.tolist() == [0, 1, 3, 4, 5] and prefixes.index[1].tolist() == [2, 3, 4]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_one_sequence_at_a_time(kind, checkpointing):
    """Log-probabilities and the gradients of all parameters, shared and padded; what the model sees is the row."""
    model, rows = make_model(kind, **ARCHITECTURES[kind]), make_rows()
    assert may_share(model)
    wanted = one_at_a_time(model, rows)
    wanted_gradients = gradients(model, wanted)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    for share in (True, False):
        got = model(**sequences(rows), share=share)
        assert got.tolist() == pytest.approx(wanted.tolist(), abs=2e-5)
        for name, gradient in gradients(model, got).items():
            scale = wanted_gradients[name].abs().max()
            assert (gradient - wanted_gradients[name]).abs().max() <= 2e-5 * scale + 1e-7, (share, name)
    batch = sequences(rows)
    row = len(find_prefixes(batch["input_ids"], batch["attention_mask"]).first)
    assert [shape[:2] for shape in seen] == [(1, row), batch["input_ids"].shape]


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_mix_tokens_elsewhere_are_padded(kind, capsys):
    """Their class or configuration tells; and it is true: shared, their numbers would be wrong."""
    options, why = REFUSED[kind]
    model, rows = make_model(kind, **options), make_rows()
    assert not may_share(model)
    assert why in capsys.readouterr().out
    with torch.no_grad():
        wanted, padded, shared = (
            one_at_a_time(model, rows),
            model(**sequences(rows), share=False),
            model(**sequences(rows), share=True),
        )
    assert padded.tolist() == pytest.approx(wanted.tolist(), abs=2e-5)
    assert (shared - wanted).abs().max() > 1e-2


def test_other_kernels_are_padded(capsys):
    assert not may_share(make_model("llama", attention="eager"))
    assert "attn_implementation is eager" in capsys.readouterr().out


def test_what_nothing_tells_is_found_by_the_numbers(capsys):
    """A Llama whose embeddings look at the token before; Doge, whose layers take a mask for a tensor."""
    honest, batch = make_model("llama").eval(), sequences(make_rows()[:2])
    assert forms_agree(honest, batch) and not honest.training
    model = make_model("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output + output.roll(1, 1))
    assert may_share(model) and not capsys.readouterr().out
    assert not forms_agree(model, batch)
    assert "log-probabilities would be" in capsys.readouterr().out
    model = make_model("doge").train()
    assert may_share(model) and not forms_agree(model, batch)
    assert "sequences are padded" in capsys.readouterr().out and model.training
    padded = model(**sequences(make_rows()), share=False)
    assert padded.tolist() == pytest.approx(one_at_a_time(model, make_rows()).tolist(), abs=2e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_hides_nothing(autocast):
    """An error of less than two nats is found under bfloat16's rounding, and the weights are left as they were."""
    batch, dtype = sequences(make_rows()[:1]), torch.float32 if autocast else torch.bfloat16
    honest, leaking = make_model("llama").to(dtype).eval(), make_model("llama").to(dtype).eval()
    embeddings = leaking.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output + output.roll(1, 1))
    before = {name: parameter.clone() for name, parameter in honest.named_parameters()}
    with torch.no_grad():
        exact = [make_model("llama")(**batch, share=share) for share in (False, True)]
        off = (leaking(**batch, share=False, exact=True) - leaking(**batch, share=True, exact=True)).abs().max()
        assert torch.allclose(*exact, atol=1e-4) and 0.05 < off < 2
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rounded = honest(**batch, share=False)
            assert (rounded - honest(**batch, share=False, exact=True)).abs().max() > 1e-3
            assert forms_agree(honest, batch) and not forms_agree(leaking, batch)
    for name, parameter in honest.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, before[name])


def test_flash_attention_is_padded(capsys):
    """Its kernels see one row as one sequence."""
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not may_share(model)
    assert "flash_attention_2, not sdpa" in capsys.readouterr().out


def test_trained_with_and_without(models, tmp_path, capsys):
    """The same losses and weights; the flag is no setting of a run, and leaves no trace in the saved model."""
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    one = train(models, data, tmp_path / "shared", num_train_epochs=2)
    assert "padded" not in capsys.readouterr().out
    data.with_name("d.json.reference_logps.json").unlink()
    two = train(models, data, tmp_path / "padded", num_train_epochs=2, share_prefixes=False)
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-5)
    after = weights(tmp_path / "padded")
    for name, tensor in weights(tmp_path / "shared").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name
    run_dpo.main(flags(models, data, tmp_path / "shared", num_train_epochs=2, share_prefixes=False))
    assert "already done" in capsys.readouterr().out
    assert SHARED not in (tmp_path / "shared" / "config.json").read_text()
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert config == json.loads((tmp_path / "padded" / "config.json").read_text())


def test_eager_attention_trains_padded(models, tmp_path, capsys):
    data = write_data(tmp_path / "d.json", make_instances())
    got = train(models, data, tmp_path / "eager", attn_implementation="eager")
    assert capsys.readouterr().out.count("sequences are padded") == 2  # reference and policy
    assert got == pytest.approx(train(models, data, tmp_path / "sdpa"), abs=1e-5)
    assert losses(tmp_path / "eager") == got
