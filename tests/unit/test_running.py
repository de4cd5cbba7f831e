"""Commands that run at the same time: all end, the first failure ends the others, a stop stops all."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ALIGNMENT

from scripts import running

MAIN = f"import sys; sys.path.insert(0, {str(ALIGNMENT)!r}); from scripts import running; "


def python(code: str) -> list[str]:
    """Return a command of a stage: `environment` looks for its interpreter."""
    return [os.path.join(os.path.dirname(sys.executable), "python"), "-c", code]


@pytest.mark.parametrize("gpus", [0, 1])
def test_without_gpus_none_is_seen(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert running.environment(python(""), gpus)["CUDA_VISIBLE_DEVICES"] == ("3" if gpus else "")


def test_commands_run_at_the_same_time(tmp_path):
    """Each waits for the other's file."""
    code = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert running.side_by_side([python(code.format(a, b)), python(code.format(b, a))], 0, 2) == 0


def test_the_first_failure_ends_the_others():
    began = time.monotonic()
    assert running.side_by_side([python("raise SystemExit(3)"), python("import time; time.sleep(600)")], 0, 2) == 3
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_no_more_than_asked_for_run_at_once(at_once, tmp_path):
    """Each writes down who else is there; all five run, also after one that is slow."""
    code = (
        "import os, pathlib, time; here = pathlib.Path({0!r}); mine = here / 'running{1}'; mine.touch()\n"
        "time.sleep(.1 + .5 * ({1} == 0)); count = len(list(here.glob('running*'))); mine.unlink()\n"
        "text = f'{{count}} ' + os.environ.get('OMP_NUM_THREADS', '') + ' ' + os.environ.get('TQDM_POSITION', '')\n"
        "(here / 'done{1}').write_text(text)"
    )
    commands = [python(code.format(str(tmp_path), i)) for i in range(5)]
    assert running.side_by_side(commands, 0, at_once) == 0
    found = [(tmp_path / f"done{i}").read_text().split(" ") for i in range(5)]
    assert max(int(count) for count, _, _ in found) <= at_once
    assert {row for _, _, row in found} == ({""} if at_once == 1 else set(map(str, range(at_once))))


def test_commands_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert running.of_its_share(gpus=0, at_once=2, row=1) == {"TQDM_POSITION": "1", "OMP_NUM_THREADS": "4"}
    assert running.of_its_share(gpus=0, at_once=99, row=0)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in running.of_its_share(gpus=4, at_once=2, row=0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own wins
    assert "OMP_NUM_THREADS" not in running.of_its_share(gpus=0, at_once=2, row=0)


def test_nothing_starts_after_a_failure(tmp_path):
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'started')!r}).touch()"
    assert running.side_by_side([python("raise SystemExit(3)"), python(code)], 0, 1) == 3
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_all_and_is_waited_for(number, tmp_path):
    stage = (
        "import pathlib, signal, sys, time\n"
        "for n in (2, 15): signal.signal(n, lambda *_: sys.exit(130))\n"
        "pathlib.Path({!r}).touch()\nwhile True: time.sleep(.1)"
    )  # brief sleeps: a signal just before one waits for its end
    files = [tmp_path / "a", tmp_path / "b"]
    commands = [python(stage.format(str(file))) for file in files]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{MAIN} raise SystemExit(running.side_by_side({commands!r}, 0, 2))"],
        start_new_session=True,
    )
    while not all(file.exists() for file in files):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_tools_of_the_environment_are_on_the_path():
    found = running.environment(["env", "X=1", "/some/where/bin/python", "x.py"], gpus=0)
    assert found["PATH"].split(os.pathsep)[0] == "/some/where/bin" and found["DS_ACCELERATOR"] == "cpu"


def test_sigint_is_not_ignored_by_what_tests_start():
    """Under nohup or in the background of a shell SIGINT is ignored, and inherited; conftest.py undoes that."""
    tests = ALIGNMENT.parent / "tests"
    ask = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    code = (
        f"import sys; sys.path.insert(0, {str(tests)!r}); import conftest, subprocess; "
        f"subprocess.run([sys.executable, '-c', {ask!r}])"
    )
    done = subprocess.run(
        ["bash", "-c", 'trap "" INT; exec "$@"', "-", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr
