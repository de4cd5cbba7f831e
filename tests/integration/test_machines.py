"""Several machines: ranks of the drivers, and the Slurm script on a stand-in for a cluster.

The stand-in's `srun` runs each task of a job step on this computer, with the variables that Slurm sets for it.
"""

import ast
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import PROJECT, bash, settings
from driver_runs import TRAIN, inputs, save_inputs
from plans import flag, plan
from training_runs import losses

from common.record_stream import read_records

SCONTROL = '#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && [ -n "$FAKE_NODES" ] && printf "%s\\n" $FAKE_NODES\n'
SRUN = """#!{python}
import os, signal, subprocess, sys

words = sys.argv[1:]
options = {{}}
while words[0].startswith("--"):
    name, _, value = words.pop(0)[2:].partition("=")
    options[name] = value
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(repr((options, words)) + "\\n")
tasks = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": str(rank), "SLURM_PROCID": str(rank)}})
    for rank in range(int(options["ntasks"]))
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def cluster(tmp_path):
    """Environment variables of a job on two nodes; its steps are logged in FAKE_LOG."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN.format(python=sys.executable))):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "FAKE_NODES": "127.0.0.1 127.0.0.2",
        "FAKE_LOG": str(tmp_path / "steps"),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "SLURM_GPUS_ON_NODE": "8",
    }


def steps(cluster: dict) -> list[tuple[dict, list[str]]]:
    """(options, command) of each job step."""
    return [ast.literal_eval(line) for line in Path(cluster["FAKE_LOG"]).read_text().splitlines()]


def test_only_the_first_machine_makes_data_and_all_train():
    common = {"NUM_MACHINES": 2, "MASTER_ADDR": "head", "ITERS": 2, "RUN_DIR": "/run", "SAMPLERS": "gshf mixp"}
    first, second = (plan(TRAIN, MACHINE_RANK=rank, **common) for rank in (0, 1))
    made, waited = [], []
    for n, samplers in ((1, ["online"]), (2, ["gshf", "mixp"])):
        trainings = [f"train {n} {sampler}" for sampler in samplers]
        made += [f"generate {n} {' '.join(samplers)}", f"annotate {n} {' '.join(samplers)}", *trainings]
        for kind in ("gen_data", "data_with_rewards"):
            waited += [f"/run/data/{kind}_iter{n}_{sampler}.json" for sampler in samplers]
        waited += trainings
    assert [stage for stage, _ in first] == made
    # Not until all of an iteration is annotated: the processes of a training wait for each other minutes only.
    assert [words[0] if stage == "wait" else stage for stage, words in second] == waited
    for stage in ("train 1 online", "train 2 mixp"):
        one, two = dict(first)[stage], list(dict(second)[stage])
        assert (flag(one, "--machine_rank"), flag(two, "--machine_rank")) == ("0", "1")
        two[two.index("--machine_rank") + 1] = "0"
        assert one == two  # nothing else differs


def test_slurm_plan(cluster):
    """What the job would run: Ray on each node, then each driver with its rank and everyone's addresses."""
    done = bash("alignment/configs/slurm.sh", "DRY_RUN=1", "ITERS=1", "RUN_DIR=/run", **cluster)
    assert done.returncode == 0, done.stderr
    ray = [shlex.split(line) for line in re.findall(r"^\[ray\] (.+)$", done.stdout, re.MULTILINE)]
    assert [words[words.index("start") :][:2] for words in ray] == [
        ["start", "--head"],
        ["start", "--address=127.0.0.1:32345"],
    ]
    assert "--nodelist=127.0.0.1" in ray[0] and "--nodelist=127.0.0.2" in ray[1]
    assert {"--port=32345", "--node-ip-address=127.0.0.1", "--block"} <= set(ray[0]) and "--block" in ray[1]
    [(options, _)] = steps(cluster)  # Ray is only printed
    assert (options["nodes"], options["ntasks"], options["gpus-per-node"]) == ("2", "2", "8")
    assert options["kill-on-bad-exit"] == "1"
    trainings = [shlex.split(line) for line in re.findall(r"^\[train 1 online\] (.+)$", done.stdout, re.MULTILINE)]
    assert sorted(flag(words, "--machine_rank") for words in trainings) == ["0", "1"]
    for words in trainings:
        assert (flag(words, "--num_machines"), flag(words, "--num_processes")) == ("2", "16")
        assert flag(words, "--main_process_ip") == "127.0.0.1"
        assert flag(words, "--main_process_port") == "22345"
    assert done.stdout.count("[generate 1 online]") == 1
    assert done.stdout.count("[wait]") == 2  # for the responses, for their rewards


