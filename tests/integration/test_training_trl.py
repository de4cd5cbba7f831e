"""`run_trl.py`: TRL's own trainer on our pairs, id by id, with our output folder and our rules."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from commands import ALIGNMENT, python
from training_runs import flags, losses, sampled_instances, train, weights, write_sampled

from common.cli import UserError
from dpo_iteration import run_trl

SAME = {"num_train_epochs": 3, "train_sampling_strategy": "sequential", "gradient_checkpointing": False}
OF_OURS = {"margin_scale": 1000}  # rewards that far apart make rev_kl the sigmoid loss


def trl_flags(models, data, output, **more):
    return flags(models, data, output, **{"margin_scale": None, **SAME, **more})


def test_sigmoid_is_our_own_trainers_loss(models, tmp_path):
    """Three logged losses, so that gradients and updates agree too; and the same weights in the end."""
    data = write_sampled(tmp_path / "d.json", sampled_instances())
    ours = train(models, data, tmp_path / "ours", **SAME, **OF_OURS)
    run_trl.main(trl_flags(models, data, tmp_path / "trl", loss_type="sigmoid"))
    assert len(ours) == 3 and losses(tmp_path / "trl") == pytest.approx(ours, abs=1e-5)
    after = weights(tmp_path / "ours")
    for name, tensor in weights(tmp_path / "trl").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name


def test_its_trainer_sees_our_ids(models, tmp_path, monkeypatch):
    """Sequences and what is scored of them are the rows' own, without an EOS that nobody sampled."""
    data, seen = write_sampled(tmp_path / "d.json", sampled_instances()), []
    compute_loss = run_trl.OnIds.compute_loss

    def watched(self, model, inputs, *arguments, **options):
        for ids, real, scored in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
        ):
            seen.append((ids[real.bool() & ~scored.bool()].tolist(), ids[scored.bool()].tolist()))
        return compute_loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(run_trl.OnIds, "compute_loss", watched)
    run_trl.main(trl_flags(models, data, tmp_path / "out", loss_type="ipo", num_train_epochs=1))
    sampled = [ids for instance in sampled_instances() for ids in instance["response_ids"]]
    assert len(seen) == 8 and all(response in sampled for _, response in seen)
    assert all(prompt[0] == 1 and 2 not in prompt for prompt, _ in seen)


def test_finished_folder_settings_and_refusals(models, tmp_path, capsys):
    data = write_sampled(tmp_path / "d.json", sampled_instances())
    words = trl_flags(
        models, data, tmp_path / "out", loss_type="ipo", labels="sampled", precompute_ref_log_probs=True
    )
    run_trl.main(words)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "settings.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt"))] and not (tmp_path / "out.partial").exists()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["train"]["loss_type"] == ["ipo"] and settings["provenance"]["train"]["versions"]["trl"]
    run_trl.main(words)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="label_smoothing=0.0, now label_smoothing=0.25"):
        run_trl.main([*words, "--label_smoothing", "0.25"])


@pytest.mark.parametrize(
    "change, named",
    [
        ({"label_noise": 0.1}, "--label_noise"),
        ({"model_init_kwargs": "{}"}, "--model_init_kwargs"),
        ({"loss_type": "exo_pair"}, "exo_pair"),
        ({"eval_strategy": "steps"}, "--eval_strategy"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"max_prompt_length": 64}, "--max_prompt_length"),
    ],
)
def test_wrong_flags_are_one_line(models, tmp_path, change, named):
    data = write_sampled(tmp_path / "d.json", sampled_instances())
    words = trl_flags(models, data, tmp_path / "out", **change)
    result = python("dpo_iteration/run_trl.py", *words, CI="1")
    assert result.returncode == 2, result.stderr
    assert named in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr


KILL = """
import os, signal, sys
sys.path.insert(0, {alignment!r})
from dpo_iteration import run_trl
step = run_trl.OnIds.training_step
def killed(self, *arguments, **options):
    self.state.global_step == 2 and os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **options)
run_trl.OnIds.training_step = killed
run_trl.main(sys.argv[1:])
"""


def test_a_killed_run_continues(models, tmp_path):
    data = write_sampled(tmp_path / "d.json", sampled_instances())
    more = {"loss_type": "sigmoid", "save_steps": 1}
    run_trl.main(trl_flags(models, data, tmp_path / "whole", **more))
    words = trl_flags(models, data, tmp_path / "out", **more)
    script = [sys.executable, "-c", KILL.format(alignment=str(ALIGNMENT)), *words]
    done = subprocess.run(script, env={**os.environ, "CI": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    run_trl.main(words)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    after = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(tmp_path / "out").items())
