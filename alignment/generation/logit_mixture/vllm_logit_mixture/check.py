"""Which models can be mixed: refused before any weight is read, in one line that names the model."""

from collections.abc import Mapping
from pathlib import Path

from vllm_logit_mixture import MixtureError

# Options of vLLM that the mixture model does not know, with the value that each has where it is off.
REFUSED = {
    "pipeline_parallel_size": (1, "use tensor parallelism"),
    "speculative_config": (None, "speculative decoding drafts for one model"),
    "enable_lora": (False, "an adapter would belong to one of the models: merge it into that one"),
    "quantization": (None, "its method would be that of one model"),
    "kv_transfer_config": (None, "a block would not say which models have written it"),
    "enable_prompt_embeds": (False, "embeddings belong to one of the models"),
}


def check_options(options: dict) -> None:
    """Raise `MixtureError` for options of vLLM that no mixture engine can have."""
    for name, (off, why) in REFUSED.items():
        if options.get(name, off) not in (off, None):
            raise MixtureError(f"{name}={options[name]!r}: the logit mixture does not support it ({why})")


def check_models(models: list[str], trust_remote_code: bool = False) -> list:
    """Return the models' configurations.

    Raises:
        MixtureError: a model is missing, is no causal language model, is quantized or has other tokens.
    """
    if not models:
        raise MixtureError("no model is named")
    configs = [_config(name, trust_remote_code) for name in models]
    if len(set(models)) > 1:
        tokenizers = {name: _tokenizer(name, trust_remote_code) for name in models}
        for name in models[1:]:
            check_same_tokens(tokenizers[models[0]], tokenizers[name], models[0], name)
        check_widths({name: (config, tokenizers[name]) for name, config in zip(models, configs, strict=True)})
    return configs


def check_same_tokens(first, second, first_name: str, second_name: str) -> None:
    """Raise `MixtureError` unless both tokenizers give every token the same id: logits are mixed id by id."""
    one, other = first.get_vocab(), second.get_vocab()
    if one == other:
        return
    token = min(set(one.items()) ^ set(other.items()))[0]
    raise MixtureError(
        f"{first_name} and {second_name} have different vocabularies ({len(one)} and {len(other)} tokens): "
        f"token {token!r} is {one.get(token)} in one and {other.get(token)} in the other"
    )


def check_widths(models: Mapping[str, tuple]) -> None:
    """Raise `MixtureError` for a model with fewer logits than its tokenizer has ids; name → configuration, tokenizer.

    Wider ones are no obstacle: ids that only some models know belong to no token.
    """
    for name, (config, tokenizer) in models.items():
        width, needed = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
        if width < needed:
            raise MixtureError(f"{name}: gives logits for {width} ids, its tokenizer has {needed}")


def _config(name: str, trust_remote_code: bool):
    from transformers import AutoConfig

    path = Path(name)
    # "owner/name" may be a hub's; anything else can only be a path.
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise MixtureError(f"{name}: no such folder")
    config = _load(AutoConfig, name, trust_remote_code)
    kinds = config.architectures or []
    if config.is_encoder_decoder or not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise MixtureError(
            f"{name}: is a {', '.join(kinds) or 'model of no known kind'}, not a causal language model"
        )
    if getattr(config, "quantization_config", None):
        raise MixtureError(f"{name}: is quantized, which the logit mixture cannot hold beside other models")
    return config


def _tokenizer(name: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, trust_remote_code)


def _load(kind, name: str, trust_remote_code: bool):
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the loaders raise many kinds, whatever a file of the model is wrong in
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MixtureError(f"{name}: cannot be loaded ({line})") from None


def room(models: list[str], trust_remote_code: bool = False) -> int | None:
    """Return how many tokens all models can read, or None where none of them says."""
    texts = [_config(name, trust_remote_code).get_text_config() for name in models]
    limits = [getattr(text, "max_position_embeddings", None) for text in texts]
    return min((limit for limit in limits if limit is not None), default=None)
