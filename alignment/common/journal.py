"""How a stage never loses or fakes work: it is done when its final file exists, made with the same settings.

Until then finished rows go to a journal beside that file (one JSON object a line), from which a second run of the
same command continues.
"""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.cli import UserError
from common.records import read_json, writing


def is_done(path: str | Path, stage: str, settings: dict) -> bool:
    """Whether `path` already holds this stage's result; if so, a journal that a kill left behind is removed.

    Raises:
        UserError: a file is there, but made with other settings; the text names the first difference.
    """
    path = Path(path)
    if not path.exists():
        return False
    stored = read_json(path)
    for key in ("settings", stage):
        stored = stored.get(key) if isinstance(stored, dict) else None
    refuse_other_settings(path, stored, settings)
    journal_path(path).unlink(missing_ok=True)
    return True


def refuse_other_settings(path: str | Path, stored: object, settings: dict) -> None:
    """Raises `UserError` if `stored` (what made `path`) is not `settings` (what is asked for now)."""
    if not isinstance(stored, dict):
        raise UserError(f"{path}: exists, but this stage did not write it; move it away or name another output")
    for key in {**stored, **settings}:
        if stored.get(key) != settings.get(key):
            raise UserError(
                f"{path}: exists, made with {key}={stored.get(key)!r}, now {key}={settings.get(key)!r}; "
                "move it away or name another output"
            )


def journal_path(path: str | Path) -> Path:
    """Where the unfinished rows of `path` are kept."""
    return Path(str(path) + ".journal")


class Rows(Mapping):
    """key → finished row. Memory holds where each row stands in the journal, and the row is read when asked for."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, key: str, start: int, length: int) -> None:
        """Says where the line of `key` is, in bytes."""
        self._places[key] = start, length

    def __getitem__(self, key: str) -> dict:
        start, length = self._places[key]
        return json.loads(os.pread(self._file, length, start))["row"]

    def __contains__(self, key: object) -> bool:  # without a look at the file, unlike Mapping's own
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Journal:
    """Finished rows of an unfinished stage, one JSON object a line beside the final file.

    The first line holds the settings; a torn last line (the process was killed while writing) is dropped. A lock
    on the journal makes a second process that works on the same output stop at once.

    Args:
        path: the final file; the journal is `path` + ".journal".
        settings: must equal those of an earlier, unfinished run.

    Attributes:
        rows: key → row, of earlier runs and of this one.

    Raises:
        UserError: another process holds the journal, its settings differ, or the folder cannot be written.
    """

    def __init__(self, path: str | Path, settings: dict) -> None:
        self.path = journal_path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer there is nothing left to write when a full disk ends the stage.
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise UserError(f"{error.filename or self.path}: cannot write ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing {Path(path).name}") from None
        except OSError as error:  # a file system without locks
            raise UserError(f"{self.path}: cannot be locked ({error.strerror})") from None
        self._load(settings)

    def _load(self, settings: dict) -> None:
        self.rows = Rows(self._file.fileno())
        stored, end = None, 0
        try:
            for line in self._whole_lines():
                entry = json.loads(line)
                if end:
                    key, _ = entry["key"], entry["row"]
                    self.rows.place(key, end, len(line))
                else:
                    stored = entry
                end += len(line)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.path}: damaged; remove it to start this stage again") from None
        if self.rows:
            refuse_other_settings(self.path, stored, settings)
        self._end = end if self.rows else 0
        self._file.truncate(self._end)
        if not self.rows:  # the settings may be corrected
            self._append(settings)

    def _whole_lines(self) -> Iterator[bytes]:
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            lines.seek(0)
            yield from itertools.takewhile(lambda line: line.endswith(b"\n"), lines)

    def _append(self, entry: dict) -> tuple[int, int]:
        """Writes a line; (where it starts, its length), in bytes."""
        line = (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")
        start = self._end
        with writing(self.path):
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        self._end += len(line)
        return start, len(line)

    def add(self, key: str, row: dict) -> None:
        """Records a finished row; it survives a kill of this process from here on."""
        self.rows.place(key, *self._append({"key": key, "row": row}))

    def close(self, done: bool) -> None:
        """Ends the stage, once; the journal is removed if the final file is in place (`done`) or there is no row."""
        if self._file.closed:
            return
        if done or not self.rows:
            self.path.unlink(missing_ok=True)
        self._file.close()


@contextlib.contextmanager
def journal(path: str | Path, settings: dict) -> Iterator[Journal]:
    """A `Journal` that is removed when the block ends without an exception, and kept otherwise."""
    opened = Journal(path, settings)
    try:
        yield opened
    except BaseException:
        opened.close(done=False)
        raise
    opened.close(done=True)
