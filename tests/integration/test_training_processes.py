"""`run_dpo.py` as users start it: killed and started again, by `accelerate launch`, with ZeRO-3."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_tiny_policy
from training_runs import flags, losses, make_instances, train, weights, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation.sampling import Request, Sampling

ALIGNMENT = Path(__file__).resolve().parents[2] / "alignment"
SCRIPT = ALIGNMENT / "dpo_iteration" / "run_dpo.py"

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

# Python imports a `sitecustomize` as it starts. A group's threads may crash a process that Python is taking apart.
LEAVES_THE_GROUP = """
import atexit, os, sys

def check():
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        os._exit(9)

atexit.register(check)
"""


def wrapper(tmp_path: Path, action: str) -> Path:
    path = tmp_path / "wrapper.py"
    path.write_text(WRAPPER.format(alignment=str(ALIGNMENT), action=action))
    return path


def start(command: list, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1", **environment}
    return subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=900)


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
    with pytest.raises(UserError, match="out.partial: exists, made with margin_scale=4.0, now margin_scale=1.0"):
        train(models, data, tmp_path / "out", margin_scale=1, **more)
    with pytest.raises(UserError, match="made with gradient_accumulation_steps=1, now gradient_accumulation_steps=2"):
        train(
            models,
            data,
            tmp_path / "out",
            **more | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        )
    train(models, data, tmp_path / "out", **more)
    assert "continuing from" in capsys.readouterr().out


def test_without_a_checkpoint_a_step_may_be_divided_otherwise(models, tmp_path, capsys):
    """As on another number of GPUs, or with less memory: what has not begun goes on, what is done is done."""
    from common.cli import UserError

    def share(pairs, passes):
        return {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": passes, "save_steps": 4}

    data = write_data(tmp_path / "d.json", make_instances(rows=8))
    kill = "self.state.global_step == 1 and os.kill(os.getpid(), signal.SIGKILL)"
    start([sys.executable, wrapper(tmp_path, kill), *flags(models, data, tmp_path / "out", **share(4, 1))])
    assert (tmp_path / "out.partial/settings.json").exists()
    found = train(models, data, tmp_path / "out", **share(2, 2))
    assert found == pytest.approx(train(models, data, tmp_path / "whole", **share(4, 1)), abs=1e-6)
    assert '"gradient_accumulation_steps": 2' in (tmp_path / "out/settings.json").read_text()
    train(models, data, tmp_path / "out", **share(1, 4))
    assert "out: already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with pairs_per_step=4, now pairs_per_step=2"):
        train(models, data, tmp_path / "out", **share(1, 2))


def test_two_processes_equal_one(models, tmp_path):
    """Batch 2 on each of two processes, started with configs/cpu.yaml: the losses of batch 4 on one."""
    data = write_data(tmp_path / "d.json", make_instances(rows=9))
    order = {"train_sampling_strategy": "sequential", "eval_fraction": 0.1, "num_train_epochs": 2}
    one = train(models, data, tmp_path / "one", **order)
    data.with_name("d.json.reference_logps.json").unlink()
    words = flags(models, data, tmp_path / "two", per_device_train_batch_size=2, **order)
    (tmp_path / "sitecustomize.py").write_text(LEAVES_THE_GROUP)
    printed = launch(ALIGNMENT / "configs" / "cpu.yaml", [SCRIPT, *words], PYTHONPATH=str(tmp_path))
    assert len(one) == 4 and losses(tmp_path / "two") == pytest.approx(one, abs=1e-5)
    assert printed.count("training on 8 pairs") == 1 == printed.count("two: done")
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["train"]["num_processes"] == 2
    after = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name


def test_two_processes_with_an_odd_number_of_pairs(models, tmp_path):
    """Five pairs on two processes, 2 at a time, in random order: no pair counts twice, no place in a batch counts.

    Nor does one of the five that are held out, 4 at a time: the second process has one of them.
    """
    data = write_data(tmp_path / "d.json", make_instances(rows=10))
    order = {"num_train_epochs": 3, "eval_fraction": 0.5}
    one = train(models, data, tmp_path / "one", per_device_train_batch_size=8, per_device_eval_batch_size=2, **order)
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    more |= order
    launch(ALIGNMENT / "configs" / "cpu.yaml", [SCRIPT, *flags(models, data, tmp_path / "two", **more)])
    assert len(one) == 3 and losses(tmp_path / "two") == pytest.approx(one, abs=1e-5)
    histories = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")
    ]
    assert histories[1][0]["logps/chosen"] == pytest.approx(histories[0][0]["logps/chosen"], abs=1e-4)
    expected, found = ([entry for entry in history if "eval_loss" in entry] for history in histories)
    assert len(expected) == len(found) == 3
    for name in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], abs=1e-4), name
    after = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        assert torch.allclose(tensor, after[name], atol=2e-5), name


@pytest.fixture(scope="module")
def zero_data(tmp_path_factory):
    """A policy and a reference that vLLM can run too, 8 prompts, and the losses and weights of one plain process."""
    folder = tmp_path_factory.mktemp("zero")
    models = tuple(save_tiny_policy(folder / name, seed, hidden=64) for seed, name in enumerate("pr"))
    data = write_data(folder / "d.json", make_instances(rows=8))
    one = train(models, data, folder / "one", **ORDER)
    data.with_name("d.json.reference_logps.json").unlink()
    return folder, models, data, one


ORDER = {"train_sampling_strategy": "sequential", "num_train_epochs": 2}


def cpu_config(stage: int | str, folder: Path, **deepspeed_config) -> Path:
    """configs/zero{stage}.yaml with nothing changed but the device, and DeepSpeed's settings where they are given."""
    config = yaml.safe_load((ALIGNMENT / "configs" / f"zero{stage}.yaml").read_text())
    config["use_cpu"] = True
    if deepspeed_config:
        config["deepspeed_config"] = deepspeed_config
        del config["mixed_precision"]
    (folder / f"zero{stage}.yaml").write_text(yaml.safe_dump(config))
    return folder / f"zero{stage}.yaml"


