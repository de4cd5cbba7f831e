"""What a driver would run: the commands that DRY_RUN=1 prints, as words."""

import functools
import os
import re
import shlex

from commands import bash, settings

Commands = list[tuple[str, list[str]]]


def plan(driver: str, environment: dict | None = None, **values) -> Commands:
    """Return (stage, words of its command) for each command that a driver would run with these settings."""
    return _plan(driver, tuple((environment or {}).items()), tuple(settings(DRY_RUN=1, **values)))


@functools.cache
def _plan(driver: str, environment: tuple, words: tuple) -> Commands:
    result = bash(f"alignment/{driver}", *words, **dict(environment))
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^\[(.+?)\] (.+)$", result.stdout, re.MULTILINE)
    return [(stage, shlex.split(command)) for stage, command in found]


def flag(words: list[str], name: str) -> str:
    """Return the first value of a flag."""
    return words[words.index(name) + 1]


def values(words: list[str], name: str) -> list[str]:
    """Return all values of a flag; none where it is missing."""
    start = words.index(name) + 1 if name in words else len(words)
    end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
    return words[start:end]


def in_turn(words: list[str]) -> list[list[str]]:
    """Return the flags of each of the command lines that one process runs."""
    marks = [i for i, word in enumerate(words) if word == "--then"]
    return [words[start + 1 : end] for start, end in zip([1, *marks], [*marks, len(words)], strict=True)]


def refused(driver: str, environment: dict | None = None, **values) -> str:
    """Return the one line with which a driver refuses its settings."""
    result = bash(f"alignment/{driver}", *settings(**values), **(environment or {}))
    assert result.returncode == 2, result.stdout
    [line] = result.stderr.splitlines()
    return line


def fake_nvidia_smi(folder, gpus: int, mebibytes: int = 81559) -> dict[str, str]:
    """Return an environment in which nvidia-smi lists so many GPUs; with 0 it fails, as without a driver."""
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"    echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(gpus))
    sizes = "".join(f"    echo {mebibytes}\n" for _ in range(gpus))
    code = "" if gpus else "exit 9\n"
    tool.write_text(f"#!/bin/sh\n{code}case $1 in\n--list-gpus)\n{lines}    ;;\n--query*)\n{sizes}    ;;\nesac\n")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
