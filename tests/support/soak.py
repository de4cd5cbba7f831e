"""Killing any process of a running command: all that it starts carry a mark in their environment."""

import contextlib
import os
import random
import re
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from common.journal import journal_path

MARK = "SOAK_RUN"
NO_HANG = 240  # seconds within which a command must have ended after one of its processes was killed


class Command(NamedTuple):
    """What is run again and again until it is done.

    Attributes:
        words: the command line.
        environment: variables besides this process's own.
        output: what is there when it is done.
    """

    words: list[str]
    environment: dict[str, str]
    output: Path


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry the mark, and their children, in the order of their ids.

    vLLM's engine process writes its name over its environment, and the mark is lost.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # of another user, or just gone
            if process.environ().get(MARK) == mark:
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    return [one for _, one in sorted(found.items()) if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def start(command: Command, log: Path, mark: str) -> subprocess.Popen:
    """Starts the command; what it prints is added to `log`."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [str(word) for word in command.words],
            env={**os.environ, **command.environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(command: Command, log: Path, mark: str) -> float:
    """Runs the command to its end; returns the seconds that it took."""
    began = time.monotonic()
    process = start(command, log, mark)
    try:
        assert process.wait(timeout=600) == 0, log.read_text(errors="replace")[-3000:]
    finally:
        clear(mark)
    return time.monotonic() - began


def kill_one(command: Command, log: Path, mark: str, longest: float, rng: random.Random, wanted: str = "") -> str:
    """Runs the command and kills one of its processes after a random time.

    Args:
        longest: seconds, of that time.
        wanted: kill the process with this in its title instead, as soon as the journal holds rows.

    Returns:
        What that process was (`title`); nothing if the command was done before.
    """
    process = start(command, log, mark)
    try:
        if wanted:
            while process.poll() is None and not has_rows(command.output):
                time.sleep(0.05)
            victims = [victim for victim in marked(mark) if wanted in title(victim)]
            assert victims, f"no {wanted} among {[title(found) for found in marked(mark)]}"
        else:
            time.sleep(rng.uniform(0, longest))
            victims = marked(mark)
        if process.poll() is not None or not victims:
            assert process.wait(timeout=NO_HANG) == 0, log.read_text(errors="replace")[-3000:]
            return ""
        victim = rng.choice(victims)
        name = "the script" if victim.pid == process.pid else title(victim)
        victim.kill()
        process.wait(timeout=NO_HANG)  # whatever the code: engines are started again, or the script ends
        return name
    finally:
        clear(mark)


def has_rows(output: Path) -> bool:
    """Whether the journal beside `output` holds more than its first line, the settings."""
    path = journal_path(output)
    return path.exists() and path.read_bytes().count(b"\n") > 1


def title(process: psutil.Process) -> str:
    """The beginning of its command line without folders; of vLLM's engine the name that it gives itself there."""
    try:
        words = [re.sub(r"\S*/", "", word) for word in process.cmdline()]
    except psutil.Error:  # just gone
        words = []
    return " ".join(words).strip()[:60] or process.name()


def clear(mark: str) -> None:
    """Ends what a killed command has left running, as a job scheduler does."""
    for process in marked(mark):
        try:
            process.kill()
            process.wait(timeout=30)
        except psutil.Error:
            continue
