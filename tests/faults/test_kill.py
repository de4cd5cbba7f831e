"""The real drivers, killed (SIGKILL, the whole process group) in every stage and started again until they are done.

The same commands run side by side, undisturbed and killed at each of MOMENTS in turn. All of them call their run
folder `run`, each in a folder of its own, so that the paths in their files agree; in the end so must the files.
"""

import glob
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import ALIGNMENT, FORKS
from driver_runs import EVALUATE, KL, SLOW, TRAIN, inputs, journal_rows, save_inputs, start, wait_until
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Python reports what it is about to do to audit hooks; this one kills the group there. On PYTHONPATH it is imported
# by every Python process of a driver.
KILLER = """
import os, signal, sys

event, _, name = os.environ.get("KILL_BEFORE", "").partition(" ")

def kill(happening, arguments):
    if happening == event and any(str(a).endswith(name) for a in arguments if isinstance(a, (str, os.PathLike))):
        os.killpg(0, signal.SIGKILL)

if event:
    sys.addaudithook(kill)
"""


class Moment(NamedTuple):
    """When to kill.

    Attributes:
        driver: the driver that runs.
        event: an audit event and how one of its arguments ends ("os.rename gen_data.json": just before that rename);
            or "rows FILE N": FILE's journal holds N rows; or "after STAGE": a seeded 0 to 3 s after its command.
    """

    driver: str
    event: str


