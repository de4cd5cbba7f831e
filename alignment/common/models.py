"""Loading models and tokenizers, and the places where text becomes ids and back: the same for every stage."""

import ctypes
import gc
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

sys.path.append(str(Path(__file__).resolve().parents[1] / "generation/logit_mixture"))  # where it is not installed

from vllm_logit_mixture import MixtureError
from vllm_logit_mixture.check import check_same_tokens, check_widths

from common.adapters import whole_model
from common.cli import UserError, first_line


def is_path(name: str) -> bool:
    """Return whether a name can be no hub's."""
    return name.startswith(("/", ".", "~"))


def lacks_chat_template(folder: Path) -> bool:
    """Return whether a folder has a tokenizer's settings and no chat template; nothing is loaded."""
    try:
        stored = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    except (OSError, ValueError, AttributeError):  # a hub's name, or what loading it will complain about
        return False
    return not stored and not any(folder.glob("*chat_template*"))


def check_model(name: str, what: str) -> None:
    """Raise `UserError` if `name` looks like a local folder and is not a model that can be loaded safely.

    Of the weights it reads the headers, so that a torn file is found before a stage does any work.
    """
    path = Path(name)
    if not path.is_dir():
        # "owner/name" may be a hub's; anything else can only be a path.
        if is_path(name) or name.count("/") != 1:
            raise UserError(f"{what} {name}: no such folder")
        return
    if not (path / "config.json").is_file():
        raise UserError(f"{what} {name}: no config.json, so not a model folder")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"{what} {name}: no *.safetensors weights; pickled ones can run code and are not loaded: convert them "
            "once with alignment/scripts/to_safetensors.py"
        )
    for file in weights:
        _check_weights(file)


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({first_line(error)})") from None


def load_config(name: str, what: str, trust_remote_code: bool = False, **options):
    """Return the model's configuration. Raises `UserError` where it cannot be had.

    A pad id that the vocabulary does not have (-1, or a token that only the tokenizer was given) counts as none: the
    embedding would refuse it, or read beyond its end.
    """
    from transformers import AutoConfig

    name = whole_model(name, what, trust_remote_code)
    check_model(name, what)
    config = _load(AutoConfig, name, what, trust_remote_code=trust_remote_code, **options)
    for part in (config, config.get_text_config()):
        pad = getattr(part, "pad_token_id", None)
        if pad is not None and not 0 <= pad < (getattr(part, "vocab_size", None) or pad + 1):
            part.pad_token_id = None
    return config


def load_tokenizer(name: str, what: str, trust_remote_code: bool = False):
    """Return the model's tokenizer, with left padding and a pad token (EOS where it has none of its own)."""
    from transformers import AutoTokenizer

    name = whole_model(name, what, trust_remote_code)
    check_model(name, what)
    tokenizer = _load(AutoTokenizer, name, what, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_causal_lm(name: str, what: str, dtype: str, trust_remote_code: bool = False, **options):
    """Return a causal language model in evaluation mode, from safetensors only; `dtype` is float32 or bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    name = whole_model(name, what, trust_remote_code)
    check_model(name, what)
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code, **options}
    config = load_config(name, what, trust_remote_code)
    return _load_whole(AutoModelForCausalLM, name, what, config=config, **options).eval()


def device_map(name: str, what: str, dtype: str, room: dict, trust_remote_code: bool = False) -> dict[str, int]:
    """Return which GPU each part of a causal language model goes to, for `load_causal_lm`: layers stay whole.

    Args:
        room: GPU → bytes that weights can take there; the first are filled first.

    Raises:
        UserError: the weights do not fit.
    """
    import torch
    from accelerate import infer_auto_device_map
    from transformers import AutoModelForCausalLM

    name = whole_model(name, what, trust_remote_code)
    config = load_config(name, what, trust_remote_code)
    with torch.device("meta"):  # shapes only
        options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    found = infer_auto_device_map(model, max_memory=dict(room), no_split_module_classes=model._no_split_modules or [])
    if not set(found.values()) <= set(room):  # what is left over would go to the disk
        raise UserError(f"{what} {name}: its weights in {dtype} do not fit in what is free on {len(room)} GPUs")
    return dict(found)


def load_reward_model(
    name: str,
    dtype: str,
    trust_remote_code: bool = False,
    needs_head: bool = True,
    mean_pooling: bool = False,
    **options,
):
    """Return a sequence classifier in evaluation mode, from safetensors only; `options` change its configuration.

    With `mean_pooling`, or where the configuration says so, see `average_over_tokens`.

    Raises:
        UserError: it cannot be loaded, or (with `needs_head`) its weights are not all there. transformers would fill
            a missing head with random numbers and score with them.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    check_model(name, "reward model")
    config = load_config(name, "reward model", trust_remote_code, **options)
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code, "config": config}
    kind = AutoModelForSequenceClassification
    model = _load_whole(kind, name, "reward model", needs_all=needs_head, **options).eval()
    if mean_pooling or getattr(config, "mean_pooling", False):
        model.config.mean_pooling = True
        average_over_tokens(model, name)
    return model


