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


def test_commands_run_at_the_same_time(tmp_path):
    """Each waits for the other's file."""
    code = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert running.side_by_side([python(code.format(a, b)), python(code.format(b, a))], 0) == 0


def test_the_first_failure_ends_the_others():
    began = time.monotonic()
    assert running.side_by_side([python("raise SystemExit(3)"), python("import time; time.sleep(600)")], 0) == 3
    assert time.monotonic() - began < 300


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
        [sys.executable, "-c", f"{MAIN} raise SystemExit(running.side_by_side({commands!r}, 0))"],
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
