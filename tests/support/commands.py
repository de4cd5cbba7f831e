"""Running the project's real scripts from tests."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ALIGNMENT = PROJECT / "alignment"


def python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs `alignment/<script>` with this interpreter; standard output and error are captured as text."""
    command = [sys.executable, str(ALIGNMENT / script), *map(str, arguments)]
    return run(command, **environment)


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
