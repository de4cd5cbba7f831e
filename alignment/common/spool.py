"""Many byte strings that need not be in memory: prompts that wait, token ids of texts."""

import array
import os
import tempfile
from pathlib import Path

from common.records import writing


class Spool:
    """Byte strings, in a file without a name that is gone with the process; memory holds 8 bytes per string.

    Args:
        output: the stage's output; the file lies in its folder, where there is room for such data.
    """

    def __init__(self, output: str | Path) -> None:
        self._folder = next(folder for folder in Path(output).resolve().parents if folder.is_dir())
        with writing(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (gone with the process)
        self._ends = array.array("q", [0])

    def append(self, data: bytes) -> None:
        """Add a string."""
        with writing(self._folder):
            self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def sizes(self) -> list[int]:
        """Return the number of bytes of each string."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def read(self, i: int) -> bytes:
        """Return string number `i`, 0 or more. Raises `IndexError` behind the last one."""
        if i >= len(self):
            raise IndexError(i)
        with writing(self._folder):
            self._file.flush()
        return os.pread(self._file.fileno(), self._ends[i + 1] - self._ends[i], self._ends[i])
