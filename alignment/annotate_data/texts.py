"""What a reward model reads, in training and in use: a prompt with its response as text, and as tokens."""

from common.cli import UserError
from common.models import render_chat

TEMPLATES = ("none", "chat")


def check_template(template: str, tokenizer, name: str) -> None:
    """Raises `UserError` if `template` is "chat" and the reward model's tokenizer has no chat template."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(f"reward model {name}: its tokenizer has no chat template; use --reward_template none")


def conversation(instance: dict, where: str, policy_template: str | None) -> list[dict]:
    """The conversation that an instance answers, without the policy's template.

    Args:
        instance: its `messages` are used where there are any, else its `raw_prompt` as one user turn, else its
            `prompt`, provided that no policy template was applied to it.
        where: the file and row, for the error.
        policy_template: the template that generation applied; None where the file does not say.
    """
    if "messages" in instance:
        return _checked_messages(instance["messages"], where)
    if "raw_prompt" not in instance and policy_template not in (None, "none"):
        raise UserError(
            f"{where}: no 'raw_prompt' or 'messages', and its prompt holds the policy's template "
            f"{policy_template!r}: the reward model's chat template needs the user's own text"
        )
    text = instance.get("raw_prompt", instance["prompt"])
    if not isinstance(text, str):
        raise UserError(f"{where}: 'raw_prompt' is not text")
    return [{"role": "user", "content": text}]


def _checked_messages(messages: object, where: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' is not a list of turns")
    for turn in messages:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: 'messages' holds a turn without 'role' and 'content' texts")
    return messages


def chat_text(tokenizer, messages: list[dict], response: str, where: str) -> str:
    """The conversation and the response through the reward model's chat template."""
    turns = [*messages, {"role": "assistant", "content": response}]
    return render_chat(tokenizer, turns, f"{where}, reward model")


def instance_texts(instance: dict, template: str, tokenizer, where: str, policy_template: str | None) -> list[str]:
    """One text a response: prompt + response as they are ("none", as published), or through the chat template."""
    if template == "none":
        return [instance["prompt"] + response for response in instance["responses"]]
    messages = conversation(instance, where, policy_template)
    return [chat_text(tokenizer, messages, response, where) for response in instance["responses"]]


def encode(tokenizer, texts: list[str], max_length: int | None) -> tuple[list[list[int]], list[bool]]:
    """Token ids with the tokenizer's own special tokens, BOS at most once.

    Returns:
        (ids, cut): one list and one flag a text; `cut` marks texts longer than `max_length` tokens, whose end
        (the tokenizer's truncation side decides) is dropped while closing special tokens stay.
    """
    ids = tokenizer(texts, verbose=False)["input_ids"]
    cut = [max_length is not None and len(row) > max_length for row in ids]
    for i in (i for i, long in enumerate(cut) if long):
        ids[i] = tokenizer(texts[i], truncation=True, max_length=max_length)["input_ids"]
    bos = tokenizer.bos_token_id
    # A chat template writes BOS itself, and the tokenizer adds another one.
    return [row[1:] if bos is not None and row[:2] == [bos, bos] else row for row in ids], cut
