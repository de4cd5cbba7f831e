"""Runs many command lines of the project's scripts in this one process: a start of Python with torch takes seconds.

Reads   standard input: a JSON list of [script, argument, ...]; the first argument is a folder to watch.
Writes  standard output: for each the exit code, what it printed on standard error (file descriptor 2, so that of
        libraries in other languages too), and which files of the folder it made, changed or removed.
"""

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path


def snapshot(folder: Path) -> dict[str, tuple]:
    """Path → what changes when a file is written."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items() if not path.is_dir()} | {
        str(path): ("folder",) for path in found if path.is_dir()
    }


def call(command: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a script that is run as `python script argument ...`."""
    sys.argv = command
    with tempfile.TemporaryFile() as errors:
        kept = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:  # what would be a stack trace
            code = 1
            print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        errors.seek(0)
        return code, errors.read().decode()


def main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    results = []
    for command in json.load(sys.stdin):
        before = snapshot(folder)
        code, errors = call(command)
        after = snapshot(folder)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        results.append({"code": code, "stderr": errors, "changed": changed})
    json.dump(results, answers)
    answers.close()


if __name__ == "__main__":
    main()