def average_over_tokens(model, name: str) -> None:
    """Make a decoder's score that of the mean of all tokens' states, not of the last token's.

    What a model with causal attention knows of a text that was cut short is badly seen from its last token. The head
    is linear, so the mean may be taken behind it; texts are padded on the right, so that the running mean at a
    text's last token, which the model picks, is the mean over the text.
    """
    import torch

    def running_mean(head, inputs, scores: torch.Tensor) -> torch.Tensor:  # [B, T, labels]
        counts = torch.arange(1, scores.shape[1] + 1, device=scores.device)
        return (scores.float().cumsum(1) / counts[:, None]).to(scores.dtype)

    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"reward model {name}: its scores are not one per token, so they have no mean over tokens")
    model.score.register_forward_hook(running_mean)


def _load_whole(kind, name: str, what: str, needs_all: bool = True, **options):
    from transformers.utils import logging

    logging.set_verbosity_error()  # its table of missing weights; they are an error here
    model, info = _load(kind, name, what, use_safetensors=True, output_loading_info=True, **options)
    if needs_all and info["missing_keys"]:
        raise UserError(f"{what} {name}: has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def _load(kind, name: str, what: str, **options):
    from transformers.utils import logging

    logging.disable_progress_bar()  # standard error is for errors, and each stage has a bar of its own
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # the loaders raise many kinds, whatever a file of the model is wrong in
        if "trust_remote_code" in str(error):
            raise UserError(f"{what} {name}: brings Python code, which runs only with --trust_remote_code") from None
        raise UserError(f"{what} {name}: cannot be loaded ({first_line(error)})") from None


def make_savable(model) -> None:
    """Repair a published generation config that is refused on saving (temperature set, sampling off)."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def give_memory_back() -> None:
    """Return to the system, or to the GPU, what freed models have held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc: weights are read by several threads, whose heaps it keeps
        libc.malloc_trim(0)


def default_device() -> str:
    """Return `cuda` where a GPU can be used, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype() -> str:
    """Return bfloat16 on a GPU; float32 elsewhere, where it is exact and not slower."""
    return "bfloat16" if default_device() == "cuda" else "float32"


def choose_dtype(args, models: Iterable[str | None], doing: str = "sampling", what: str = "model") -> str:
    """Return the type to compute in: the flag's, else the machine's, but never less than what the weights hold.

    Weights that were trained in float32 differ from where they began by less than bfloat16 can hold.

    Args:
        args: has `dtype` and `trust_remote_code`.
        doing, what: what is computed and what the models are, for messages.
    """
    if args.dtype:
        return args.dtype
    dtype = default_dtype()
    for name in filter(None, models):
        if dtype == "bfloat16" and stored_dtype(name, args.trust_remote_code, what) == "float32":
            print(f"{doing} in float32: the weights of {name} are (--dtype bfloat16 rounds them, and is faster)")
            return "float32"
    return dtype


def stored_dtype(name: str, trust_remote_code: bool = False, what: str = "model") -> str:
    """Return the type in which most of a model's weights are stored: `float32`, `bfloat16`, ..."""
    name = whole_model(name, what, trust_remote_code)
    check_model(name, what)
    if not Path(name).is_dir():
        return str(load_config(name, what, trust_remote_code).dtype).removeprefix("torch.")
    sizes = Counter()
    for entry in stored_weights(name).values():
        sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    most = max(sizes, key=sizes.get)
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(most, most)


def stored_weights(folder: str) -> dict[str, dict]:
    """Return what a folder's safetensors files say of each weight: name → {"dtype", "shape", "data_offsets"}."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:
            found |= _read_header(file)
    return found


def _read_header(file: BinaryIO) -> dict[str, dict]:
    """Return what a safetensors file says of its weights, whose bytes begin where it stands then."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))  # the header's length, then JSON
    header.pop("__metadata__", None)
    return header


def weights_of(models: Mapping[str, str | None]) -> dict[str, str]:
    """Return what a model is to a stage → a short hash of its weights, for settings that are compared.

    Cheap where provenance's fingerprint reads every byte: it reads shapes and 1 KiB from the middle of each weight. A
    model that was trained again under its old name differs in nearly all of them. Hub names and pickled weights have
    no hash.

    Raises:
        UserError: a file is not a whole safetensors file.
    """
    found = {what: sorted(Path(name).glob("*.safetensors")) for what, name in models.items() if name}
    return {what: _hash_of_samples(files) for what, files in found.items() if files}


def _hash_of_samples(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        _check_weights(path)
        with open(path, "rb") as file:
            header = _read_header(file)
            whole.update(json.dumps(header, sort_keys=True).encode())
            start = file.tell()
            for begin, end in (header[name]["data_offsets"] for name in sorted(header)):
                file.seek(start + max(begin, (begin + end) // 2 - 512))
                whole.update(file.read(min(1024, end - begin)))
    return whole.hexdigest()[:16]


def render_chat(tokenizer, messages: list[dict], where: str, **options) -> str:
    """Return the messages through the tokenizer's chat template. Raises `UserError` if that refuses them."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template may raise anything, for example on a system turn
        raise UserError(f"{where}: the chat template refuses it ({first_line(error)})") from None


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Return a templated prompt's ids: the tokenizer's default special tokens, BOS at most once, no EOS added.

    A template that already holds BOS is not given a second one, and a tokenizer that ends every text with EOS is
    not allowed to end the prompt with it.
    """
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and ids[-1:] == [eos] and not text.rstrip().endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def encode_response(tokenizer, text: str, ended: bool) -> list[int]:
    """Return the token ids of a response that exists as text only, with EOS where it `ended`.

    The text of a control token is text here: a response that spells out `<|im_end|>` does not end there. A tokenizer
    without EOS puts no end token.
    """
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    eos = tokenizer.eos_token_id
    return [*ids, eos] if ended and eos is not None else ids


def response_text(tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[str, bool]:
    """Return the text of a response, and whether half a character at its end was left out.

    The text is decode(prompt + response) without decode(prompt): alone, a SentencePiece tokenizer would drop the
    space before the first word.

    Args:
        ids: of the response, without the stop token.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    prompt, whole = (tokenizer.decode(list(part), **options) for part in (prompt_ids, [*prompt_ids, *ids]))
    text = whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(list(ids), **options)
    # Bytes that are no character (yet) decode to U+FFFD, which a response may also hold as a character of its own.
    kept = text.rstrip("\ufffd")
    character = encode_response(tokenizer, "\ufffd", ended=False)
    if kept == text or list(ids)[-len(character) :] == character:
        return text, False
    return kept, True


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a short hash of all that decides which ids a text becomes: equal means that ids can be exchanged.

    Vocabulary, special tokens, and of a fast tokenizer normalizer, pre-tokenizer, model and post-processor. Padding
    and chat template are left out: they change no id.
    """
    whole = {
        "vocabulary": tokenizer.get_vocab(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        form = json.loads(backend.to_str())
        whole |= {key: form.get(key) for key in ("normalizer", "pre_tokenizer", "model", "post_processor")}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def stop_token_ids(tokenizer, model_name: str, trust_remote_code: bool = False) -> list[int]:
    """Return the ids that end a response, sorted: the tokenizer's EOS and the model's generation settings'."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    name = whole_model(model_name, "policy", trust_remote_code)
    try:
        settings = GenerationConfig.from_pretrained(name)
    except OSError as error:
        if (Path(name) / "generation_config.json").exists():
            raise UserError(f"{name}: generation_config.json cannot be read ({first_line(error)})") from None
        # What transformers makes of such a model, and saves with what is trained from it.
        settings = GenerationConfig.from_model_config(load_config(name, "policy", trust_remote_code))
    listed = settings.eos_token_id
    ids |= set(listed if isinstance(listed, list) else [listed])
    return sorted(i for i in ids if i is not None)


# These count positions from the pad id on, so that many of their position embeddings are never used.
POSITIONS_BEHIND_PAD = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
NO_LIMIT = 10**9  # tokenizers without a limit have 10^30


def context_length(config, tokenizer=None) -> int | None:
    """Return how many tokens the model can read (prompt + response), or None where nothing says so.

    The smaller of the model's usable positions and the tokenizer's `model_max_length`, where that is a real number.
    """
    config = config.get_text_config()
    limits = []
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        behind_pad = config.model_type in POSITIONS_BEHIND_PAD and config.pad_token_id is not None
        limits.append(positions - (config.pad_token_id + 1 if behind_pad else 0))
    if tokenizer is not None and 0 < (tokenizer.model_max_length or 0) < NO_LIMIT:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=None)


def check_same_vocabulary(models: Mapping[str, tuple], are_mixed: bool = False) -> None:
    """Raise `UserError` unless all models give every token the same id: logits are mixed and compared id by id.

    Args:
        models: what a model is → (configuration, tokenizer); the others are compared with the first.
        are_mixed: their logits are summed, so none may have fewer than its tokenizer has ids.
    """
    (first, (_, tokenizer)), *others = models.items()
    try:
        for name, (_, other) in others:
            check_same_tokens(tokenizer, other, first, name)
        if are_mixed:
            check_widths(models)
    except MixtureError as error:
        raise UserError(str(error)) from None