def zero3_config(folder: Path) -> Path:
    """configs/zero3.yaml with every weight sharded (no tiny ones kept whole)."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero, **batch}))
    return cpu_config(3, folder, deepspeed_config_file=str(folder / "ds.json"), zero3_init_flag=True)


@pytest.fixture(scope="module")
def zero3(zero_data):
    """What was printed by ZeRO-3 on two processes."""
    folder, models, data, _ = zero_data
    config = zero3_config(folder)
    script = wrapper(folder, "os.write(1, b'whole weights: %d\\n' % sum(p.numel() for p in self.model.parameters()))")
    script.write_text(script.read_text().replace("run_dpo.main(", WATCH_THE_REFERENCE + "run_dpo.main("))
    words = flags(models, data, folder / "zero3", per_device_train_batch_size=2, **ORDER)
    # (os.write: one call a line, so that the lines of two processes do not run into each other)
    return launch(config, [script, *words], DS_ACCELERATOR="cpu")


WATCH_THE_REFERENCE = """
from dpo_iteration import reference
sharded, free = reference.sharded, reference.free
shards = []

def watched(*arguments):
    engine = sharded(*arguments)
    os.write(1, b'whole reference weights: %d\\n' % sum(p.numel() for p in engine.module.parameters()))
    shards.extend(p.ds_tensor for p in engine.module.parameters())
    os.write(1, b'shards: %d\\n' % (sum(s.untyped_storage().nbytes() for s in shards) > 0))
    return engine

def freed(engine):
    free(engine)
    os.write(1, b'shards left: %d bytes\\n' % sum(s.untyped_storage().nbytes() for s in shards))

