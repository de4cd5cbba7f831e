"""`run_dpo.py` as users start it: killed and started again, by `accelerate launch`, with ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_training import flags, losses, make_instances, models, train, weights, write_data

ALIGNMENT = Path(__file__).resolve().parents[1] / "alignment"
SCRIPT = ALIGNMENT / "dpo_iteration" / "run_dpo.py"
assert models  # a fixture, used below by its name

# Runs the script's main with a training step that does something else too.
WRAPPER = """
import os, signal, sys
sys.path.insert(0, {alignment!r})
from dpo_iteration import run_dpo
from dpo_iteration.dpo import DPOTrainer

step = DPOTrainer.training_step

def new_step(self, model, *arguments, **options):
    {action}
    return step(self, model, *arguments, **options)

DPOTrainer.training_step = new_step
run_dpo.main(sys.argv[1:])
"""


def wrapper(tmp_path: Path, action: str) -> Path:
    path = tmp_path / "wrapper.py"
    path.write_text(WRAPPER.format(alignment=str(ALIGNMENT), action=action))
    return path


def start(command: list, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1", **environment}
    return subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=300
    )


def launch(config: Path, command: list, **environment) -> str:
    """Runs `accelerate launch` with two processes on CPUs; returns what they printed."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # where deepspeed finds ninja
    done = start([*accelerate, "--num_processes", 2, *command], PATH=path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    done = start([sys.executable, SCRIPT, "--model_name_or_path", "x", "--beta", "strong"])
    assert done.returncode == 2
    assert done.stderr == "run_dpo.py: error: argument --beta: invalid float value: 'strong'\n"
    words = ["--model_name_or_path", "x", "--ref_model", "x", "--train_dir", tmp_path / "no.json"]
    done = start([sys.executable, SCRIPT, *words, "--output_dir", tmp_path / "out"])
    assert (done.returncode, done.stderr) == (2, f"run_dpo.py: error: {tmp_path / 'no.json'}: no such file\n")
    assert not list(tmp_path.iterdir())


def test_help_names_every_option_of_the_contract():
    done = start([sys.executable, SCRIPT, "--help"])
    assert done.returncode == 0
    for flag in (
        "ref_model",
        "train_dir",
        "loss_type",
        "choose_type",
        "beta",
        "margin_scale",
        "max_prompt_length",
    ):
        assert f"--{flag} " in done.stdout


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("more", [{}, {"use_lora": True}])
def test_killed_run_continues(models, tmp_path, more, torn):
    """SIGKILL before step 6 of 8, checkpoints after 2 and 4: the second start ends as if nothing had happened.

    `torn`: the kill came while checkpoint 4 was being written; checkpoint 2 is then the newest whole one.
    """
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    more = {
        **more,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "save_steps": 2,
        "save_total_limit": 2,
    }
    undisturbed = train(models, data, tmp_path / "whole", **more)
    kill = "self.state.global_step == 5 and os.kill(os.getpid(), signal.SIGKILL)"
    done = start([sys.executable, wrapper(tmp_path, kill), *flags(models, data, tmp_path / "out", **more)])
    assert done.returncode == -9
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists() and (partial / "checkpoint-4").is_dir()
    if torn:
        state = partial / "checkpoint-4" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
    assert train(models, data, tmp_path / "out", **more) == undisturbed
    assert len(undisturbed) == 8 and not partial.exists()
    after = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(tmp_path / "out").items())


def test_continuing_says_so_and_other_settings_are_refused(models, tmp_path, capsys):
    from common.cli import UserError

    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    more = {"per_device_train_batch_size": 2, "save_steps": 2}
    kill = "self.state.global_step == 3 and os.kill(os.getpid(), signal.SIGKILL)"
    start([sys.executable, wrapper(tmp_path, kill), *flags(models, data, tmp_path / "out", **more)])
    with pytest.raises(
        UserError, match="out.partial: exists, made with margin_scale=4.0, now margin_scale=1.0"
    ):
        train(models, data, tmp_path / "out", margin_scale=1, **more)
    train(models, data, tmp_path / "out", **more)
    assert "continuing from" in capsys.readouterr().out


def test_two_processes_equal_one(models, tmp_path):
    """Batch 2 on each of two processes, started with configs/cpu.yaml: the losses of batch 4 on one."""
    data = write_data(tmp_path / "d.json", make_instances(rows=9))
    order = {"train_sampling_strategy": "sequential", "eval_fraction": 0.1, "num_train_epochs": 2}
    one = train(models, data, tmp_path / "one", **order)
    data.with_name("d.json.reference_logps.json").unlink()
    words = flags(models, data, tmp_path / "two", per_device_train_batch_size=2, **order)
    printed = launch(ALIGNMENT / "configs" / "cpu.yaml", [SCRIPT, *words])
    assert len(one) == 4 and losses(tmp_path / "two") == pytest.approx(one, abs=1e-5)
    assert printed.count("training on 8 pairs") == 1 == printed.count("two: done")
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["train"]["num_processes"] == 2
    after = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name


def test_zero3_equals_one_process(models, tmp_path):
    """DeepSpeed ZeRO-3 on two processes with every weight sharded (no tiny ones kept whole)."""
    pytest.importorskip("deepspeed")
    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    order = {"train_sampling_strategy": "sequential", "num_train_epochs": 2}
    one = train(models, data, tmp_path / "one", **order)
    data.with_name("d.json.reference_logps.json").unlink()
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero, **batch}))
    config = yaml.safe_load((ALIGNMENT / "configs" / "zero3.yaml").read_text())
    config["use_cpu"] = True
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": True}
    del config["mixed_precision"]
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    script = wrapper(
        tmp_path, "os.write(1, b'whole weights: %d\\n' % sum(p.numel() for p in self.model.parameters()))"
    )
    words = flags(models, data, tmp_path / "two", per_device_train_batch_size=2, **order)
    # (os.write: one call a line, so that the lines of two processes do not run into each other)
    printed = launch(tmp_path / "zero3.yaml", [script, *words], DS_ACCELERATOR="cpu")
    assert "sequences are padded" not in printed  # prefixes are shared under ZeRO-3, too
    assert printed.count("whole weights: 0\n") == 8  # two processes, four steps: all weights are in shards
    assert losses(tmp_path / "two") == pytest.approx(one, abs=1e-5)
    after = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name
