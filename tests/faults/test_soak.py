"""Kills at random times of any process: two engines, vLLM's engine process, two training processes.

Each command is started again until it is done. In the end its file must be, byte by byte, that of an undisturbed run.
The stages with engines and training take long and are run when they are asked for:

    SOAK=1 bash run_tests.sh tests/faults/test_soak.py
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import ALIGNMENT
from soak import Command, clear, finish, kill_one, marked, start, title
from tiny import save_tiny_policy, save_tiny_reward_model

pytestmark = pytest.mark.slow
KILLS_EACH = 5
SHORT = "annotate_function"  # always run
ENGINE = "EngineCore"  # in the name that vLLM's engine process gives itself
STAGES = ("generate", "generate_vllm", "annotate", "annotate_function", "train")

RULES = """
import time

def length(prompt, responses, fields):
    time.sleep(0.002)
    return [len(response) for response in responses]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, prompts, responses, scored responses."""
    folder = tmp_path_factory.mktemp("soak")
    save_tiny_policy(folder / "policy", 0, hidden=64, layers=2, heads=2)
    save_tiny_policy(folder / "reference", 1, hidden=64, layers=2, heads=2)
    save_tiny_reward_model(folder / "reward", 1)
    (folder / "prompts.json").write_text(
        json.dumps([{"prompt": f"prompt {'abcdefgh'[i % 8] * (i % 40)}"} for i in range(120)])
    )
    rows = [{"prompt": f"p{i}", "responses": ["a" * (i % 50), "b" * 9]} for i in range(1500)]
    (folder / "responses.json").write_text(json.dumps({"instances": rows}))
    (folder / "rules.py").write_text(RULES)
    scored = [{**row, "rewards": [1.0 + i, 0.5]} for i, row in enumerate(rows[1:41])]
    (folder / "scored.json").write_text(json.dumps({"instances": scored}))
    return folder


def commands(place: Path, folder: Path) -> dict[str, Command]:
    """The command of each stage, with outputs in `folder`."""
    python = [sys.executable]
    models = ["--model_name_or_path", place / "policy", "--ref_model_name_or_path", place / "reference"]
    generate = [
        *(*python, ALIGNMENT / "generation/generate.py", *models, "--dataset_name_or_path", place / "prompts.json"),
        *("--sampler", "mixp", "--K", 4, "--temperature", 1, "--max_new_tokens", 24, "--max_input_length", 100),
        *("--max_num_seqs", 4, "--dtype", "float32", "--output_file", folder / "out.json"),
    ]
    annotate = [
        *(*python, ALIGNMENT / "annotate_data/get_rewards.py", "--dataset_name_or_path", place / "responses.json"),
        *("--output_file", folder / "out.json"),
    ]
    by_model = ["--reward_name_or_path", place / "reward", "--token_budget", 64, "--num_engines", 2]
    launch = [*python, "-m", "accelerate.commands.launch", "--config_file", ALIGNMENT / "configs/cpu.yaml"]
    train = [
        *(*launch, "--num_processes", 2, ALIGNMENT / "dpo_iteration/run_dpo.py", "--use_cpu", True),
        *("--model_name_or_path", place / "policy", "--ref_model", place / "reference", "--max_length", 64),
        *("--train_dir", place / "scored.json", "--per_device_train_batch_size", 2, "--save_steps", 1),
        *("--num_train_epochs", 2, "--learning_rate", 1e-3, "--disable_tqdm", True, "--output_dir", folder / "out"),
    ]
    calm = {"OMP_NUM_THREADS": "1", "CI": "1"}
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    path = {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    return {
        "generate": Command([*generate, "--backend", "hf", "--num_engines", 2], calm, folder / "out.json"),
        "generate_vllm": Command([*generate, "--backend", "vllm"], calm | apart, folder / "out.json"),
        "annotate": Command([*annotate, *by_model], calm, folder / "out.json"),
        "annotate_function": Command(
            [*annotate, "--reward_function", f"{place / 'rules.py'}:length"], calm, folder / "out.json"
        ),
        "train": Command(train, calm | path, folder / "out"),
    }


def results(output: Path) -> dict[str, bytes]:
    """Name → bytes of the files that a stage leaves and that hold no times."""
    if output.is_file():
        return {output.name: output.read_bytes()}
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def test_the_log_tells_processes_of_one_program_apart():
    """A plain process, and one that names itself as vLLM's engine does."""
    wait = "print(flush=True); input()"
    named = f"from setproctitle import setproctitle; setproctitle('VLLM::EngineCore'); {wait}"
    found = []
    for code in (wait, named):
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            found.append(title(psutil.Process(process.pid)))
            process.stdin.write(b"\n")
    assert found == [f"{Path(sys.executable).name} -c {wait}", "VLLM::EngineCore"]


def test_a_child_that_writes_over_its_environment_is_found(tmp_path):
    """As vLLM's engine process does; by the mark alone it would never be a victim."""
    child = "from setproctitle import setproctitle; setproctitle('VLLM::EngineCore'); import time; time.sleep(100)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    mark = str(tmp_path)
    process = start(Command([sys.executable, "-c", parent], {}, tmp_path), tmp_path / "log", mark)
    try:
        end = time.monotonic() + 60
        while not (found := [title(one) for one in marked(mark)])[1:] or ENGINE not in found[1]:
            assert time.monotonic() < end, found
            time.sleep(0.1)
    finally:
        clear(mark)
    process.wait(timeout=60)
    assert not marked(mark)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=pytest.mark.skipif(stage != SHORT and not os.environ.get("SOAK"), reason="SOAK=1"))
        for stage in STAGES
    ],
)
def test_the_same_bytes_after_random_kills(place, tmp_path, stage):
    rng = random.Random(stage)
    undisturbed, killed = (commands(place, tmp_path / name)[stage] for name in ("undisturbed", "killed"))
    log = tmp_path / "log"
    longest = finish(undisturbed, log, f"{tmp_path}/undisturbed")
    names = []
    while len(names) < KILLS_EACH:
        # Chance may miss vLLM's engine process, so the first kill of that stage is its.
        wanted = ENGINE if stage == "generate_vllm" and not names else ""
        name = kill_one(killed, log, f"{tmp_path}/killed", longest, rng, wanted)
        if name:
            names.append(name)
        else:  # done before its time came: from the beginning
            check(killed, undisturbed)
            shutil.rmtree(killed.output.parent)
    finish(killed, log, f"{tmp_path}/killed")
    print(f"{stage}: killed {', '.join(names)}; undisturbed {longest:.0f} s")
    assert stage != "generate_vllm" or ENGINE in names[0]
    check(killed, undisturbed)
    assert {path.name for path in killed.output.parent.iterdir()} == {
        path.name for path in undisturbed.output.parent.iterdir()
    }


def check(killed: Command, undisturbed: Command) -> None:
    """The outputs are the same, byte by byte."""
    found, expected = results(killed.output), results(undisturbed.output)
    assert expected and found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
