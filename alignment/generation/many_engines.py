"""Several engines, each an actor of Ray, that together look like one back end."""

import argparse
import collections
import functools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

from common import scale_out
from generation.sampling import EngineDied, Request, Response, Sampling, load_generator


class ManyEngines:
    """Several engines that together look like one; arguments as for `load_generator`."""

    def __init__(self, args: argparse.Namespace, models: Sequence[str | None], longest: int) -> None:
        self.making = args, models, longest
        if args.backend == "vllm":
            # Eight calls at a time fill the continuous batch and its queue: as one call ends, the next one begins.
            gpus, self.calls, self.largest = args.tensor_parallel_size, 8, max(1, args.max_num_seqs // 2)
        else:
            gpus, self.calls, self.largest = 1, 1, args.max_num_seqs
        self.engines = scale_out.start(args.num_engines, gpus)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Response]:
        """Yield responses as calls finish, in no particular order."""
        requests = list(requests)
        size = max(1, min(self.largest, -(-len(requests) // self.engines.count)))
        work = [requests[i : i + size] for i in range(0, len(requests), size)]
        engine = functools.partial(Engine, *self.making, sampling)
        for _, responses in scale_out.answers(engine, work, self.engines, self.calls):
            yield from responses

    def close(self) -> None:
        """Do nothing: the actors are gone with the work."""


class Engine:
    """A back end in an actor of its own. What several threads ask for at a time runs in one batch."""

    def __init__(
        self, args: argparse.Namespace, models: Sequence[str | None], longest: int, sampling: Sampling
    ) -> None:
        self.generator = load_generator(args, models, longest)
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
