"""Reading prompts and putting them into a template.

A source is a JSON or JSONL file, a folder saved by `datasets`, or a data set's name on a hub. A row holds text
(`prompt`) or chat messages (`messages`, `context_messages`, or a `prompt` that is a list of messages).
A prompt that a source holds several times is sampled as often, each time with seeds of its own.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.cli import UserError, first_line
from common.models import encode_prompt, render_chat
from common.records import check_writable, not_json, read_json

# What stands around the user's text. `none` takes prompts as they are; `chat` is the tokenizer's own template.
TEMPLATES = {
    "none": "{prompt}",
    "safe_rlhf": "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    ),
    "chat": None,
}
PROMPT_KEYS = ("prompt", "messages", "context_messages")


class Prompt(NamedTuple):
    """A prompt that is ready to be sampled from.

    Attributes:
        text: the templated prompt, exactly what was tokenized.
        token_ids: its ids, with the tokenizer's default special tokens.
        raw: the user's text without the template; the messages of a chat of several turns.
    """

    text: str
    token_ids: list[int]
    raw: str | list[dict]


def read_rows(source: str, split: str) -> Iterator[tuple[str, dict]]:
    """(where, row) for every row of a source; `where` is for error messages. Raises `UserError`."""
    path = Path(source)
    if path.is_dir():
        yield from _saved_rows(source, split)
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.exists() or path.suffix == ".json":
        yield from _json_rows(path)
    else:
        yield from _hub_rows(source, split)


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    content = read_json(path)
    if isinstance(content, dict):
        content = content.get("instances")
    if not isinstance(content, list):
        raise UserError(f"{path}: neither a list of prompts nor an object with a list 'instances'")
    for row, value in enumerate(content):
        yield f"{path}: row {row}", value


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}: line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number}: {not_json(error)}") from None


def _saved_rows(folder: str, split: str) -> Iterator[tuple[str, dict]]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(folder)
    except Exception as error:  # files that are missing, torn, of another format: each is another kind
        raise UserError(f"{folder}: not a folder saved by datasets ({first_line(error)})") from None
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    for row, value in enumerate(data):
        yield f"{folder}: row {row}", value


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds; each means "cannot be had"
        raise UserError(f"{name}: no such file, and not to be had from the hub ({first_line(error)})") from None
    for row, value in enumerate(data):
        yield f"{name}: row {row}", value


def raw_prompt(where: str, row: object, key: str | None = None) -> str | list[dict]:
    """The text or the chat messages of a row. Raises `UserError` if it has none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object")
    key = key or next((name for name in PROMPT_KEYS if name in row), None)
    value = row.get(key)
    check_writable(where, {key: value})
    if isinstance(value, list):
        if value and all(_is_message(entry) for entry in value):
            return value
        raise UserError(f"{where}: '{key}' is not a list of messages with role and content")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no text under {key or ' or '.join(PROMPT_KEYS)!r}")
    return value


def _is_message(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "content"))


def apply_template(where: str, value: str | list[dict], template: str, tokenizer) -> tuple[str, str | list[dict]]:
    """(templated text, the user's own text or messages). Raises `UserError` where the template does not fit."""
    if isinstance(value, list) and len(value) == 1 and value[0]["role"] == "user":
        value = value[0]["content"]
    if template == "chat":
        if tokenizer.chat_template is None:
            raise UserError("--template chat: this tokenizer has no chat template")
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        return render_chat(tokenizer, messages, where, add_generation_prompt=True), value
    if not isinstance(value, str):
        raise UserError(f"{where}: a chat of {len(value)} messages needs --template chat")
    return TEMPLATES[template].replace("{prompt}", value), value


def load_prompts(
    sources: Iterable[str],
    tokenizer,
    template: str = "none",
    max_tokens: int | None = None,
    max_characters: int | None = None,
    start: int = 0,
    end: int | None = None,
    split: str = "train",
    key: str | None = None,
) -> tuple[list[Prompt], int]:
    """Prompts number `start` up to `end` of those that pass the filters, in the sources' order.

    Args:
        sources: files, folders or hub names, read one after the other.
        tokenizer: the policy's.
        template: a name in TEMPLATES.
        max_tokens: longest templated prompt, in tokens with the special ones.
        max_characters: longest templated prompt, in characters.
        start, end: slice of the prompts that are left after both filters.
        split, key: the split of a data set, the field of a row (default: the first of PROMPT_KEYS that it has).

    Returns:
        (prompts, how many were left out as too long before the slice's end was reached).

    Raises:
        UserError: a source cannot be read, a row has no text, or no prompt is left.
    """
    left_out = 0

    def kept() -> Iterator[Prompt]:
        nonlocal left_out
        for where, row in itertools.chain.from_iterable(read_rows(source, split) for source in sources):
            text, raw = apply_template(where, raw_prompt(where, row, key), template, tokenizer)
            if max_characters is None or len(text) <= max_characters:
                ids = encode_prompt(tokenizer, text)
                if max_tokens is None or len(ids) <= max_tokens:
                    yield Prompt(text, ids, raw)
                    continue
            left_out += 1

    prompts = list(itertools.islice(kept(), start, end))
    if not prompts:
        slice_text = f" between number {start} and {'the end' if end is None else end}"
        raise UserError(f"{' '.join(sources)}: no prompts{slice_text} ({left_out} left out as too long)")
    return prompts, left_out
