"""What goes wrong on a shared machine, made to go wrong: each fault ends in one clear line or is survived.

After each error the cause is removed and the same command must give the file that it gives without the fault.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from commands import ALIGNMENT, bash, ends_in_one_line, python, settings
from driver_runs import EVALUATE, KL, SLOW, TRAIN, inputs, journal_rows, start, wait_until
from safetensors.torch import load_file, save_file
from tiny import save_tiny_policy, save_tiny_reward_model
from training_runs import losses

from common.journal import journal_path
from common.record_stream import read_records

pytestmark = pytest.mark.slow
KIB = 1024


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, prompts, responses, scored responses."""
    folder = tmp_path_factory.mktemp("faults")
    save_tiny_policy(folder / "policy", 0, hidden=64, layers=2, heads=2)
    save_tiny_policy(folder / "reference", 1, hidden=64, layers=2, heads=2)
    save_tiny_reward_model(folder / "reward", 1)
    save_tiny_reward_model(folder / "judge", 2)
    (folder / "prompts.json").write_text(
        json.dumps([{"prompt": f"prompt {'abcdefgh'[i % 8] * i}"} for i in range(60)])
    )
    data = [{"prompt": f"p{i}", "responses": ["a" * i, "b"], "rewards": [1.0 + i, 0.5]} for i in range(40)]
    (folder / "data.json").write_text(json.dumps({"type": "text_only", "instances": data}))
    return folder


MODELS = (
    "--model_name_or_path {0}/policy --ref_model_name_or_path {0}/reference --dataset_name_or_path {0}/prompts.json"
)


def generate_flags(place: Path, output: Path, *more) -> list[str]:
    """240 responses."""
    words = "--sampler mixp --K 4 --temperature 1 --max_new_tokens 8 --max_input_length 100 --backend hf"
    return [*MODELS.format(place).split(), *words.split(), "--output_file", str(output), *map(str, more)]


def generate(place: Path, output: Path, *more):
    return python("generation/generate.py", *generate_flags(place, output, *more))


def annotate(place: Path, data: Path, output: Path, *more):
    flags = "--dataset_name_or_path", data, "--reward_name_or_path", place / "reward", "--output_file", output
    return python("annotate_data/get_rewards.py", *flags, *more)


def train(place: Path, data: Path, output: Path, *more, **variables):
    """Four steps, each with a checkpoint but the last."""
    flags = f"--model_name_or_path {place}/policy --ref_model {place}/reference --train_dir {data} --max_length 64"
    steps = "--per_device_train_batch_size 10 --num_train_epochs 1 --save_steps 1 --learning_rate 1e-3"
    words = [
        *flags.split(),
        *steps.split(),
        "--use_cpu",
        "True",
        "--disable_tqdm",
        "True",
        "--output_dir",
        output,
    ]
    return python("dpo_iteration/run_dpo.py", *words, *more, **variables)


def kl(place: Path, output: Path, *more):
    words = "--max_new_tokens 8 --max_input_length 100 --backend hf"
    return python(
        "evaluation/get_kl.py", *MODELS.format(place).split(), *words.split(), "--output_file", output, *more
    )


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk: Path, free: int) -> Path:
    """Fills the file system up to `free` bytes; returns the file that does."""
    room = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - free))
    return filler


def test_disk_full_where_prompts_wait(place, disk):
    leave(disk, 4 * KIB)
    ends_in_one_line(generate(place, disk / "out.json"), f"{disk}: cannot write (No space left on device)")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(("free", "named"), [(28 * KIB, "out.json.journal"), (84 * KIB, "out.json")])
def test_disk_full_while_generating(place, tmp_path, disk, free, named):
    """In the journal, and with a whole journal in the final file; the prompts that wait take 20 KiB."""
    assert generate(place, tmp_path / "whole.json").returncode == 0
    filler = leave(disk, free)
    output = disk / "out.json"
    ends_in_one_line(generate(place, output), f"{disk / named}: cannot write (No space left on device)")
    kept = len(journal_path(output).read_bytes().splitlines()) - 1
    assert 0 < kept <= 240 and not output.exists()
    assert {path.name for path in disk.iterdir()} == {"filler", "out.json.journal"}
    filler.unlink()
    assert generate(place, output).returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [path.name for path in disk.iterdir()] == ["out.json"]


