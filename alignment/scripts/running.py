"""Starting a stage's commands, and keeping a run's settings in its folder."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

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
    return found | ({} if gpus else {"DS_ACCELERATOR": "cpu"})


def become(command: list[str], gpus: int) -> None:
    """Replace this process by the command, so that the driver's signals reach it."""
    sys.stdout.flush()
    os.execvpe(command[0], command, environment(command, gpus))


def side_by_side(commands: list[list[str]], gpus: int) -> int:
    """Run commands at the same time; the first that fails ends the others. Return its exit code, else 0."""
    # Ctrl-C and SIGTERM go to the whole group: the commands end by themselves, and this process waits for them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    sys.stdout.flush()
    running = [subprocess.Popen(command, env=environment(command, gpus)) for command in commands]
    code = 0
    while running:
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode and not code:
                code = process.returncode if process.returncode > 0 else 128 - process.returncode
                for other in running if code != 130 else []:  # 130: all of them were stopped
                    other.terminate()
    return code
