"""The data files that the stages hand on: what a row must be, and files written whole or not at all.

A file is the RLHFlow form plus the settings that made it and what it was made from (provenance.py)::

    {"type": "text_only",
     "settings": {"generate": {...}, "annotate": {...}}, "provenance": {"generate": {...}, "annotate": {...}},
     "instances": [{"prompt": str, "responses": [K], "rewards": [K], "pairs": [K], "stop_reasons": [K], ...}]}

`response_ids` [K] holds, per response, the list of ids that were sampled: with the stop token, if one ended it, as
the last. They are what is trained and scored; `responses` is their text, for people and for other models.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.cli import UserError, first_line

PER_RESPONSE = ("responses", "rewards", "pairs", "stop_reasons", "num_tokens")


def read_json(path: str | Path) -> object:
    """Return the JSON value in `path`. Raises `UserError` that names the file and, for bad JSON, the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
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
    """Return what is wrong with a text that `json.loads` refused with `error`."""
    # Besides bad syntax: numbers of thousands of digits (ValueError), thousands of nested brackets (RecursionError).
    return f"not JSON ({getattr(error, 'msg', None) or first_line(error)})"


def check_instance(where: str, instance: object, need: tuple[str, ...]) -> None:
    """Raise `UserError` unless `instance` is a row of a data file that carries the per-response lists `need`."""
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
            raise UserError(f"{where}: '{field}' is not a list with one entry per response")
        kind = {"responses": str, "stop_reasons": str, "rewards": (int, float)}.get(field, int)
        if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
            raise UserError(f"{where}: '{field}' holds a value of the wrong type")
        if kind is not str and not all(abs(v) <= sys.float_info.max for v in values):
            raise UserError(f"{where}: '{field}' holds a value that is not finite")
        if field == "stop_reasons" and not {*values} <= {"stop", "length"}:
            raise UserError(f"{where}: '{field}' holds something else than 'stop' and 'length'")
    check_response_ids(where, instance)
    check_writable(where, instance)


def check_response_ids(where: str, instance: dict, vocabulary: int = sys.maxsize) -> None:
    """Raise `UserError` unless `response_ids`, where a row has them, are lists of ids below `vocabulary`."""
    lists = instance.get("response_ids")
    if lists is None:
        return
    if not isinstance(lists, list) or len(lists) != len(instance.get("responses", [])):
        raise UserError(f"{where}: 'response_ids' is not a list with one entry per response")
    for ids in lists:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            limit = "" if vocabulary == sys.maxsize else f" from 0 to {vocabulary - 1}"
            raise UserError(f"{where}: 'response_ids' holds something else than a list of whole numbers{limit}")


def check_writable(where: str, row: dict) -> None:
    """Raise `UserError` for what JSON lets in and no tokenizer or other JSON reader takes."""
    for field, value in row.items():
        try:
            json.dumps({field: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {field!r} holds half a surrogate pair, which is not a character") from None
        except ValueError:
            raise UserError(f"{where}: {field!r} holds a number that is not finite") from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make a refusal of the system (disk full, read-only, no permission) a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from None


def write_atomic(path: str | Path, text: str | Iterable[str]) -> None:
    """Write beside `path`, flushes to disk, renames: readers see the old file or the whole new one.

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
            rename_flushed(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def rename_flushed(temporary: str | Path, path: str | Path) -> None:
    """Give a finished file or folder its name; what it holds and the name are on the disk then.

    Args:
        temporary: a file that is flushed, or a folder, whose files are flushed here.
        path: on the same file system; a file that is there is replaced, so is an empty folder.
    """
    for folder, _, files in os.walk(temporary):
        for name in files:
            _flush(os.path.join(folder, name))
        _flush(folder)
    os.replace(temporary, path)
    _flush(Path(path).absolute().parent)


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_records(
    path: str | Path, instances: Iterable[dict], settings: dict, provenance: dict | None = None
) -> None:
    """Write a data file atomically: one instance per line, so that `diff` and `head` are of use.

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
    """Return the SHA-256 of a file, in hexadecimal. Raises `UserError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