reference.sharded, reference.free = watched, freed
"""


def check_equal_training(folder: Path, name: str, one: list[float]) -> None:
    assert losses(folder / name) == pytest.approx(one, abs=1e-5)
    after = weights(folder / "one")
    for key, tensor in weights(folder / name).items():
        assert torch.allclose(tensor, after[key], atol=2e-5), key


def test_zero3_equals_one_process(zero_data, zero3):
    assert "sequences are padded" not in zero3  # prefixes are shared under ZeRO-3, too
    assert zero3.count("whole weights: 0\n") == 8  # two processes, four steps: all weights are in shards
    assert zero3.count("whole reference weights: 0\n") == 2  # and those of the reference in its pass
    assert zero3.count("shards: 1\n") == 2 == zero3.count("shards left: 0 bytes\n")
    check_equal_training(zero_data[0], "zero3", zero_data[3])


def test_an_adapter_under_zero3_is_that_of_one_process(zero_data, tmp_path):
    _, models, data, _ = zero_data
    more = {**ORDER, "use_lora": True, "learning_rate": 1e-2}
    one = train(models, data, tmp_path / "one", **more)
    words = flags(models, data, tmp_path / "two", per_device_train_batch_size=2, **more)
    launch(zero3_config(tmp_path), [SCRIPT, *words], DS_ACCELERATOR="cpu")
    check_equal_training(tmp_path, "two", one)


def test_zero3_checkpoint_loads_in_vllm(zero_data, zero3):
    """The next iteration's generation reads what ZeRO-3 wrote: vLLM's greedy tokens are transformers' own."""
    from generation.backend_vllm import VLLMGenerator

    folder, models = zero_data[:2]
    trained = str(folder / "zero3")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    prompts = [tokenizer(text)["input_ids"] for text in ("a bad cab.", "feed", "he had a bag")]
    engine = VLLMGenerator(trained, None, dtype="float32", max_length=64, max_num_seqs=4)
    asked = [Request(str(i), ids, (1.0, 0.0), 0) for i, ids in enumerate(prompts)]
    got = {r.key: [i for i in r.token_ids if i != 2] for r in engine.generate(asked, Sampling(0.0, 16, [2]))}
    expected = {r.key: greedy(trained, r.prompt_ids, 16) for r in asked}
    assert got == expected
    assert any(greedy(models[0], r.prompt_ids, 16) != expected[r.key] for r in asked)  # it was trained


@torch.no_grad()
def greedy(folder: Path | str, ids: list[int], length: int) -> list[int]:
    """Greedy tokens, one uncached forward pass each; EOS (2) ends them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[int] = []
    while len(found) < length:
        token = int(model(torch.tensor([ids + found])).logits[0, -1].argmax())
        if token == 2:
            break
        found.append(token)
    return found


def test_two_machines_with_zero2_equal_one_process(zero_data):
    """configs/zero2.yaml, started once a machine (here twice on this one), as drivers with NUM_MACHINES=2 do."""
    folder, models, data, one = zero_data
    config = cpu_config(2, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = flags(models, data, folder / "zero2", per_device_train_batch_size=2, **ORDER)
    machines = ["--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    with ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(launch, config, [*machines, "--machine_rank", rank, SCRIPT, *words], DS_ACCELERATOR="cpu")
            for rank in (0, 1)
        ]
    printed = [rank.result() for rank in ranks]
    assert [text.count("zero2: done") for text in printed] == [1, 0]
    check_equal_training(folder, "zero2", one)


def test_offloaded_zero3_equals_one_process(zero_data):
    """configs/zero3_offload.yaml on one process, as one GPU runs it: weights and optimizer in the host's memory."""
    folder, models, data, one = zero_data
    words = flags(models, data, folder / "offload", **ORDER)
    launch(cpu_config("3_offload", folder), ["--num_processes", 1, SCRIPT, *words], DS_ACCELERATOR="cpu")
    check_equal_training(folder, "offload", one)