MOMENTS = [
    Moment(TRAIN, event)
    for event in (
        # generation
        "after generate 1 online",
        "import transformers",
        "rows gen_data_iter1_online.json 1",
        "rows gen_data_iter1_online.json 7",
        "open gen_data_iter1_online.json.tmp",
        "os.rename gen_data_iter1_online.json",
        "os.remove gen_data_iter1_online.json.journal",
        # annotation
        "open data_with_rewards_iter1_online.json.journal",
        "os.rename data_with_rewards_iter1_online.json",
        "os.remove data_with_rewards_iter1_online.json.journal",
        # training: reference log-probabilities, checkpoints, the finished model
        "os.rename data_with_rewards_iter1_online.json.reference_logps.json",
        "open rlhflow_iter1.partial/checkpoint-1/trainer_state.json",
        "shutil.rmtree rlhflow_iter1.partial/checkpoint-2",  # checkpoint 3 is there
        "open rlhflow_iter1.partial/final/trainer_state.json",
        "os.rename models/rlhflow_iter1",
        "shutil.rmtree rlhflow_iter1.partial",
        # the second iteration
        "rows gen_data_iter2_mixp.json 3",
    )
] + [
    Moment(KL, "rows kl_shared_iter1.json 2"),  # sampling: 4 rows
    Moment(KL, "open kl_shared_iter1.json.tmp"),  # scored: 4 rows more
    Moment(KL, "os.rename kl_shared_iter1.json"),
    Moment(EVALUATE, "open train_prompts/base_iter0.json.journal"),  # the second of two slices
    Moment(EVALUATE, "os.rename test_prompts/shared_iter1_judge.json"),
    Moment(EVALUATE, "os.rename results/report.html"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, prompts, and the killer."""
    folder = tmp_path_factory.mktemp("kill")
    save_inputs(folder)
    (folder / "killer").mkdir()
    (folder / "killer" / "sitecustomize.py").write_text(KILLER)
    return folder


def begin(place: Path, folder: Path, driver: str, log: Path, **environment: str) -> subprocess.Popen:
    """Start a driver in `folder`."""
    given = inputs(place) | SLOW | {"RUN_DIR": "run"} | ({} if driver == TRAIN else {"ITERS": 1})
    return start(driver, given, log, folder, **environment)


def kill_at(place: Path, folder: Path, moment: Moment, log: Path, rng: random.Random) -> None:
    """Runs the driver and kills it at the moment; fails if it ends before."""
    kind, _, rest = moment.event.partition(" ")
    if kind not in ("rows", "after"):
        killer = {"PYTHONPATH": str(place / "killer"), "KILL_BEFORE": moment.event}
        process = begin(place, folder, moment.driver, log, **killer)
        process.wait(timeout=120)
    else:
        process = begin(place, folder, moment.driver, log)
        if kind == "rows":
            name, count = rest.split()
            came = wait_until(lambda: len(journal_rows(folder).get(f"{name}.journal", ())) >= int(count), process)
        else:
            came = wait_until(lambda: f"[{rest}]" in log.read_text(errors="replace"), process)
            time.sleep(rng.uniform(0, 3))
        assert came, f"{moment} never came:\n{log.read_text(errors='replace')[-2000:]}"
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait(timeout=30)
    assert code == -signal.SIGKILL, f"{moment}: exit code {code}\n{log.read_text(errors='replace')[-2000:]}"


def finish(place: Path, folder: Path, driver: str, log: Path) -> None:
    """Runs the driver to its end, in forks: whether it was killed in a Python of its own makes no difference."""
    process = begin(place, folder, driver, log, LOADED_PYTHON=FORKS.started())
    assert process.wait(timeout=300) == 0, log.read_text(errors="replace")[-3000:]


def run_killed(place: Path, folder: Path, *drivers: str) -> Counter:
    """Kills each driver at its moments, then lets it finish; returns what was counted."""
    rng = random.Random(0)
    journals: dict[str, list[bytes]] = {}
    counted = Counter()
    for driver in drivers:
        for number, moment in enumerate(m for m in MOMENTS if m.driver == driver):
            kill_at(place, folder, moment, folder / f"{driver}.{number:02}.log", rng)
            counted["kills"] += 1
            found = journal_rows(folder)
            for name, rows in found.items():
                kept = journals.get(name, [])
                assert rows[: len(kept)] == kept, f"{moment}: {name} lost rows"
                counted["rows found again"] += len(kept)
                keys = [json.loads(row)["key"] for row in rows]
                assert len(set(keys)) == len(keys), f"{moment}: {name} holds a row twice"
            journals = found
        finish(place, folder, driver, folder / f"{driver}.last.log")
    return counted


class Runs(NamedTuple):
    """Folders that hold a `run` each: undisturbed; killed in training; trained undisturbed and killed after that."""

    undisturbed: Path
    trained: Path
    evaluated: Path
    counted: Counter


@pytest.fixture(scope="module")
def runs(place) -> Runs:
    undisturbed, trained, evaluated = folders = [place / name for name in ("undisturbed", "trained", "evaluated")]
    undisturbed.mkdir()
    trained.mkdir()
    FORKS.started()  # before there are threads

    def others() -> Counter:
        finish(place, undisturbed, TRAIN, undisturbed / "train.log")
        shutil.copytree(undisturbed, evaluated)
        for driver in (KL, EVALUATE):
            finish(place, undisturbed, driver, undisturbed / f"{driver}.log")
        return run_killed(place, evaluated, KL, EVALUATE)

    with ThreadPoolExecutor(2) as pool:  # a core each
        parts = [pool.submit(run_killed, place, trained, TRAIN), pool.submit(others)]
        return Runs(*folders, parts[0].result() + parts[1].result())


def test_every_moment_was_a_kill(runs):
    assert runs.counted["kills"] == len(MOMENTS) >= 20


@pytest.mark.parametrize(("name", "count"), [("trained", 6), ("evaluated", 22)])
def test_data_and_results_are_byte_identical(runs, name, count):
    killed = getattr(runs, name)
    files = [
        file.relative_to(killed)
        for pattern in (
            "run/data/*.json",
            "run/eval/*/*.json",
            "run/results/*.json",
            "run/results/*.csv",
            "run/results/*.md",
        )
        for file in killed.glob(pattern)
        # holds the date of the reference's file
        if not file.name.endswith("reference_logps.json")
    ]
    assert len(files) == count
    different = [file for file in files if (runs.undisturbed / file).read_bytes() != (killed / file).read_bytes()]
    assert different == []


def test_training_is_the_same(runs):
    for name in ("rlhflow_iter1", "rlhflow_iter2_online", "rlhflow_iter2_mixp"):
        folders = [runs.undisturbed / "run/models" / name, runs.trained / "run/models" / name]
        states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
        losses = [[e["loss"] for e in state["log_history"] if "loss" in e] for state in states]
        assert len(losses[0]) == states[0]["max_steps"] >= 4
        assert losses[1] == pytest.approx(losses[0], abs=1e-6)
        weights = [load_file(folder / "model.safetensors") for folder in folders]
        assert weights[0].keys() == weights[1].keys()
        for key, tensor in weights[0].items():
            assert torch.allclose(weights[1][key], tensor, atol=1e-6), key


def test_the_same_files_and_nothing_unfinished(runs):
    def names(folder: Path, part: str) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.glob(f"run/{part}")}

    assert names(runs.evaluated, "**/*") == names(runs.undisturbed, "**/*")
    assert names(runs.trained, "models/**/*") == names(runs.undisturbed, "models/**/*")
    left = names(runs.trained, "**/*") | names(runs.evaluated, "**/*")
    assert not [name for name in left if name.endswith((".tmp", ".journal", ".partial"))]


def test_no_work_is_done_twice(runs):
    """What the logs of all starts say that was computed, against what one run needs."""
    text = "\n".join(path.read_text(errors="replace") for path in sorted(runs.trained.glob("*.log")))
    models = runs.trained / "run/models"
    steps = sum(json.loads(path.read_text())["max_steps"] for path in models.glob("*/trainer_state.json"))
    repeated = text.count("'loss':") - steps
    passes = len(re.findall(r"reference log-probabilities: \d+ pairs under", text))
    print(f"{dict(runs.counted)}; {steps} steps, {repeated} repeated; {passes} reference passes")
    # Killed once while a checkpoint was written and twice after the last step, which has none.
    assert 0 <= repeated <= 3
    assert text.count("continuing from") == 3
    # One a training, and one that was killed before its file had its name.
    assert passes == 4
    assert runs.counted["rows found again"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_driver_says_how_to_continue(place, tmp_path, number):
    """SIGTERM and Ctrl-C go to the whole group: no stack trace, nothing left running, the rows are kept."""
    log = tmp_path / "log"
    process = begin(place, tmp_path, TRAIN, log)
    name = "gen_data_iter1_online.json.journal"
    assert wait_until(lambda: len(journal_rows(tmp_path).get(name, ())) >= 2, process)
    os.killpg(process.pid, number)
    code = process.wait(timeout=60)
    text = log.read_text(errors="replace")
    assert code == 130, text
    assert "Traceback" not in text
    assert f"{TRAIN}: stopped; the same command continues from here" in text
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert len(journal_rows(tmp_path)[name]) >= 2


SCRIPTS = {
    "generate": "generation/generate.py",
    "annotate": "annotate_data/get_rewards.py",
    "train": "dpo_iteration/run_dpo.py",
    "kl": "evaluation/get_kl.py",
}


@pytest.fixture(scope="module")
def long_work(place) -> dict[str, tuple[list, str]]:
    """Script → (flags of some minutes of work, a file that shows that it has begun)."""
    folder = place / "long"
    folder.mkdir()
    (folder / "prompts.json").write_text(json.dumps([{"prompt": f"prompt number {i}"} for i in range(3000)]))
    data = [
        {"prompt": f"p{i}", "responses": ["a" * (i % 50), "b" * 60], "rewards": [i * 0.01 + 1, 0.0]}
        for i in range(4000)
    ]
    (folder / "data.json").write_text(json.dumps({"type": "text_only", "instances": data}))
    policy = ["--model_name_or_path", place / "policy"]
    prompts = ["--dataset_name_or_path", folder / "prompts.json", "--max_new_tokens", 64]
    both = [*policy, "--ref_model_name_or_path", place / "policy", *prompts]
    return {
        "generate": ([*both, "--sampler", "mixp", "--max_num_seqs", 4], "{}.journal"),
        "annotate": (
            [
                *("--dataset_name_or_path", folder / "data.json", "--reward_name_or_path", place / "reward"),
                *("--token_budget", 64),
            ],
            "{}.journal",
        ),
        "train": (
            [
                *policy,
                *("--ref_model", place / "policy", "--train_dir", folder / "data.json", "--use_cpu", True),
                *("--max_length", 80, "--save_steps", 1),
            ],
            "{}.partial/checkpoint-*/trainer_state.json",  # any: old ones are removed within a second
        ),
        "kl": ([*both, "--backend", "hf", "--max_num_seqs", 4], "{}.journal"),
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_script_says_how_to_continue(long_work, tmp_path, script, number):
    flags, sign = long_work[script]
    output = tmp_path / "out.json"
    flag = "--output_dir" if script == "train" else "--output_file"

    def signs() -> list[Path]:
        return [Path(name) for name in glob.glob(sign.format(output))]

    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ALIGNMENT / SCRIPTS[script]), *map(str, flags), flag, str(output)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    begun = wait_until(lambda: any(script == "train" or s.read_bytes().count(b"\n") > 2 for s in signs()), process)
    text = (tmp_path / "log").read_text(errors="replace")
    assert begun, text[-3000:]
    os.killpg(process.pid, number)
    code = process.wait(timeout=60)
    text = (tmp_path / "log").read_text(errors="replace")
    assert code == 130, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    assert "stopped; the same command continues from here" in text
    assert signs() and not output.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_a_script_still_imports_is_one_line_too(place, tmp_path, number):
    """The signal comes from inside the import of torch, seconds before `main`."""
    (tmp_path / "sitecustomize.py").write_text(
        KILLER.replace("os.killpg(0, signal.SIGKILL)", f"os.kill(os.getpid(), {int(number)})")
    )
    done = subprocess.run(
        [sys.executable, str(ALIGNMENT / "dpo_iteration/run_dpo.py"), "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "KILL_BEFORE": "import transformers"},
        capture_output=True,
        text=True,
    )
    assert done.returncode not in (0, 2)
    assert done.stderr.strip() == "stopped; the same command continues from here"
