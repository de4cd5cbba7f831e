"""The data files that the stages hand on, and how a stage writes one without ever losing or faking work.

A file is the RLHFlow form plus the settings that made it and what it was made from (provenance.py)::

    {"type": "text_only",
     "settings": {"generate": {...}, "annotate": {...}}, "provenance": {"generate": {...}, "annotate": {...}},
     "instances": [{"prompt": str, "responses": [K], "rewards": [K], "pairs": [K], "stop_reasons": [K], ...}]}

A stage is done when its final file exists. Until then finished rows go to a journal beside it (one JSON object a
line), from which a second run of the same command continues.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from common.cli import UserError, first_line

PER_RESPONSE = ("responses", "rewards", "pairs", "stop_reasons", "num_tokens")


def read_json(path: str | Path) -> object:
    """The JSON value in `path`. Raises `UserError` that names the file and, for bad JSON, the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: {line}{not_json(error)}") from None


def not_json(error: Exception) -> str:
    """What is wrong with a text that `json.loads` refused with `error`."""
    # Besides bad syntax: numbers of thousands of digits (ValueError), thousands of nested brackets (RecursionError).
    return f"not JSON ({getattr(error, 'msg', None) or first_line(error)})"


def read_records(path: str | Path, need: tuple[str, ...] = ("responses",)) -> tuple[list[dict], dict]:
    """Instances and settings of a data file.

    Args:
        path: the file.
        need: which per-response lists every instance must carry.

    Returns:
        (instances, settings); settings is {} for a file that another program wrote.

    Raises:
        UserError: naming the file, row and field that is wrong.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("instances"), list):
        raise UserError(f"{path}: not a data file: no list 'instances'")
    if not content["instances"]:
        raise UserError(f"{path}: 'instances' is empty")
    for row, instance in enumerate(content["instances"]):
        _check_instance(f"{path}: row {row}", instance, need)
        count, expected = (len(i.get("responses") or []) for i in (instance, content["instances"][0]))
        if count != expected:
            raise UserError(f"{path}: row {row}: {count} 'responses', but row 0 has {expected}")
    settings = content.get("settings", {})
    if not isinstance(settings, dict) or not all(isinstance(stage, dict) for stage in settings.values()):
        raise UserError(f"{path}: 'settings' is not an object that holds one object a stage")
    return content["instances"], settings


def read_provenance(path: str | Path) -> dict:
    """What the stages that made a data file recorded about their inputs; {} for a file of another program."""
    stored = read_json(path)
    stored = stored.get("provenance") if isinstance(stored, dict) else None
    return stored if isinstance(stored, dict) else {}


def _check_instance(where: str, instance: object, need: tuple[str, ...]) -> None:
    if not isinstance(instance, dict):
        raise UserError(f"{where}: not an object")
    if not isinstance(instance.get("prompt"), str):
        raise UserError(f"{where}: 'prompt' is not text")
    for field in need:
        if field not in instance:
            raise UserError(f"{where}: no '{field}'")
    responses = instance.get("responses", [])
    for field in PER_RESPONSE:
        values = instance.get(field)
        if values is None and field not in need:
            continue
        if not isinstance(values, list) or len(values) != len(responses) or not values:
            raise UserError(f"{where}: '{field}' is not a list with one entry a response")
        kind = {"responses": str, "stop_reasons": str, "rewards": (int, float)}.get(field, int)
        if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
            raise UserError(f"{where}: '{field}' holds a value of the wrong type")
        if kind is not str and not all(abs(v) <= sys.float_info.max for v in values):
            raise UserError(f"{where}: '{field}' holds a value that is not finite")
    check_writable(where, instance)


def check_writable(where: str, row: dict) -> None:
    """Raises `UserError` for what JSON lets in and no tokenizer or other JSON reader takes."""
    for field, value in row.items():
        try:
            json.dumps({field: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: {field!r} holds half a surrogate pair, which is not a character"
            ) from None
        except ValueError:
            raise UserError(f"{where}: {field!r} holds a number that is not finite") from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes a refusal of the system (disk full, read-only, no permission) a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from None


def write_atomic(path: str | Path, text: str | Iterable[str]) -> None:
    """Writes beside `path`, flushes to disk, renames: readers see the old file or the whole new one.

    Args:
        path: the file.
        text: all of it, or its parts one after the other, of which only one is in memory at a time.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            # A path that is not UTF-8 has surrogates in Python; in JSON the backslash form means the same.
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines([text] if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_records(
    path: str | Path, instances: Iterable[dict], settings: dict, provenance: dict | None = None
) -> None:
    """Writes a data file atomically: one instance a line, so that `diff` and `head` are of use.

    Args:
        path: the file.
        instances: its rows; each is written before the next one is asked for.
        settings: stage → what is compared when the stage is started again.
        provenance: stage → what it was made from, see provenance.py.
    """
    head = {"type": "text_only", "settings": settings, "provenance": provenance or {}}
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]

    def parts() -> Iterator[str]:
        yield "{" + ",\n".join(lines) + ',\n"instances": [\n'
        for number, instance in enumerate(instances):
            yield ",\n" * (number > 0) + json.dumps(instance, ensure_ascii=False, allow_nan=False)
        yield "\n]}\n"

    write_atomic(path, parts())


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises `UserError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


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
        raise UserError(
            f"{path}: exists, but this stage did not write it; move it away or name another output"
        )
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
        line = (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode(
            errors="backslashreplace"
        )
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
