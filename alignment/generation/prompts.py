"""Prompts: which rows of a data set, and what is put around them.

A row holds text (`prompt`) or chat messages (`messages`, `context_messages`, or a `prompt` that is a list).
A prompt that a source holds several times is sampled as often, each time with seeds of its own.
"""

import argparse
import array
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import Parser, UserError, positive_int
from common.models import encode_prompt, render_chat
from common.records import check_writable
from common.sources import content_of, read_rows
from common.spool import Spool

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
OWN_VARIABLES = {"tokenizer", "messages", "where", "tokenize", "add_generation_prompt", "continue_final_message"}
PROMPT_KEYS = ("prompt", "messages", "context_messages")


def add_prompt_flags(p: Parser) -> None:
    """Add the flags by which rows of a data set become prompts."""
    p.add("--dataset_split", "split of a data set", default="train")
    p.add("--dataset_key", "field that holds the prompt (default: prompt, messages or context_messages)")
    p.add("--template", "what is put around the prompt", choices=sorted(TEMPLATES), default="none")
    p.add("--chat_template_kwargs", 'variables of the chat template, JSON: \'{"date_string": "1 Jan 2025"}\'')
    p.add("--continue_final_message", "chats may end with an assistant's turn, to be continued", action="store_true")
    p.add("--max_prompt_characters", "leave out templated prompts with more characters", type=positive_int)
    p.add("--max_input_length", "leave out prompts with more tokens", type=positive_int, default=128)


class Prompt(NamedTuple):
    """A prompt that is ready to be sampled from.

    Attributes:
        where: its source and row, for messages.
        text: the templated prompt, exactly what was tokenized.
        token_ids: its ids, with the tokenizer's default special tokens; 4 bytes each.
        raw: the user's text without the template; the messages of a chat of several turns.
        fields: what else the row holds, where that is kept.
    """

    where: str
    text: str
    token_ids: array.array
    raw: str | list[dict]
    fields: dict = {}  # noqa: RUF012 (never changed)

    def digest(self) -> str:
        """Return a short hash of the text, by which an unfinished or finished result knows its prompt."""
        return text_digest(self.text)


class PromptFile(Spool):
    """Prompts in a file; see `Spool`. A sequence, as a list of them is."""

    def __init__(self, output: str | Path, prompts: Iterable[Prompt]) -> None:
        super().__init__(output)
        for prompt in prompts:
            self.append(pickle.dumps(tuple(prompt)))

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(*pickle.loads(self.read(index)))


def text_digest(text: str) -> str:
    """Return the first 8 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


class Template(NamedTuple):
    """How a row becomes a prompt; see the flags of the same names."""

    name: str = "none"
    variables: dict | None = None
    continues: bool = False


def template_of(args: argparse.Namespace) -> Template:
    """Return the template of the command line. Raises `UserError` for variables that are no JSON object."""
    try:
        variables = json.loads(args.chat_template_kwargs or "{}")
    except ValueError:
        variables = None
    if not isinstance(variables, dict) or OWN_VARIABLES & set(variables):
        raise UserError(
            f"--chat_template_kwargs {args.chat_template_kwargs!r}: not a JSON object of the template's own variables"
        )
    return Template(args.template, variables, args.continue_final_message)


def prompt_settings(args: argparse.Namespace) -> dict:
    """Return what decides the prompts, but for the slice: data by its content."""
    kept = ("dataset_key", "template", "max_prompt_characters", "max_input_length")
    dataset = {name: content_of(name, args.dataset_split) for name in args.dataset_name_or_path}
    # The chat template's variables are seen in the prompts, which are compared one by one (`check_same_prompts`).
    return {"dataset": dataset, **{name: getattr(args, name) for name in kept}}


def read_prompts(
    args: argparse.Namespace,
    tokenizer,
    longest: int,
    start: int,
    end: int | None,
    keep: Callable[[Iterator[Prompt]], Any] = list,
    keep_fields: bool = False,
) -> Any:
    """Return the prompts of a slice of at most `longest` tokens; says what was left out, and what is odd.

    Args:
        keep: makes what is returned of an iterator over the prompts, which it has to exhaust.
        keep_fields: whether a prompt has the other fields of its row.
    """
    prompts, notes = load_prompts(
        args.dataset_name_or_path,
        tokenizer,
        template_of(args),
        max_tokens=longest,
        max_characters=args.max_prompt_characters,
        start=start,
        end=end,
        split=args.dataset_split,
        key=args.dataset_key,
        keep=keep,
        keep_fields=keep_fields,
    )
    if notes.left_out:
        print(f"{notes.left_out} prompts left out as too long")
    if notes.fields:
        print(f"not kept where JSON has no such values, of the data set's fields: {', '.join(notes.fields)}")
    if notes.control_text:
        where, token = notes.control_text[0]
        print(
            f"{len(notes.control_text)} prompts hold the text of control tokens, which the model reads as such; "
            f"the first: {where} ({token})"
        )
    return prompts


def check_same_prompts(file: object, pairs: Iterable[tuple[Prompt, str | None]]) -> None:
    """Raise `UserError` if `file` was made from other prompts.

    Args:
        pairs: (what the prompt is now, the digest of what it was).
    """
    for prompt, digest in pairs:
        if prompt.digest() != digest:
            raise UserError(
                f"{file}: exists, made from another prompt than {prompt.where} gives now ({prompt.text[:60]!r} ...); "
                "a chat template may write the date: --chat_template_kwargs can fix it"
            )


class Notes(NamedTuple):
    """What is said about the prompts of a slice.

    Attributes:
        left_out: how many were too long before the slice's end was reached.
        control_text: (where, token) of prompts whose text spells a control token.
        fields: names of those that could not be kept.
    """

    left_out: int
    control_text: list[tuple[str, str]]
    fields: list[str]


def load_prompts(
    sources: Iterable[str],
    tokenizer,
    template: Template = Template(),  # noqa: B008 (a tuple)
    max_tokens: int | None = None,
    max_characters: int | None = None,
    start: int = 0,
    end: int | None = None,
    split: str = "train",
    key: str | None = None,
    keep: Callable[[Iterator[Prompt]], Any] = list,
    keep_fields: bool = False,
) -> tuple[Any, Notes]:
    """Return prompts number `start` up to `end` of those that pass the filters, in the sources' order, and `Notes`.

    Args:
        sources: files, folders or hub names, read one after the other.
        tokenizer: the policy's.
        template: what is put around them.
        max_tokens: longest templated prompt, in tokens with the special ones.
        max_characters: longest templated prompt, in characters.
        start, end: slice of the prompts that are left after both filters.
        split, key: the split of a data set, the field of a row (default: the first of PROMPT_KEYS that it has).
        keep: makes what is returned of an iterator over the prompts, which it has to exhaust.
        keep_fields: whether a prompt has the other fields of its row, as far as JSON can hold them.

    Raises:
        UserError: a source cannot be read, a row has no text, or no prompt is left.
    """
    left_out, count, controls, spelled, unkept = 0, 0, control_tokens(tokenizer), [], {}

    def kept() -> Iterator[Prompt]:
        nonlocal left_out
        for where, row in itertools.chain.from_iterable(read_rows(source, split) for source in sources):
            own = key_of(where, row, key)
            text, raw = apply_template(where, raw_prompt(where, row, own), template, tokenizer)
            if max_characters is None or len(text) <= max_characters:
                ids = encode_prompt(tokenizer, text)
                if max_tokens is None or len(ids) <= max_tokens:
                    fields = other_fields(row, own, unkept) if keep_fields else {}
                    yield Prompt(where, text, array.array("I", ids), raw, fields)
                    continue
            left_out += 1

    def chosen() -> Iterator[Prompt]:
        nonlocal count
        for prompt in itertools.islice(kept(), start, end):
            count += 1
            if token := spelled_token(prompt, controls):
                spelled.append((prompt.where, token))
            yield prompt

    prompts = keep(chosen())
    if not count:
        slice_text = f" between number {start} and {'the end' if end is None else end}"
        raise UserError(f"{' '.join(sources)}: no prompts{slice_text} ({left_out} left out as too long)")
    return prompts, Notes(left_out, spelled, list(unkept))


def key_of(where: str, row: object, key: str | None) -> str | None:
    """Return which field of a row is its prompt; null is absent. Raises `UserError` if the row is not an object."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object")
    return key or next((name for name in PROMPT_KEYS if row.get(name) is not None), None)


