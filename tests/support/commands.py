"""Running the project's real scripts from tests."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from scripts.running import Fork

PROJECT = Path(__file__).resolve().parents[2]
ALIGNMENT = PROJECT / "alignment"


class Forks:
    """Starts scripts in forks of a Python that has the libraries loaded (scripts/loaded.py)."""

    # What a fork may find set otherwise: the libraries have read the other variables when they were imported. Engines
    # and libraries in the process of the tests set the last four.
    MAY_DIFFER = ("CI", "PYTHON", "PYTEST_", "RAY_", "VLLM_", "TORCHINDUCTOR_", "ACCELERATE_", "PYTORCH_NVML_")

    def __init__(self) -> None:
        self.server, self.began_with, self.folder = None, {}, None

    def started(self) -> str:
        """Start that Python, once; return its socket."""
        if self.server is None:
            self.began_with = dict(os.environ)
            self.folder = tempfile.TemporaryDirectory(dir="/tmp")  # a socket's path is short
            words = [sys.executable, ALIGNMENT / "scripts/running.py", f"{self.folder.name}/socket"]
            self.server = subprocess.Popen(words, stdin=subprocess.PIPE)
        return f"{self.folder.name}/socket"

    def run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess | None:
        """Return what the script did; None where it needs a Python of its own."""
        self.started()
        environment = dict(os.environ) | environment
        differ = {name for name, _ in environment.items() ^ self.began_with.items()}
        return self.start(command, environment) if all(n.startswith(self.MAY_DIFFER) for n in differ) else None

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        """Return what the script did."""
        with (
            tempfile.TemporaryFile("w+") as output,
            tempfile.TemporaryFile("w+") as errors,
            open(os.devnull) as nothing,
        ):
            files = [file.fileno() for file in (nothing, output, errors)]
            process = Fork(self.started(), command, environment, "/", files)
            late = threading.Timer(1500, process.terminate)
            late.start()
            code = process.wait()
            late.cancel()
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(command, code, output.read(), errors.read())


FORKS = Forks()


def python(script: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs `alignment/<script>`, or any file, with this interpreter; its output and errors are captured as text."""
    command = [str(ALIGNMENT / script), *map(str, arguments)]
    return FORKS.run(command, environment) or alone(script, *arguments, **environment)


def alone(script: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs the same in a Python of its own."""
    return run([sys.executable, str(ALIGNMENT / script), *map(str, arguments)], **environment)


def bash(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs a bash script of the project; the path is relative to the project's folder."""
    return run(["bash", str(PROJECT / script), *map(str, arguments)], **environment)


def settings(**values: object) -> list[str]:
    """Return the settings as arguments of a driver, NAME=value."""
    return [f"{name}={value}" for name, value in values.items()]


def run(command: list[str], folder: str | Path = "/", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        cwd=folder,  # any: every script works from anywhere
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def ends_in_one_line(result: subprocess.CompletedProcess, *parts: object) -> None:
    """Exit code 2 and an error of one line that holds `parts`; before it only progress bars."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if "it/s]" not in line and "response/s" not in line and "%|" not in line]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert str(part) in errors[0]


def engine_starts(result: subprocess.CompletedProcess) -> int:
    """Return how often vLLM says that it starts an engine; it does with VLLM_LOGGING_LEVEL=INFO."""
    return (result.stdout + result.stderr).count("Initializing a V1 LLM engine")
