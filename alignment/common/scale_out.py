"""More than one engine, on one machine or many: an engine class runs as a pool of actors of Ray Data.

The script's own process divides the work into items, hands them out, and gets each answer back as soon as its item
is finished. So it alone writes files, with one engine or a hundred. Ray starts an actor that died (with its
process, GPU or node) again, where there is room, and repeats the items that it had not answered; each item is
answered once. Nothing here imports Ray before a script asks for more than one engine.
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import ENVIRONMENT, UserError, checked, first_line

ALL = 0
PATHS = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # from which the scripts import

# Ray puts actors behind all else on their machine, and gives up on a process that needs a minute to start.
OF_A_LOCAL_RAY = {"RAY_worker_niceness": "0", "RAY_worker_register_timeout_seconds": "600"}


def _count(text: str) -> int:
    return ALL if text == "all" else int(text) or -1


engine_count = checked(_count, lambda v: v >= 0, "a whole number above 0, or 'all'")


class Engines(NamedTuple):
    """Room for engines in a Ray cluster.

    Attributes:
        count: how many.
        gpus, cpus: what each one takes.
    """

    count: int
    gpus: int
    cpus: int


def add_flag(parser) -> None:
    """The one flag by which a script scales out."""
    parser.add(
        "--num_engines",
        "engines that share the work, each with a GPU (or --tensor_parallel_size of them) where there are GPUs; "
        "above 1 they are actors of Ray: in the cluster at RAY_ADDRESS (host:port) if that is set, else on this "
        "machine; 'all': as many as there is room for. The result does not depend on it",
        type=engine_count,
        default=1,
    )


def start(wanted: int, gpus_each: int = 1) -> Engines:
    """Joins the Ray cluster at RAY_ADDRESS, or starts a local one that ends with this process.

    Args:
        wanted: how many engines; ALL for as many as there is room for.
        gpus_each: what an engine takes where the cluster has GPUs; where it has none it takes CPU cores.

    Raises:
        UserError: no cluster answers, or it has too little room.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    cores = os.cpu_count() or 1
    if not ray.is_initialized():  # by an earlier command line, see cli.each
        _init(ray, address, max(cores, wanted))
    _configure(ray)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = gpus_each if any(node.get("GPU") for node in nodes) else 0
    cpus = 1 if gpus or address or wanted == ALL else max(1, cores // wanted)
    room = sum(_room(node, gpus, cpus) for node in nodes)
    where = address or "this machine"
    each = f"{gpus} GPU(s) of one machine" if gpus else "a CPU core"
    if room < max(wanted, 1):
        raise UserError(f"--num_engines {wanted or 'all'}, each with {each}: {where} has room for {room}")
    free = _free(ray, wanted or room, gpus, cpus)
    if free < max(wanted, 1):
        raise UserError(
            f"--num_engines {wanted or 'all'}, each with {each}: {where} has {free} free, others are in use"
        )
    return Engines(min(free, wanted or room), gpus, cpus)


def _room(node: dict[str, float], gpus: int, cpus: int) -> int:
    """How many engines fit into a node's (or all) resources."""
    fits = int(node.get("CPU", 0) // cpus)
    return min(fits, int(node.get("GPU", 0) // gpus)) if gpus else fits


def _free(ray, wanted: int, gpus: int, cpus: int) -> int:
    """For how many engines resources are free; waits a minute for `wanted`: an earlier job may just be ending."""
    end = time.monotonic() + 60
    while (free := _room(ray.available_resources(), gpus, cpus)) < wanted and time.monotonic() < end:
        time.sleep(1)
    return free


def _init(ray, address: str | None, local_cpus: int) -> None:
    # Without an address Ray would join whatever cluster runs on this machine.
    local = {"address": "local", "num_cpus": local_cpus, "include_dashboard": False}
    options = {"address": address} if address else local
    if address:
        _check_reachable(address)
    for name, value in OF_A_LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    options |= {"logging_level": "CRITICAL", "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _silence():
            ray.init(**options, runtime_env={"env_vars": _environment(), "py_executable": sys.executable})
    except Exception as error:  # many kinds: other versions in the cluster, no node of it on this machine
        raise UserError(f"Ray at {address or 'this machine'}: cannot be used ({first_line(error)})") from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Ray's C++ part says on standard error that it will say nothing but what is fatal; this drops that line too."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_reachable(address: str) -> None:
    # `ray.init` would try for minutes and then end the process.
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise UserError(f"RAY_ADDRESS {address!r}: not of the form host:port")
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({error})") from None


def _environment() -> dict[str, str]:
    """What the actors need of this process's environment, which their nodes may not have; nothing secret."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name in {*ENVIRONMENT, "OMP_NUM_THREADS"} or name.startswith(("HF_", "VLLM_"))
        if not name.endswith(("_KEY", "_TOKEN"))
    }
    paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**found, "PYTHONPATH": os.pathsep.join(paths)}


def _configure(ray) -> None:
    """Ray Data shows no bar of its own, logs to its files only, and gives work to the engine with the least."""
    import logging
    import warnings

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    with warnings.catch_warnings(action="ignore", category=ray.util.annotations.RayDeprecationWarning):
        # All work lies where the script runs: engines on that machine would be given it first.
        context.execution_options.actor_locality_enabled = False
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.CRITICAL)


class _Actor:
    """One engine in a process of its own. A wrong input comes back as text: Ray would wrap it in a stack trace.

    An answer also says whether this is a process that Ray started again, and which.
    """

    def __init__(self, make_engine: Callable[[], Callable]) -> None:
        import ray

        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.restart = uuid.uuid4().hex if restarted else None
        self.error = None
        try:
            self.engine = make_engine()
        except UserError as error:
            self.error = str(error)
        except Exception as error:  # whatever a library raises for a model that it cannot load
            traceback.print_exc()  # to Ray's log of this process
            self.error = f"an engine cannot start: {first_line(error)}"

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        number, item = pickle.loads(row["item"])
        answer = None
        try:
            answer = None if self.error else self.engine(item)
        except UserError as error:
            self.error = str(error)
        return {"answer": pickle.dumps((number, answer, self.error, self.restart))}


def end_actor() -> None:
    """Called in an actor whose engine is broken: ends the process, so that Ray starts it again and repeats its work.

    Returns only in an actor that was started again already: what breaks engine after engine is no accident.
    """
    import ray

    if not ray.get_runtime_context().was_current_actor_reconstructed:
        os._exit(1)


def answers(
    make_engine: Callable[[], Callable], work: list, engines: Engines, calls: int = 1
) -> Iterator[tuple[int, Any]]:
    """Yields (index in `work`, engine(work[index])) as the engines finish, in any order.

    Args:
        make_engine: makes an engine, a callable; runs in each actor, so it must be picklable.
        work: items; each is answered by one call, and repeated as a whole if its engine dies.
        engines: from `start`.
        calls: how many calls an engine takes at a time, each in a thread of its own.

    Raises:
        UserError: from an engine or its making; or the engines are lost and cannot be started again.
    """
    if not work:
        return
    import ray

    restarts = {None}
    try:
        for reply in _replies(make_engine, work, engines, calls):
            number, answer, error, restart = pickle.loads(reply)
            if error:
                raise UserError(error)
            if restart not in restarts:
                print(f"\nan engine was lost and started again ({len(restarts)} so far)", flush=True)
                restarts.add(restart)
            yield number, answer
    except ray.exceptions.RayTaskError:
        raise  # an error in the engine's own code, with its stack trace
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise UserError(f"the engines are lost ({first_line(error)}); the same command continues from here") from None


def _replies(make_engine: Callable, work: list, engines: Engines, calls: int) -> Iterator[bytes]:
    import ray.data

    rows = [{"item": pickle.dumps(pair)} for pair in enumerate(work)]
    count = min(engines.count, len(work))
    # One item more waits at the engine, but where there is little work, the first that is ready must not take it all.
    in_flight = min(max(2, calls), -(-len(work) // count))
    pool = ray.data.ActorPoolStrategy(
        size=count,
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=in_flight,
        enable_true_multi_threading=calls > 1,
    )
    # One row a block, and so one item a task. By Ray Data's defaults actors are restarted, and their tasks retried,
    # without limit, until nothing was finished for 30 minutes (RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S).
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,
        fn_constructor_args=(make_engine,),
        compute=pool,
        num_cpus=None if engines.gpus else engines.cpus,  # with GPUs one CPU is meant
        num_gpus=engines.gpus or None,
    )
    for table in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        yield from table.column("answer").to_pylist()
