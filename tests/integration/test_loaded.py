"""scripts/loaded.py: a script in a fork of a loaded Python is what it is in a Python of its own, and stops so."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import ALIGNMENT, FORKS, alone
from driver_runs import SLOW, TRAIN, inputs, journal_rows, save_inputs, start, wait_until

SEES = """
import gc, json, os, signal, sys, threading
sys.path.append({alignment!r})
import common.cli, torch
from tqdm import tqdm
handlers = [str(signal.getsignal(n)).split(" at ")[0] for n in (2, 15, signal.SIGCHLD, signal.SIGPIPE)]
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
files = [f"/proc/self/fd/{{number}}" for number in os.listdir("/proc/self/fd") if int(number) > 2]
left_open = [os.readlink(file) for file in files if os.path.exists(file)]
print(json.dumps([
    sys.argv, sys.path[0], os.getcwd(), __name__, __file__, dict(os.environ), handlers, blocked, sys.stdin.read(),
    torch.get_num_threads(), tqdm(disable=False, file=open(os.devnull, "w")).pos, gc.get_threshold(),
    threading.active_count(), [name for name in left_open if name.startswith(("socket", "pipe"))],
]))
"""


def fork(command, **variables):
    """What a script does in a fork, whatever is in the environment."""
    return FORKS.start([str(word) for word in command], dict(os.environ) | variables)


@pytest.mark.parametrize("variables", [{}, {"OMP_NUM_THREADS": "2", "TQDM_POSITION": "1", "NEW": "x"}])
def test_a_fork_sees_what_a_python_of_its_own_sees(tmp_path, variables):
    (tmp_path / "sees.py").write_text(SEES.format(alignment=str(ALIGNMENT)))
    words = [tmp_path / "sees.py", "a word", "--flag"]
    own, forked = alone(*words, **variables), fork(words, **variables)
    assert (forked.returncode, forked.stderr) == (0, "")
    assert json.loads(forked.stdout) == json.loads(own.stdout)


@pytest.mark.parametrize(
    "ending",
    [
        "print('done')",
        "raise SystemExit(3)",
        "raise SystemExit('a text')",
        "1 / 0",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(print, 'at the end')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.5), print('waited for'))).start()",
        "import sys; sys.path.append({alignment!r}); from common.cli import fail; fail('a wrong input')",
    ],
)
def test_it_ends_as_one(tmp_path, ending):
    (tmp_path / "ends.py").write_text(ending.format(alignment=str(ALIGNMENT)))
    own, forked = alone(tmp_path / "ends.py"), fork([tmp_path / "ends.py"])
    assert (forked.returncode, forked.stdout) == (own.returncode, own.stdout)
    assert forked.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]  # a stack trace has two frames more


ASKS = """
import os, sys
sys.path.append({alignment!r})
from scripts import running
raise SystemExit(running.side_by_side({commands!r}, 0, 2))
"""


def asking(tmp_path, *scripts):
    """A process that has scripts run side by side in forks."""
    commands = []
    for number, text in enumerate(scripts):
        (tmp_path / f"{number}.py").write_text(text)
        commands.append([sys.executable, str(tmp_path / f"{number}.py")])
    code = ASKS.format(alignment=str(ALIGNMENT), commands=commands)
    return subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ) | {"LOADED_PYTHON": FORKS.started()})


SLEEPS = "import os, time; open('{0}.new', 'w').write(str(os.getpid())); os.rename('{0}.new', '{0}'); time.sleep(600)"


def has_ended(file):
    """Whether the process that wrote its number into the file ends within seconds."""
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{file.read_text()}") and time.monotonic() < end:
        time.sleep(0.1)
    return not os.path.exists(f"/proc/{file.read_text()}")


def test_the_first_that_fails_ends_the_other(tmp_path):
    waits = f"import os, time\nwhile not os.path.exists('{tmp_path}/pid'): time.sleep(0.1)\nraise SystemExit(3)"
    assert asking(tmp_path, SLEEPS.format(tmp_path / "pid"), waits).wait(timeout=60) == 3
    assert has_ended(tmp_path / "pid")


def test_a_script_ends_with_who_asked_for_it(tmp_path):
    process = asking(tmp_path, SLEEPS.format(tmp_path / "pid"))
    assert wait_until((tmp_path / "pid").exists, process)
    process.kill()
    assert has_ended(tmp_path / "pid")


def test_it_samples_the_same(tmp_path):
    """vLLM's engine in a fork and in a Python of its own."""
    save_inputs(tmp_path)
    policy = tmp_path / "policy"
    words = [ALIGNMENT / "generation/generate.py", "--model_name_or_path", policy, "--ref_model_name_or_path", policy]
    words += ["--dataset_name_or_path", tmp_path / "prompts.json", "--sampler", "mixp", "--temperature", 1]
    words += ["--max_new_tokens", 16, "--output_file"]
    own, forked = alone(*words, tmp_path / "own.json"), fork([*words, tmp_path / "forked.json"])
    assert (own.returncode, forked.returncode) == (0, 0), own.stderr + forked.stderr
    assert (tmp_path / "own.json").read_bytes() == (tmp_path / "forked.json").read_bytes()


@pytest.mark.parametrize(
    ("script", "number"), [("../quickstart.sh", signal.SIGTERM), ("sample_ablation.sh", signal.SIGINT)]
)
def test_what_starts_one_is_stopped_with_all_that_it_started(assets, tmp_path, script, number):
    """A signal to the group, as from a terminal: one line, nothing is left running, what was sampled is kept."""
    save_inputs(tmp_path)
    given = inputs(tmp_path) | SLOW | {"RUN_DIR": tmp_path / "run", "ASSETS": assets}
    del given["RECIPE"]
    process = start(script, given, tmp_path / "log")
    name = "gen_data_iter1_online.json.journal"
    came = wait_until(lambda: len(journal_rows(tmp_path).get(name, ())) >= 2, process)
    assert came, (tmp_path / "log").read_text()
    started = [one.cmdline() for one in psutil.Process(process.pid).children(recursive=True)]
    assert sum(any(word.endswith("loaded.py") for word in words) for words in started) >= 2  # and its fork
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) in (130, -number)
    end = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    text = (tmp_path / "log").read_text(errors="replace")
    assert f"{TRAIN}: stopped; the same command continues from here" in text and "Traceback" not in text, text
    assert len(journal_rows(tmp_path)[name]) >= 2