def test_slurm_on_one_node_needs_no_ray(cluster):
    one = {**cluster, "FAKE_NODES": "127.0.0.1"}
    words = "sample_train_iterative_prompt.sh", "DRY_RUN=1", "ITERS=1"
    done = bash("alignment/configs/slurm.sh", *words, **one)
    assert done.returncode == 0, done.stderr
    assert "[ray]" not in done.stdout and "iterative-prompt" in done.stdout
    assert [options["ntasks"] for options, _ in steps(cluster)] == ["1"]


@pytest.mark.parametrize(
    ("words", "environment", "part"),
    [
        ((), {"SLURM_JOB_ID": ""}, "not a Slurm job"),
        ((), {"SLURM_SUBMIT_DIR": "/"}, "no alignment/sample_train_safe_rlhf.sh in /"),
        (("sample_kl.sh",), {}, "only training runs over several nodes"),
        (("none.sh",), {}, "no alignment/none.sh"),
        ((), {"FAKE_NODES": ""}, "names no node"),
    ],
)
def test_slurm_refuses(cluster, words, environment, part):
    done = bash("alignment/configs/slurm.sh", *words, "DRY_RUN=1", **{**cluster, **environment})
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("slurm.sh: error: ") and part in line


def test_a_driver_that_fails_fails_the_job(cluster):
    done = bash("alignment/configs/slurm.sh", "DRY_RUN=1", "ITERS=0", **cluster)
    assert done.returncode == 2 and "ITERS" in done.stderr


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def job(cluster, tmp_path):
    """The environment and the settings of a job on two nodes that really trains, one process per node, on CPUs."""
    save_inputs(tmp_path)
    more = {"ITERS": 1, "GPUS": 1, "BACKEND": "hf", "ACCELERATE_CONFIG": "cpu", "MASTER_PORT": free_port()}
    values = inputs(tmp_path) | more | {"RUN_DIR": tmp_path / "run"}
    return os.environ | cluster | {"DS_ACCELERATOR": "cpu", "RAY_PORT": str(free_port())}, settings(**values)


def start(job: tuple, output: Path) -> subprocess.Popen:
    environment, words = job
    with output.open("w") as log:
        command = ["bash", str(PROJECT / "alignment" / "configs" / "slurm.sh"), *words]
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def ray_processes(job: tuple) -> list[str]:
    """Command lines of this job's Ray that are alive (its port is in each)."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f":{job[0]['RAY_PORT']}" in line and not line.startswith("ps ")]


@pytest.mark.slow
def test_slurm_job_trains_over_two_nodes_and_ends_ray(job, tmp_path):
    """Real Ray, real drivers, two machines' processes training together; nothing is left running."""
    process = start(job, tmp_path / "log")
    seen: list[str] = []
    while process.poll() is None:
        seen = max(seen, ray_processes(job), key=len)
        time.sleep(0.5)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    assert sum("raylet" in line for line in seen) >= 2, seen
    assert ray_processes(job) == []
    run = tmp_path / "run"
    rows, _ = read_records(run / "data/data_with_rewards_iter1_online.json", ("responses", "rewards"))
    trained = losses(run / "models/rlhflow_iter1")
    assert len(rows) == 8 and len(trained) == 4  # two epochs of 8 pairs, 4 a step
    assert trained[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference still
    assert log.count("[generate 1 online]") == 1 and log.count("[train 1 online]") == 2
    settings = (run / "models/rlhflow_iter1/settings.json").read_text()
    assert '"num_processes": 2' in settings


@pytest.mark.slow
def test_a_slurm_job_that_is_cancelled_ends_ray(job, tmp_path):
    process = start(job, tmp_path / "log")
    end = time.monotonic() + 240
    while not any("raylet" in line for line in ray_processes(job)) and time.monotonic() < end:
        time.sleep(0.5)
    assert ray_processes(job), (tmp_path / "log").read_text()
    os.killpg(process.pid, signal.SIGTERM)  # as scancel does: to all processes of the job
    process.wait(timeout=120)
    while ray_processes(job) and time.monotonic() < end:
        time.sleep(0.5)
    assert process.returncode != 0 and ray_processes(job) == []
