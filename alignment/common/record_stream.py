"""The reader of data files: one instance after the other, so that memory does not grow with them."""

import json
from collections.abc import Iterator
from json.decoder import WHITESPACE
from pathlib import Path
from typing import TextIO

from common.cli import UserError
from common.records import check_instance, read_json

CHUNK = 2**20  # characters
DECODER = json.JSONDecoder()
AFTER_VALUE = tuple(",:]} \t\n\r")
_NOT_A_DATA_FILE = "not a data file: no list 'instances'"
NO_ROWS = "neither a list nor an object with a list 'instances'"


class RecordStream:
    """The instances of a data file; iterating over it reads them anew.

    Args:
        path: the file.
        need: which per-response lists every instance must carry.

    Attributes:
        settings, provenance: what earlier stages wrote; {} in a file of another program.
        count: number of instances.
        responses_each: number of responses of an instance, K; the same for all.

    Raises:
        UserError: naming the file, row and field that is wrong.
    """

    def __init__(self, path: str | Path, need: tuple[str, ...] = ("responses",)) -> None:
        self.path = path
        self.count, self.responses_each = 0, 0
        self._first = {}  # whether there are sampled ids → the first such row
        head, error = {}, None
        for key, value in members(path):
            if not isinstance(key, int):
                head[key] = value
                continue
            try:
                error or self._check(key, value, need)
            except UserError as found:  # first, what is not JSON further on
                error = found
        if error:
            raise error
        if "instances" not in head:
            raise UserError(f"{path}: {_NOT_A_DATA_FILE}")
        if not self.count:
            raise UserError(f"{path}: 'instances' is empty")
        self.settings, self.provenance = head.get("settings", {}), _provenance(head)
        if not isinstance(self.settings, dict) or not all(isinstance(v, dict) for v in self.settings.values()):
            raise UserError(f"{path}: 'settings' is not an object that holds one object per stage")

    def _check(self, row: int, instance: object, need: tuple[str, ...]) -> None:
        check_instance(f"{self.path}: row {row}", instance, need)
        responses = len(instance.get("responses") or [])
        self.responses_each = self.responses_each if row else responses
        if responses != self.responses_each:
            raise UserError(f"{self.path}: row {row}: {responses} 'responses', but row 0 has {self.responses_each}")
        self._first.setdefault(bool(instance.get("response_ids")), row)
        self.count += 1

    def have_ids(self) -> bool:
        """Return whether the instances hold the ids that were sampled. Raises `UserError` where only some do."""
        if len(self._first) > 1:
            raise UserError(f"{self.path}: row {self._first[False]}: no 'response_ids', which other rows have")
        return True in self._first

    def why_not_ids_of(self, fingerprint: str | None) -> str:
        """Return why a tokenizer (see `tokenizer_fingerprint`) cannot use the sampled ids; empty where it can."""
        if not self.have_ids():
            return "it has no response_ids"
        made_with = (self.settings.get("generate") or {}).get("tokenizer")
        return "" if made_with == fingerprint else "its response_ids are of another tokenizer than the policy's"

    def __iter__(self) -> Iterator[dict]:
        return (value for key, value in members(self.path) if isinstance(key, int))


def read_records(path: str | Path, need: tuple[str, ...] = ("responses",)) -> tuple[list[dict], dict]:
    """Return all instances and the settings of a small data file; see `RecordStream`."""
    data = RecordStream(path, need)
    return list(data), data.settings


def read_head(path: str | Path) -> dict:
    """Return all that a data file holds but its instances."""
    return {key: value for key, value in members(path) if isinstance(key, str)}


def read_provenance(path: str | Path) -> dict:
    """Return what the stages that made a data file recorded about their inputs; {} for a file of another program."""
    return _provenance(read_head(path))


def _provenance(head: dict) -> dict:
    stored = head.get("provenance")
    return stored if isinstance(stored, dict) else {}


def members(path: str | Path, list_alone: bool = False) -> Iterator[tuple[int | str, object]]:
    """Yield (row, instance) of the list `instances`, then ("instances", None), and (key, value) of all else.

    Args:
        path: a file that holds a JSON object.
        list_alone: it may also hold nothing but the list.

    Raises:
        UserError: naming the file and, for bad JSON, the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _parse(_Text(file), list_alone)
    except (OSError, ValueError, RecursionError):
        read_json(path)  # finds the same, and says in which line
        raise UserError(f"{path}: {NO_ROWS if list_alone else _NOT_A_DATA_FILE}") from None


def _parse(text: "_Text", list_alone: bool) -> Iterator[tuple[int | str, object]]:
    if list_alone and text.peek() == "[":
        yield from _rows(text)
    else:
        for _ in _items(text, "{", "}"):
            key = text.value()
            text.take(":")
            if key == "instances":
                yield from _rows(text)
            elif isinstance(key, str):
                yield key, text.value()
            else:
                raise ValueError
    if text.peek():
        raise ValueError


def _rows(text: "_Text") -> Iterator[tuple[int | str, object]]:
    for row, _ in enumerate(_items(text, "[", "]")):
        yield row, text.value()
    yield "instances", None


def _items(text: "_Text", begin: str, end: str) -> Iterator[None]:
    """Stops before each item of a JSON object or list in turn, until the caller has read the last one."""
    text.take(begin)
    if text.peek() == end:
        text.take(end)
        return
    while True:
        yield
        if text.take("," + end) == end:
            return


class _Text:
    """A file's text, of which memory holds what is not parsed yet."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0

    def _more(self) -> bool:
        """Reads on, and drops what is parsed; False at the end of the file."""
        # Twice as much each time: a long value is parsed again after each reading.
        new = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + new, 0
        return bool(new)

    def peek(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while True:
            self._at = WHITESPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """The same, which must be one of `wanted`; goes past it."""
        found = self.peek()
        if not found or found not in wanted:
            raise ValueError
        self._at += 1
        return found

    def value(self) -> object:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            if self._text[end : end + 1] not in AFTER_VALUE:  # the text may end within a number
                end -= self._at
                if self._more():
                    continue
            self._at = end
            return value