def other_fields(row: dict, key: str, unkept: dict) -> dict:
    """Return the fields of a row but for its prompt; to `unkept` come the names of those that JSON cannot hold."""
    found = {}
    for name, value in row.items():
        try:
            if name != key:
                check_writable("", {name: value})
                found[name] = value
        except (UserError, TypeError):
            unkept[name] = True
    return found


def raw_prompt(where: str, row: dict, key: str | None) -> str | list[dict]:
    """Return the text or the chat messages of a row. Raises `UserError` if it has none."""
    value = row.get(key)
    check_writable(where, {key: value})
    if isinstance(value, list):
        if value and all(_is_message(entry) for entry in value):
            return [{name: field for name, field in entry.items() if field is not None} for entry in value]
        raise UserError(f"{where}: '{key}' is not a list of messages with role and content")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no text under {key or ' or '.join(PROMPT_KEYS)!r}")
    return value


def _is_message(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "content"))


def apply_template(
    where: str, value: str | list[dict], template: Template, tokenizer
) -> tuple[str, str | list[dict]]:
    """Return (templated text, the user's own text or messages). Raises `UserError` where that does not fit."""
    if isinstance(value, list) and len(value) == 1 and value[0]["role"] == "user":
        value = value[0]["content"]
    if template.name == "chat":
        if tokenizer.chat_template is None:
            raise UserError("--template chat: this tokenizer has no chat template")
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        options = _whose_turn(where, messages, template.continues)
        return render_chat(tokenizer, messages, where, **options, **template.variables or {}), value
    if not isinstance(value, str):
        raise UserError(f"{where}: a chat of {len(value)} messages needs --template chat")
    return TEMPLATES[template.name].replace("{prompt}", value), value


def _whose_turn(where: str, messages: list[dict], continues: bool) -> dict:
    """Return the chat template's options for the assistant's turn. Raises `UserError` if it is not that."""
    roles = [message["role"] for message in messages]
    if set(roles) <= {"system", "developer"}:
        raise UserError(f"{where}: a chat without a user's turn")
    if roles[-1] != "assistant":
        return {"add_generation_prompt": True}
    if not continues:
        raise UserError(f"{where}: the chat ends with the assistant's turn; --continue_final_message continues it")
    return {"continue_final_message": True}


def control_tokens(tokenizer) -> list[str]:
    """Return the texts of a tokenizer's control tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token.strip()]


def spelled_token(prompt: Prompt, controls: list[str]) -> str | None:
    """Return the first of the control tokens that the prompt's own text, not its template, spells; None without."""
    parts = [prompt.raw] if isinstance(prompt.raw, str) else [message["content"] for message in prompt.raw]
    return next((token for token in controls if any(token in part for part in parts)), None)
