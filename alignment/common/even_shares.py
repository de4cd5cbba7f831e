"""Equal numbers of rows for all training processes, without a row that counts twice."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class FilledUp(Sampler):
    """The indices of a sampler, then negative ones until their number is a multiple."""

    def __init__(self, sampler: Sampler, multiple: int) -> None:
        self.sampler, self.missing = sampler, -len(sampler) % multiple

    def __len__(self) -> int:
        return len(self.sampler) + self.missing

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from (-1 - i % len(self.sampler) for i in range(self.missing))

    def set_epoch(self, epoch: int) -> None:
        """Give each epoch an order of its own, as far as the sampler has one."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
