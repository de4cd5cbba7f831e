"""What a reward model reads, in training and in use: a prompt with its response as text, and as tokens."""

import math

from common.cli import UserError
from common.models import render_chat

TEMPLATES = ("none", "chat")


def check_template(template: str, tokenizer, name: str) -> None:
    """Raises `UserError` if `template` is "chat" and the reward model's tokenizer has no chat template."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"reward model {name}: its tokenizer has no chat template; use --reward_template none (in a driver "
            "REWARD_TEMPLATE or JUDGE_TEMPLATE)"
        )


def conversation(instance: dict, where: str, policy_template: str | None) -> list[dict]:
    """The conversation that an instance answers, without the policy's template.

    Args:
        instance: its `messages` are used where there are any, else its `raw_prompt` as one user turn, else its
            `prompt`, provided that no policy template was applied to it.
        where: the file and row, for the error.
        policy_template: the template that generation applied; None where the file does not say.
    """
    if instance.get("messages") is not None:
        return _checked_messages(instance["messages"], where)
    text = instance.get("raw_prompt")
    if text is None and policy_template not in (None, "none"):
        raise UserError(
            f"{where}: no 'raw_prompt' or 'messages', and its prompt holds the policy's template "
            f"{policy_template!r}: the reward model's chat template needs the user's own text"
        )
    text = instance["prompt"] if text is None else text
    if not isinstance(text, str):
        raise UserError(f"{where}: 'raw_prompt' is not text")
    return [{"role": "user", "content": text}]


def _checked_messages(messages: object, where: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' is not a list of turns")
    for turn in messages:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: 'messages' holds a turn without 'role' and 'content' texts")
    if {turn["role"] for turn in messages} <= {"system", "developer"}:
        raise UserError(f"{where}: 'messages' holds no user's turn")
    return messages


def chat_text(tokenizer, messages: list[dict], response: str, where: str) -> str:
    """The conversation and the response through the reward model's chat template.

    A conversation that ends with the assistant's turn is one whose answer the response continues.
    """
    if messages[-1]["role"] == "assistant":
        *messages, begun = messages
        response = begun["content"] + response
    turns = [*messages, {"role": "assistant", "content": response}]
    return render_chat(tokenizer, turns, f"{where}, reward model")


def instance_texts(instance: dict, template: str, tokenizer, where: str, policy_template: str | None) -> list[str]:
    """One text a response: prompt + response as they are ("none", as published), or through the chat template."""
    if template == "none":
        return [instance["prompt"] + response for response in instance["responses"]]
    messages = conversation(instance, where, policy_template)
    return [chat_text(tokenizer, messages, response, where) for response in instance["responses"]]


def encode(
    tokenizer, texts: list[str], max_length: int | None, responses: list[str] | None = None
) -> tuple[list[list[int]], list[bool]]:
    """Token ids with the tokenizer's own special tokens, BOS at most once.

    Args:
        tokenizer, max_length: the reward model's.
        texts: what it reads.
        responses: the response that stands in each text; the name of a control token is plain text there.

    Returns:
        (ids, cut): one list and one flag per text; `cut` marks texts longer than `max_length` tokens, whose end
        (the tokenizer's truncation side decides) is dropped while closing special tokens stay.
    """
    ids = tokenizer(texts, verbose=False)["input_ids"]
    # A chat template writes BOS itself, and the tokenizer adds another one.
    bos = tokenizer.bos_token_id
    twice = [bos] * 2 if bos is not None else [None]
    # Cut on the left, the template's is lost.
    spare = [row[:2] == twice and tokenizer.truncation_side == "right" for row in ids]
    limits = [math.inf if max_length is None else max_length + extra for extra in spare]
    cut = [len(row) > limit for row, limit in zip(ids, limits, strict=True)]
    for i in (i for i, long in enumerate(cut) if long):
        ids[i] = tokenizer(texts[i], truncation=True, max_length=limits[i])["input_ids"]
    for i in _with_control_text(tokenizer, responses or []):
        ids[i], cut[i] = _encode_as_text(tokenizer, texts[i], responses[i], limits[i])
    return [row[1:] if row[:2] == twice else row for row in ids], cut


def _control_tokens(tokenizer) -> dict[int, str]:
    """Id → text of all of them; `all_special_ids` would be those that have a name, such as EOS."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _with_control_text(tokenizer, responses: list[str]) -> list[int]:
    """Indices of the responses that spell a control token."""
    names = _control_tokens(tokenizer).values()
    return [i for i, text in enumerate(responses) if tokenizer.is_fast and any(name in text for name in names)]


def _encode_as_text(tokenizer, text: str, response: str, limit: float) -> tuple[list[int], bool]:
    """Ids of one text, whether it was cut; control tokens inside of the response are split into the text's tokens."""
    response = response if response in text else response.strip()  # a template may strip it
    start = text.rfind(response)
    end = start + len(response)
    found, control = tokenizer(text, return_offsets_mapping=True, verbose=False), _control_tokens(tokenizer)
    ids, closing = [], []
    for token, (begin, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        inside = 0 <= start <= begin < stop <= end
        if inside and token in control:
            ids += tokenizer(text[begin:stop], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids.append(token)
        # What the tokenizer itself puts behind a text stands for no characters.
        closing = [*closing, token] if begin == stop else []
    if len(ids) <= limit:
        return ids, False
    if tokenizer.truncation_side == "left":
        return ids[-int(limit) :], True
    return ids[: int(limit) - len(closing)] + closing, True
