"""The generation back ends by name, in this process or as several engines."""

import argparse
import collections
import functools
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from common import scale_out
from generation.interface import EngineDied, Request, Response, Sampling


def make_generator(args: argparse.Namespace, policy: str | None, reference: str | None):
    """The generator of the command line: one in this process, or with `--num_engines` several that look like one."""
    if args.num_engines == 1:
        return load_generator(args, policy, reference)
    return ManyEngines(args, policy, reference)


def load_generator(args: argparse.Namespace, policy: str | None, reference: str | None):
    """The back end of the command line with its models loaded.

    Args:
        args: flags of the script.
        policy, reference: model folders or names; None for one that no request needs.
    """
    shared = {
        "dtype": args.dtype,
        "max_num_seqs": args.max_num_seqs,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.backend == "hf":
        from generation.backend_hf import HFGenerator

        return HFGenerator(policy, reference, **shared)
    from generation.backend_vllm import VLLMGenerator

    return VLLMGenerator(
        policy,
        reference,
        max_length=args.max_input_length + args.max_new_tokens,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        compile=args.compile,
        **shared,
    )


class ManyEngines:
    """Several engines that together look like one."""

    def __init__(self, args: argparse.Namespace, policy: str | None, reference: str | None) -> None:
        self.making = args, policy, reference
        if args.backend == "vllm":
            # Eight calls at a time fill the continuous batch and its queue: as one call ends, the next one begins.
            gpus, self.calls, self.largest = args.tensor_parallel_size, 8, max(1, args.max_num_seqs // 2)
        else:
            gpus, self.calls, self.largest = 1, 1, args.max_num_seqs
        self.engines = scale_out.start(args.num_engines, gpus)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Response]:
        """Yields responses as calls finish, in no particular order."""
        requests = list(requests)
        size = max(1, min(self.largest, -(-len(requests) // self.engines.count)))
        work = [requests[i : i + size] for i in range(0, len(requests), size)]
        engine = functools.partial(Engine, *self.making, sampling)
        for _, responses in scale_out.answers(engine, work, self.engines, self.calls):
            yield from responses

    def close(self) -> None:
        """Nothing: the actors are gone with the work."""


class Engine:
    """A back end in an actor of its own. What several threads ask for at a time runs in one batch."""

    def __init__(
        self, args: argparse.Namespace, policy: str | None, reference: str | None, sampling: Sampling
    ) -> None:
        self.generator = load_generator(args, policy, reference)
        self.sampling = sampling
        self.calls: queue.SimpleQueue[list[Request]] = queue.SimpleQueue()
        self.promised: dict[str, Future] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, requests: list[Request]) -> list[Response]:
        promises = {request.key: Future() for request in requests}
        self.promised |= promises
        self.calls.put(requests)
        try:
            return [promise.result() for promise in promises.values()]
        except EngineDied:
            scale_out.end_actor()
            raise

    def _serve(self) -> None:
        while True:
            try:
                for response in self.generator.generate(_Arrivals(self.calls), self.sampling):
                    self.promised.pop(response.key).set_result(response)
            except Exception as error:  # the threads that wait raise it
                for key in list(self.promised):
                    self.promised.pop(key).set_exception(error)


class _Arrivals:
    """The requests of all calls: waits for a first call; has none when no call waits, and more when one has come."""

    def __init__(self, calls: queue.SimpleQueue) -> None:
        self.calls, self.here = calls, collections.deque(calls.get())

    def __iter__(self) -> "_Arrivals":
        return self

    def __next__(self) -> Request:
        try:
            while not self.here:
                self.here.extend(self.calls.get_nowait())
        except queue.Empty:
            raise StopIteration from None
        return self.here.popleft()
