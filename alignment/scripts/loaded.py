"""A Python that has imported the libraries; each script that it is given runs in a fork of it.

    python alignment/scripts/loaded.py SOCKET

On a CPU a start of Python with torch, transformers and vLLM takes 4 to 10 seconds, and its end a second or two more,
for every command of a run. A fork is otherwise a process like any other: arguments, environment, output, signals,
exit code. quickstart.sh and, on a CPU, sample_ablation.sh start one (loaded.sh); a driver uses it where the variable
LOADED_PYTHON names its socket. All belong to one process group, to which a terminal's Ctrl-C goes.

Reads   from each connection to SOCKET the script's standard input, output and error (open files; their byte is no
        matter), then a line of JSON: {"command": [script, argument, ...], "environment": {...}, "folder": ...}.
Writes  to it the process id, and when the script has ended its exit code: 4 bytes each.

Ends with its standard input, so with whoever holds the other end. A script is stopped when who asked for it ends.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.cli  # noqa: F401  (before the libraries: it sets what they read as they are imported)

LIBRARIES = (
    *("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    *("transformers.trainer", "transformers.models.llama.modeling_llama", "datasets", "peft"),
)
OF_SCRIPTS = (signal.SIGINT, signal.SIGTERM)  # the terminal sends them to all; this process has an end of its own


def serve(path: str) -> list[str]:
    """Start scripts until standard input ends; in a fork, return the script and its arguments."""
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_SCRIPTS)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for forks that have ended
    sys.stdout.flush()
    while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            return answer(connection)
        connection.close()
    os._exit(0)


def answer(connection: socket.socket) -> list[str]:
    """Start one script and tell how it ended; in its process, return it and its arguments."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    job = json.loads(connection.makefile().readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if process := os.fork():
        with contextlib.suppress(OSError):
            connection.sendall(process.to_bytes(4, "little"))
        if connection in select.select([connection, os.pidfd_open(process)], [], [])[0]:  # who asked has ended
            os.kill(process, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(code.to_bytes(4, "little", signed=True))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    return job["command"]


def as_at_a_start(script: str) -> None:
    """Do what Python and the libraries do as they start."""
    import torch
    from tqdm.std import tqdm

    del sys.modules["common.cli"]  # for a script to import, which has effects
    path = os.environ.get("PYTHONPATH", "")
    sys.path[:2] = [os.path.dirname(script), *filter(None, path.split(os.pathsep))]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads.split(",")[0]))  # the others are of nested regions
    if position := os.environ.get("TQDM_POSITION"):
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, position=int(position))
    # The level that the project's engines set before they import vLLM.
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_SCRIPTS)


def run_and_leave(script: str) -> None:
    """Run a script and end as Python does, but for taking apart all that was imported, which takes seconds."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # waits for threads, as `multiprocessing` does
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a full disk, or a reader that has ended: the code is Python's
        code = 120
    os._exit(code & 0xFF)


if __name__ == "__main__":
    sys.argv = serve(sys.argv[1])
    as_at_a_start(sys.argv[0])
    run_and_leave(sys.argv[0])
