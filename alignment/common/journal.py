"""How a stage never loses or fakes work: it is done when its final file exists, made with the same settings.

Until then finished rows go to a journal beside that file, from which a second run of the same command continues. A
journal is one JSON object per line::

    {"crc32": "…", "settings": {...}}
    {"crc32": "…", "made_with": "…", "key": "0.1", "row": {...}}

`crc32` is that of the line's bytes after it, `made_with` that of the settings. So each row stands for itself:
whatever else of the file a power cut or a bad sector has damaged, the rows that are whole are used again.
"""

import contextlib
import fcntl
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.cli import UserError
from common.record_stream import read_head
from common.records import writing


def is_done(path: str | Path, stage: str, settings: dict) -> bool:
    """Whether `path` already holds this stage's result; if so, a journal that a kill left behind is removed.

    Raises:
        UserError: a file is there, but made with other settings; the text names the first difference.
    """
    path = Path(path)
    if not path.exists():
        return False
    stored = read_head(path)
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
    """key → finished row. Memory holds where each row's line begins in the journal; the row is read when asked for.

    Keys "row.response" or "row/response", of which there are as many as texts, take 8 bytes each.
    """

    _PAIR = re.compile(r"(0|[1-9][0-9]{0,8})([./](?:0|[1-9][0-9]{0,8}))")

    def __init__(self, file: int) -> None:
        self._file, self._count = file, 0
        self._columns: dict[str, array] = {}  # ".response" → offset by row, -1 where there is none
        self._others: dict[str, int] = {}

    def point(self, key: str, offset: int) -> None:
        """Says at which byte the line of `key` begins."""
        self._count += key not in self
        if not (pair := self._PAIR.fullmatch(key)):
            self._others[key] = offset
            return
        row, column = int(pair[1]), self._columns.setdefault(pair[2], array("q"))
        while len(column) <= row:
            column.append(-1)
        column[row] = offset

    def _offset(self, key: object) -> int:
        if not isinstance(key, str) or not (pair := self._PAIR.fullmatch(key)):
            return self._others.get(key, -1)
        row, column = int(pair[1]), self._columns.get(pair[2], ())
        return column[row] if row < len(column) else -1

    def __getitem__(self, key: str) -> dict:
        line, offset = b"", self._offset(key)
        if offset < 0:
            raise KeyError(key)
        while not line.endswith(b"\n"):
            block = os.pread(self._file, 4096, offset + len(line))
            if not block:
                raise EOFError(f"the journal ends within the row {key}")
            line += block[: block.find(b"\n") + 1 or None]
        return json.loads(line)["row"]

    def __contains__(self, key: object) -> bool:  # without a look at the file, unlike Mapping's own
        return self._offset(key) >= 0

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        for response, column in self._columns.items():
            yield from (f"{row}{response}" for row, offset in enumerate(column) if offset >= 0)

    def __len__(self) -> int:
        return self._count


MARK = b'{"crc32": "'  # begins each line, and stands in no text of a row: there quotation marks are escaped
REST = len(MARK) + len('01234567", ')


def _crc(data: bytes) -> bytes:
    return b"%08x" % zlib.crc32(data)


def _to_line(entry: dict) -> bytes:
    """An entry as a line with its checksum."""
    rest = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")[1:]
    return MARK + _crc(rest) + b'", ' + rest + b"\n"


def _find_entry(line: bytes) -> tuple[int, dict | None]:
    """(where it begins, the entry) of the entry that ends with a line; (0, None) if there is no whole one.

    It begins the line, unless the end of the line before it was damaged.
    """
    begin = line.rfind(MARK) if line.endswith(b"\n") else -1
    while begin >= 0:
        rest = line[begin + REST : -1]
        if line[begin : begin + REST] == MARK + _crc(rest) + b'", ':
            # Not always JSON: a row's own fields can look like a line's end.
            with contextlib.suppress(ValueError, RecursionError):
                return begin, json.loads(b"{" + rest)
        begin = line.rfind(MARK, 0, begin)
    return 0, None


def _is_torn(line: bytes) -> bool:
    """Whether it is a last line that a kill left unfinished, and not damage."""
    return not line.endswith(b"\n") and b"\0" not in line and (line.startswith(MARK) or MARK.startswith(line))


class Journal:
    """Finished rows of an unfinished stage, one JSON object per line beside the final file.

    A torn last line (the process was killed while writing) is dropped; damaged lines are counted and passed over. A
    lock on the journal makes a second process that works on the same output stop at once.

    Args:
        path: the final file; the journal is `path` + ".journal".
        settings: must equal those of an earlier, unfinished run.

    Attributes:
        rows: key → row, of earlier runs and of this one.

    Raises:
        UserError: another process holds the journal, its settings differ, nothing in it can be read, or the folder
            cannot be written.
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
        self._made_with = _crc(json.dumps(settings, sort_keys=True).encode()).decode()
        stored, damaged, foreign, end = None, 0, False, 0
        for offset, line in self._lines():
            begin, entry = _find_entry(line)
            damaged += begin > 0 or (entry is None and not _is_torn(line))
            # Zeros are what a power cut leaves of bytes that were not written yet.
            foreign |= entry is None and not _is_torn(line) and line.strip(b"\0\n") != b""
            if entry is None:
                continue
            if "settings" in entry:
                stored = entry["settings"]
            elif entry.get("made_with") == self._made_with:
                self.rows.point(entry["key"], offset + begin)
                end = offset + len(line)
            else:
                self._refuse_rows_of(stored, settings)
        if foreign and stored is None and not self.rows:
            raise UserError(f"{self.path}: holds no row that can be read; remove it to start this stage again")
        self._end = end
        self._file.truncate(end)
        if not self.rows:  # the settings may be corrected
            self._append({"settings": settings})
        if damaged:
            places = "1 place" if damaged == 1 else f"{damaged} places"
            print(f"{self.path}: damaged in {places}; {len(self.rows)} whole rows are used, the others made again")

    def _refuse_rows_of(self, stored: object, settings: dict) -> None:
        if stored is not None:
            refuse_other_settings(self.path, stored, settings)
        raise UserError(f"{self.path}: holds rows of other settings; move it away or name another output")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            offset = 0
            for line in file:
                yield offset, line
                offset += len(line)

    def _append(self, entry: dict) -> int:
        """Writes a line; the byte at which it begins."""
        line = _to_line(entry)
        offset = self._end
        with writing(self.path):
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        self._end += len(line)
        return offset

    def add(self, key: str, row: dict) -> None:
        """Records a finished row; it survives a kill of this process from here on."""
        self.rows.point(key, self._append({"made_with": self._made_with, "key": key, "row": row}))

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
