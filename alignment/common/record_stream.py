"""Data files read one instance after the other, so that memory does not grow with them; checked as in records.py."""

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
        head, error = {}, None
        for key, value in _members(path):
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
            raise UserError(f"{path}: not a data file: no list 'instances'")
        if not self.count:
            raise UserError(f"{path}: 'instances' is empty")
        self.settings, provenance = head.get("settings", {}), head.get("provenance")
        if not isinstance(self.settings, dict) or not all(isinstance(v, dict) for v in self.settings.values()):
            raise UserError(f"{path}: 'settings' is not an object that holds one object per stage")
        self.provenance = provenance if isinstance(provenance, dict) else {}

    def _check(self, row: int, instance: object, need: tuple[str, ...]) -> None:
        check_instance(f"{self.path}: row {row}", instance, need)
        responses = len(instance.get("responses") or [])
        self.responses_each = self.responses_each if row else responses
        if responses != self.responses_each:
            raise UserError(f"{self.path}: row {row}: {responses} 'responses', but row 0 has {self.responses_each}")
        self.count += 1

    def __iter__(self) -> Iterator[dict]:
        return (value for key, value in _members(self.path) if isinstance(key, int))


def read_head(path: str | Path) -> dict:
    """All that a data file holds but its instances."""
    return {key: value for key, value in _members(path) if isinstance(key, str)}


def _members(path: str | Path) -> Iterator[tuple[int | str, object]]:
    """Yields (row, instance) of the list `instances`, then ("instances", None), and (key, value) of all else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _parse(_Text(file))
    except (OSError, ValueError, RecursionError):
        content = read_json(path)  # finds the same, and says in which line
        named = "instances" in content if isinstance(content, dict) else False
        raise UserError(f"{path}: not a data file: {'' if named else 'no list '}'instances'") from None


def _parse(text: "_Text") -> Iterator[tuple[int | str, object]]:
    for _ in _items(text, "{", "}"):
        key = text.value()
        text.take(":")
        if key == "instances":
            for row, _ in enumerate(_items(text, "[", "]")):
                yield row, text.value()
            yield key, None
        elif isinstance(key, str):
            yield key, text.value()
        else:
            raise ValueError
    if text.peek():
        raise ValueError


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