def test_disk_full_while_annotating(place, tmp_path, disk):
    assert annotate(place, place / "data.json", tmp_path / "whole.json").returncode == 0
    filler = leave(disk, 4 * KIB)
    output = disk / "out.json"
    ends_in_one_line(annotate(place, place / "data.json", output), disk, "No space left on device")
    filler.unlink()
    assert annotate(place, place / "data.json", output).returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [path.name for path in disk.iterdir()] == ["out.json"]


@pytest.mark.parametrize("free", [64, 900, 1400])
def test_disk_full_while_training(place, tmp_path, disk, free):
    """In the first checkpoint's weights, in its optimizer's, and in a later one."""
    assert train(place, place / "data.json", tmp_path / "whole").returncode == 0
    filler = leave(disk, free * KIB)
    output = disk / "out"
    result = train(place, place / "data.json", output)
    ends_in_one_line(result, f"{output}.partial", "No space left on device")
    assert not output.exists()
    filler.unlink()
    done = train(place, place / "data.json", output)
    assert done.returncode == 0, done.stderr
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_read_only_output(place, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    readonly = f"{disk}"
    for result in (
        generate(place, disk / "out.json"),
        annotate(place, place / "data.json", disk / "out.json"),
        train(place, place / "data.json", disk / "out"),
        kl(place, disk / "out.json"),
        bash(f"alignment/{TRAIN}", *settings(**inputs(place), RUN_DIR=disk / "run")),
    ):
        ends_in_one_line(result, readonly)
    assert not list(disk.iterdir())


def test_a_killed_engine_process_ends_the_script(place, tmp_path):
    """vLLM with its engine in a process of its own, as on GPUs: no hang, the responses are kept."""
    more = "--backend", "vllm", "--max_num_seqs", 4, "--dtype", "float32", "--max_new_tokens", 64
    output = tmp_path / "out.json"
    command = [
        sys.executable,
        str(ALIGNMENT / "generation/generate.py"),
        *generate_flags(place, output, *more),
    ]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        begun = wait_until(lambda: len(journal_rows(tmp_path).get("out.json.journal", ())) >= 8, process)
        assert begun, (tmp_path / "log").read_text()
        engines = [child for child in psutil.Process(process.pid).children() if "EngineCore" in child.name()]
        assert len(engines) == 1
        engines[0].kill()
        assert process.wait(timeout=60) == 2
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert "generate.py: error: vLLM's engine process died; the same command continues from here" in text
    kept = journal_rows(tmp_path)["out.json.journal"]
    assert 8 <= len(kept) < 240
    assert generate(place, output, *more).returncode == 0
    assert generate(place, tmp_path / "whole.json", *more).returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_torn_data_file_is_named(place, tmp_path):
    data = tmp_path / "data.json"
    assert annotate(place, place / "data.json", data).returncode == 0
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    for result in (
        annotate(place, data, tmp_path / "out.json"),
        annotate(place, place / "data.json", data),  # as its own earlier output
        train(place, data, tmp_path / "out"),
    ):
        ends_in_one_line(result, f"{data}: line ", "not JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    data.unlink()
    assert annotate(place, place / "data.json", data).returncode == 0
    assert data.read_bytes() == whole


def test_a_torn_model_is_named(place, tmp_path):
    model = save_tiny_policy(tmp_path / "model", 0, hidden=64, layers=2, heads=2)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for result in (
        generate(place, tmp_path / "out.json", "--model_name_or_path", model),
        train(place, place / "data.json", tmp_path / "out", "--model_name_or_path", model),
        kl(place, tmp_path / "out.json", "--model_name_or_path", model),
    ):
        ends_in_one_line(result, model / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_drivers_on_one_run_folder(place, tmp_path):
    """The second is refused; the lock goes with the first, also where a stage of it lives on."""
    given = inputs(place) | SLOW | {"RUN_DIR": tmp_path / "run"}
    words = settings(**given)
    first = start(TRAIN, given, tmp_path / "log")
    try:
        data = tmp_path / "run" / "data"
        assert wait_until(lambda: journal_rows(data).get("gen_data_iter1_online.json.journal"), first)
        (stage,) = psutil.Process(first.pid).children()
        stage.suspend()
        for driver in (TRAIN, KL, EVALUATE):
            ends_in_one_line(
                bash(f"alignment/{driver}", *words),
                driver,
                f"another driver works in {tmp_path / 'run'}",
            )
        first.kill()
        first.wait()
        assert stage.is_running()
        third = bash(f"alignment/{TRAIN}", *words)
        assert third.returncode == 2
        assert "another driver" not in third.stderr
        assert "another process is writing gen_data_iter1_online.json" in third.stderr
        stage.kill()
        time.sleep(0.1)
        fourth = bash(f"alignment/{TRAIN}", *words, "ITERS=1")
        assert fourth.returncode == 0, fourth.stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)


def test_too_long_prompts_are_left_out_and_counted(place, tmp_path):
    result = generate(place, tmp_path / "out.json", "--max_input_length", 20)
    assert result.returncode == 0
    kept = read_records(tmp_path / "out.json")[0]
    assert 0 < len(kept) < 60
    assert f"{60 - len(kept)} prompts left out as too long" in result.stdout
    ends_in_one_line(generate(place, tmp_path / "none.json", "--max_input_length", 3), "60 left out as too long")
    ends_in_one_line(generate(place, tmp_path / "none.json", "--max_new_tokens", 256), "256 tokens")


def test_long_and_empty_texts_go_through_annotation_and_training(place, tmp_path):
    """A text beyond the reward model's context (256 tokens), responses without a character, ended and cut."""
    instances = [
        {"prompt": "p" * 300, "responses": ["good", "bad"], "stop_reasons": ["stop", "stop"]},
        {"prompt": "abc", "responses": ["", "bad"], "stop_reasons": ["stop", "stop"]},
        {"prompt": "abcd", "responses": ["good", ""], "stop_reasons": ["length", "length"]},
        {"prompt": "abcde", "responses": ["", ""], "stop_reasons": ["length", "length"]},
        {"prompt": "q" * 100, "responses": ["good", "bad"], "stop_reasons": ["stop", "stop"]},
    ]
    (tmp_path / "data.json").write_text(json.dumps({"instances": instances}))
    result = annotate(place, tmp_path / "data.json", tmp_path / "scored.json")
    assert result.returncode == 0, result.stderr
    assert "2 texts were cut to 256 tokens" in result.stdout
    assert len(read_records(tmp_path / "scored.json", ("rewards",))[0]) == 5
    result = train(place, tmp_path / "scored.json", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "5 prompts -> 3 pairs" in result.stdout and "1 prompts cut" in result.stdout
    assert "2 prompts dropped: equal rewards" in result.stdout
    assert all(abs(loss) < 100 for loss in losses(tmp_path / "out"))


def test_nan_rewards_are_named_and_leave_nothing_in_the_way(place, tmp_path):
    broken = save_tiny_reward_model(tmp_path / "broken", 1)
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    output = tmp_path / "out.json"
    result = annotate(place, place / "data.json", output, "--reward_name_or_path", broken)
    ends_in_one_line(result, f"{place / 'data.json'}: row 39: response 0 was given the score nan")
    assert not output.exists()
    assert annotate(place, place / "data.json", output).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.json"]


@pytest.mark.parametrize(
    ("variables", "part"),
    [({"WANDB_API_KEY": "0" * 40}, "127.0.0.1"), ({"WANDB_API_KEY": ""}, "key")],
    ids=["no network", "no key"],
)
def test_wandb_out_of_reach_ends_training_before_it_begins(place, tmp_path, variables, part):
    """And WANDB_MODE=offline, which the line names, trains; its log is beside the model."""
    variables |= {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    began = time.monotonic()
    result = train(place, place / "data.json", tmp_path / "models" / "out", "--report_to", "wandb", **variables)
    assert time.monotonic() - began < 90
    ends_in_one_line(result, "--report_to wandb", "WANDB_MODE=offline")
    assert "reference log-probabilities" not in result.stdout
    variables["WANDB_MODE"] = "offline"
    result = train(place, place / "data.json", tmp_path / "models" / "out", "--report_to", "wandb", **variables)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "models" / "wandb").glob("offline-run-*"))
    assert len(losses(tmp_path / "models" / "out")) == 4
