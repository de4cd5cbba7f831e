"""Starting a stage's commands, and keeping a run's settings in its folder.

Run as a script with SOCKET, it becomes loaded.py, in the environment that a stage's commands have.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError
from scripts.settings import Settings, show


def record(s: Settings) -> None:
    """Write the settings into the run folder; say what differs from those of an earlier start."""
    import yaml

    if s.DRY_RUN or s.MACHINE_RANK:
        return
    file = Path(s.RUN_DIR, "settings.yaml")
    now = asdict(s)
    try:
        before = yaml.safe_load(file.read_text()) if file.exists() else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        before = {}
    if isinstance(before, dict):
        changed = [f"{k} {show(before[k])} -> {show(now[k])}" for k in now if k in before and before[k] != now[k]]
        if changed:
            print(f"{file}: other settings than at the start before: {'; '.join(changed)}")
    file.write_text(yaml.safe_dump(now, sort_keys=False, allow_unicode=True))


def environment(command: list[str], gpus: int) -> dict[str, str]:
    """Return the variables of a command: the user's, and the tools of the command's own environment on PATH."""
    interpreter = next(word for word in command if word.endswith("/python"))
    path = os.pathsep.join((os.path.dirname(interpreter), os.environ.get("PATH", os.defpath)))
    # The warnings are of libraries, about one another.
    found = {"PYTHONWARNINGS": "ignore::FutureWarning"} | os.environ | {"PATH": path}
    if gpus:
        return found
    # Large pages: the kernel clears memory faster, which is a twentieth of sampling and training a small model.
    large_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return large_pages | found | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class Fork:
    """A script that runs in a fork of a Python with the libraries loaded (loaded.py); used as a `Popen`.

    Args:
        path: the socket at which that Python listens, from soon on.
        command: the script and its arguments.
        folder: to work in.
        files: its standard input, output and error; those of this process.

    Raises:
        UserError: nothing answers.
    """

    def __init__(
        self, path: str, command: list[str], environment: dict[str, str], folder: str = ".", files=(0, 1, 2)
    ) -> None:
        self.connection, self.returncode, began = socket.socket(socket.AF_UNIX), None, time.monotonic()
        while self.connection.connect_ex(path) == errno.ENOENT and time.monotonic() - began < 30:
            time.sleep(0.1)
        job = {"command": command, "environment": environment, "folder": os.path.abspath(folder)}
        try:
            socket.send_fds(self.connection, [b"."], files)
            self.connection.sendall(json.dumps(job).encode() + b"\n")
            self.pid = self._number()
        except OSError as error:
            raise UserError(f"LOADED_PYTHON {path}: nothing answers there ({error})") from None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with contextlib.suppress(BlockingIOError):
            self.returncode = self.wait(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self, *how: int) -> int:
        """Return the exit code, when it has ended."""
        if self.returncode is None:
            try:
                self.returncode = self._number(*how)
            except ConnectionError:  # who would tell was killed
                self.returncode = -signal.SIGKILL
        return self.returncode

    def terminate(self) -> None:
        """Send it SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def _number(self, *how: int) -> int:
        sent = self.connection.recv(4, *how)
        if not sent:
            raise ConnectionError("it has ended")
        return int.from_bytes(sent, "little", signed=True)


def start(command: list[str], gpus: int, variables: dict[str, str]) -> subprocess.Popen | Fork:
    """Start a command: a script in a fork of the Python at LOADED_PYTHON, where there is one, on a CPU."""
    path = loaded_python(gpus)
    if path and command[0].endswith("/python") and command[1].endswith(".py"):
        return Fork(path, command[1:], variables)
    return subprocess.Popen(command, env=variables)


def loaded_python(gpus: int) -> str | None:
    """Return the socket of the Python that has the libraries loaded, those for a CPU."""
    return None if gpus else os.environ.get("LOADED_PYTHON")


def become(command: list[str], gpus: int) -> None:
    """Replace this process by the command, so that the driver's signals reach it."""
    sys.stdout.flush()
    os.execvpe(command[0], command, environment(command, gpus))


def side_by_side(commands: list[list[str]], gpus: int, at_once: int) -> int:
    """Run commands, `at_once` of them at the same time; the first that fails ends the others.

    Returns:
        its exit code, else 0.
    """
    # Ctrl-C and SIGTERM go to the whole group: the commands end by themselves, and this process waits for them.
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    sys.stdout.flush()
    waiting, running, code = list(commands), {}, 0
    while (may_start := waiting and not code and not stopped) or running:
        if may_start and len(running) < at_once:
            row = min(set(range(at_once)) - set(running.values()))
            command = waiting.pop(0)
            variables = environment(command, gpus) | of_its_share(gpus, min(at_once, len(commands)), row)
            try:
                process = start(command, gpus, variables)
            except UserError:
                for other in running:
                    other.terminate()
                    other.wait()
                raise
            running[process] = row
            if stopped:  # while it began, perhaps too early for it to get the signal
                process.terminate()
            continue
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            del running[process]
            if process.returncode and not code:
                code = process.returncode if process.returncode > 0 else 128 - process.returncode
                for other in running if code != 130 else []:  # 130: all of them were stopped
                    other.terminate()
    return code or (128 + stopped[0] if stopped and waiting else 0)


def of_its_share(gpus: int, at_once: int, row: int) -> dict[str, str]:
    """Return the variables of one of several commands: its share of the cores, a line of its own for its bar."""
    cores = len(os.sched_getaffinity(0))
    threads = {} if gpus or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // at_once))}
    return {"TQDM_POSITION": str(row)} | threads if at_once > 1 else {}


if __name__ == "__main__":  # running.py SOCKET
    become([sys.executable, str(Path(__file__).with_name("loaded.py")), sys.argv[1]], gpus=0)
