"""Every setting of the drivers, declared once: name, kind, default, unit, help. Standard library only.

A setting is given to a driver like one of make's, or in a recipe (alignment/recipes/*.yaml); resolve.py reads both:

    bash alignment/sample_train_safe_rlhf.sh SAMPLERS="online mixp" ITERS=2 LEARNING_RATE=1e-6

The defaults are the paper's where its two experiments agree.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from dpo_iteration.pairs import CHOOSE_TYPES
from generation.prompts import TEMPLATES


class Kind(NamedTuple):
    """What a setting holds.

    Attributes:
        wanted: its name in messages.
        read: text, or a recipe's value, → value. Raises `ValueError` (or its message is `wanted`).
    """

    wanted: str
    read: Callable


def _whole(text) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", str(text)):
        raise ValueError
    return int(text)


def _above_0(text) -> int:
    value = _whole(text)
    if value == 0:
        raise ValueError
    return value


def _number(text) -> float:
    value = float(text)
    if isinstance(text, bool) or not math.isfinite(value) or value < 0:
        raise ValueError
    return value


def _share(text) -> float:
    value = _number(text)
    if value > 1:
        raise ValueError
    return value


def _flag(text) -> bool:
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(text).lower()]
    except KeyError:
        raise ValueError from None


def _text(text) -> str:
    if isinstance(text, (list, dict)) or re.search(r"[\x00-\x1f]", str(text)):
        raise ValueError
    return str(text)


def is_name(text: str) -> bool:
    """Return whether the text can be a part of a file name that stays in its folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+.-]*", text) is not None


def _words(value) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else str(value).split()


def _names(value) -> list[str]:
    names = list(dict.fromkeys(_words(value)))
    if not names or not all(map(is_name, names)):
        raise ValueError
    return names


def _seeds(value) -> list[int]:
    seeds = [_whole(word) for word in _words(value)]
    if not seeds:
        raise ValueError
    return seeds


def _sources(value) -> list[str]:
    """Return hub names and files; the path of one that is there may hold spaces."""
    return [value] if isinstance(value, str) and Path(value).exists() else _words(value)


def _models(value) -> list[str]:
    """Return NAME=PATH words; a name is part of file names."""
    words = _words(value)
    if not all(is_name(word.partition("=")[0]) and word.partition("=")[2] for word in words):
        raise ValueError
    return words


def _table(value) -> dict[str, list]:
    table = json.loads(value) if isinstance(value, str) else value
    if not isinstance(table, dict) or not all(is_name(str(k)) and isinstance(v, list) for k, v in table.items()):
        raise ValueError
    return table


def _object(value) -> dict:
    found = json.loads(value) if isinstance(value, str) else value
    try:
        json.dumps(found)
    except TypeError:  # YAML has dates, for one
        raise ValueError from None
    if not isinstance(found, dict):
        raise ValueError
    return found


COUNT = Kind("a whole number above 0", _above_0)
NATURAL = Kind("a whole number from 0 to 999999999", _whole)
NUMBER = Kind("a number, 0 or more", _number)
SHARE = Kind("a number from 0 to 1", _share)
FLAG = Kind("True or False", _flag)
TEXT = Kind("text without control characters", _text)
PATH = Kind("a path without control characters", _text)
NAMES = Kind("names with spaces between them; a name holds only letters, digits and _ + . -", _names)
SEEDS = Kind("whole numbers with spaces between them", _seeds)
SOURCES = Kind("files or hub names with spaces between them", _sources)
MODELS = Kind("NAME=PATH with spaces between them", _models)
TABLE = Kind('a JSON object {"name": [[p, [w, w], [w, w]], ...]} of samplers', _table)
OBJECT = Kind("a JSON object", _object)


def one_of(*choices: str) -> Kind:
    """Return the kind of a setting that has a few possible values."""

    def read(text) -> str:
        if str(text) not in choices:
            raise ValueError
        return str(text)

    return Kind("one of " + ", ".join(choices), read)


DTYPE = one_of("float32", "bfloat16")


def setting(default, kind: Kind, text: str, unit: str = ""):
    """Return a field of `Settings`. A default of None means "not set": the text says what happens then."""
    metadata = {"kind": kind, "default": default, "text": text, "unit": unit}
    return field(default_factory=lambda: copy.copy(default), metadata=metadata)


@dataclass
class Settings:
    """The settings of a run; an argument has the name of its field."""

    # The run
    RECIPE: str = setting("safe_rlhf", PATH, "a name in alignment/recipes, or the path of a .yaml file")
    RUN_DIR: str = setting(None, PATH, "folder of everything that the run writes; not set: alignment/runs/RECIPE")
    SAMPLERS: list = setting(["offline", "online", "gshf", "mixp"], NAMES, "rows of bandit/mixtures.py, or of PAIRS")
    PAIRS: dict = setting(
        {},
        TABLE,
        'samplers of your own, {"name": [[p, [w_policy, w_second], [w, w]], ...]}, or with'
        " a third weight, of the policy of the iteration before",
    )
    ITERS: int = setting(3, COUNT, "iterations; the first is on-policy and shared by all samplers")
    ITER1_MODEL: str = setting(None, PATH, "a trained iteration 1 to start from; not set: it is trained")
    SEED: int = setting(42, NATURAL, "of every random choice")
    SEEDS: list = setting([1, 2, 3], SEEDS, "seeds that sample_ablation.sh compares the samplers over")
    DRY_RUN: bool = setting(False, FLAG, "print the commands and do no more")

    # Models and prompts
    ASSETS: str = setting(None, PATH, "where the quickstart's models are; not set: alignment/assets")
    BASE_MODEL: str = setting(None, PATH, "first policy, and the reference: folder or hub name")
    PROMPTS: list = setting(None, SOURCES, "prompts: files, folders or hub names")
    DATASET_SPLIT: str = setting(None, TEXT, "split of a data set; not set: train")
    DATASET_KEY: str = setting(None, TEXT, "field of the prompt; not set: prompt, messages or context_messages")
    TEMPLATE: str = setting("none", one_of(*TEMPLATES), "what is put around a prompt; chat: the tokenizer's own")
    CHAT_TEMPLATE_KWARGS: dict = setting({}, OBJECT, 'variables of the chat template, {"date_string": "1 Jan 2025"}')
    CONTINUE_FINAL_MESSAGE: bool = setting(False, FLAG, "chats may end with an assistant's turn, to be continued")
    MAX_PROMPT_CHARACTERS: int = setting(None, COUNT, "longer prompts (with template) are left out", "characters")
    MAX_PROMPT_LENGTH: int = setting(128, COUNT, "longer prompts (with template) are left out", "tokens")
    TRAIN_START: int = setting(0, NATURAL, "first training prompt, counted after the filters")
    TRAIN_END: int = setting(10000, COUNT, "training prompt to stop before")
    TEST_START: int = setting(10000, NATURAL, "first test prompt")
    TEST_END: int = setting(12000, COUNT, "test prompt to stop before")
    TRUST_REMOTE_CODE: bool = setting(False, FLAG, "run code that comes with a model")

    # Generation
    K: int = setting(None, COUNT, "responses per prompt; not set: the sampler's own, mostly 2")
    TEMPERATURE: float = setting(0.7, NUMBER, "0 is greedy")
    MAX_NEW_TOKENS: int = setting(128, COUNT, "longest response", "tokens")
    BACKEND: str = setting("vllm", one_of("vllm", "hf"), "what samples")
    COMPILE: str = setting(
        None,
        one_of("eager", "cudagraphs", "inductor"),
        "what vLLM compiles at each start: nothing, CUDA graphs, or all of the model; not set: eager",
    )
    GENERATION_DTYPE: str = setting(None, DTYPE, "not set: bfloat16 on a GPU for weights of 16 bits, else float32")
    MAX_NUM_SEQS: int = setting(None, COUNT, "at a time, per engine; not set: what a GPU holds, else 64", "responses")
    TENSOR_PARALLEL_SIZE: int = setting(1, COUNT, "that share a model which does not fit on one", "GPUs")
    GPU_MEMORY_UTILIZATION: float = setting(0.9, SHARE, "of a GPU's memory for the engine", "share")
    NUM_ENGINES: str = setting(
        None,
        Kind("a whole number or 'all'", lambda text: text if text == "all" else _whole(text)),
        "also of annotation; not set: as many as there are GPUs for, here or in Ray's cluster at RAY_ADDRESS",
    )

    # Rewards
    REWARD_MODEL: str = setting(None, PATH, "reward model that labels pairs: folder or hub name")
    REWARD_TEMPLATE: str = setting(
        None,
        one_of("none", "chat"),
        "none: prompt + response as plain text; chat: the reward model's own; not set: chat where TEMPLATE is",
    )
    REWARD_COLUMN: int = setting(None, NATURAL, "the reward among a model's labels, where it has several")
    REWARD_MAX_LENGTH: int = setting(None, COUNT, "kept of a text; not set: what the model allows", "tokens")
    REWARD_DTYPE: str = setting(
        None,
        one_of("float32", "bfloat16", "native"),
        "not set: bfloat16 on a GPU for 16-bit weights, else float32; native: also on a CPU where it is faster",
    )
    TOKEN_BUDGET: int = setting(None, COUNT, "most in a batch; not set: 16384 on a GPU, else 2048", "tokens")
    REWARD_FUNCTION: str = setting(None, PATH, "FILE.py:NAME, a Python function instead of REWARD_MODEL")
    JUDGE_MODEL: str = setting(None, PATH, "a second reward model, which training never sees")
    JUDGE_COLUMN: int = setting(None, NATURAL, "the reward among the judge's labels, where it has several")
    JUDGE_TEMPLATE: str = setting(None, one_of("none", "chat"), "not set: REWARD_TEMPLATE")

    # Training
    TRAINER: str = setting("ours", one_of("ours", "trl"), "ours: run_dpo.py; trl: TRL's DPOTrainer")
    TRL_LOSS_TYPE: str = setting(None, TEXT, "a loss of TRL, for TRAINER=trl; not set: sigmoid")
    LOSS_TYPE: str = setting("rev_kl", TEXT, "a row of LOSSES in dpo_iteration/losses.py")
    CHOOSE_TYPE: str = setting(
        "sampler", one_of("sampler", *CHOOSE_TYPES), "how a pair is chosen; sampler: as the sampler's row says"
    )
    LENGTH_PENALTY: float = setting(None, NUMBER, "reward taken per token by CHOOSE_TYPE=max_min_p")
    LABELS: str = setting("margin", one_of("margin", "sampled"), "margin: sigma(margin); sampled: 0 or 1 from it")
    LABEL_NOISE: float = setting(0.0, SHARE, "of the labels that are turned round, up to 0.5", "share")
    BETA: float = setting(
        0.1, NUMBER, "weight of the KL from the reference; pilaf and theory take their weights from it too"
    )
    MARGIN_SCALE: float = setting(1.0, NUMBER, "margin = MARGIN_SCALE * difference of rewards")
    MAX_LENGTH: int = setting(256, COUNT, "prompt and response; longer ones are cut", "tokens")
    LEARNING_RATE: float = setting(5e-7, NUMBER, "at its highest")
    LR_SCHEDULER: str = setting("cosine", TEXT, "a name of transformers")
    WARMUP_STEPS: int = setting(100, NATURAL, "of a rising learning rate", "steps")
    EPOCHS: float = setting(2, NUMBER, "passes over the data of an iteration")
    MAX_STEPS: int = setting(None, COUNT, "ends each training earlier", "steps")
    GLOBAL_BATCH: int = setting(16, COUNT, "per optimizer step, on all GPUs together", "pairs")
    PER_DEVICE_BATCH: int = setting(1, COUNT, "per GPU and pass, at most: a divisor of its share", "pairs")
    EVAL_FRACTION: float = setting(0, SHARE, "of the pairs that is held out", "share")
    BF16: str = setting(
        None,
        one_of("True", "False", "native"),
        "train in bfloat16; native: on a CPU too, if it multiplies bfloat16 faster; not set: on a GPU",
    )
    SAVE_DTYPE: str = setting(None, DTYPE, "of the saved weights; not set: bfloat16 with BF16, else float32")
    ACCELERATE_CONFIG: str = setting(
        "zero3", NAMES._replace(read=lambda text: _names(text)[0]), "a file of alignment/configs; single: one process"
    )
    ATTENTION: str = setting(
        None, TEXT, "attention of transformers; not set: sdpa; flash_attention_2 does not share prefixes"
    )
    GRADIENT_CHECKPOINTING: bool = setting(True, FLAG, "less memory, a third more arithmetic")
    USE_LORA: bool = setting(False, FLAG, "train small adapters; the saved model has them merged in")
    LORA_R: int = setting(None, COUNT, "rank of the adapters; not set: the script's default")
    LORA_ALPHA: float = setting(None, NUMBER, "scale of the adapters; not set: the script's default")
    LORA_TARGETS: str = setting(None, TEXT, "modules with adapters; not set: the script's default")
    QLORA: bool = setting(False, FLAG, "hold the frozen weights in 4 bits (with USE_LORA, on a GPU)")
    OPTIMIZER: str = setting(None, TEXT, "a name of transformers; not set: AdamW")
    SAVE_STRATEGY: str = setting("steps", one_of("steps", "epoch", "no"), "when checkpoints are written")
    SAVE_STEPS: int = setting(500, COUNT, "between two checkpoints; of a 7B model one has 94 GB", "steps")
    SAVE_MINUTES: float = setting(None, NUMBER, "between two checkpoints, instead of SAVE_STEPS", "minutes")
    REPORT_TO: str = setting("none", TEXT, "wandb, tensorboard or none")
    DDP_TIMEOUT: int = setting(None, COUNT, "that processes wait for each other; not set: 1800", "seconds")

    # Evaluation
    EVAL_K: int = setting(1, COUNT, "responses per prompt")
    EVAL_TEMPERATURE: float = setting(0.1, NUMBER, "0 is greedy")
    EVAL_TRAIN_END: int = setting(None, COUNT, "training prompt to stop before; not set, or above it: TRAIN_END")
    MODELS: list = setting([], MODELS, "given checkpoints, evaluated beside BASE_MODEL instead of a run's own models")
    SCORE_KL: bool = setting(False, FLAG, "score what the KL is measured on: reward, KL and value of one policy")
    KL_PROMPTS: int = setting(200, COUNT, "test prompts on which the KL is measured")
    KL_TEMPERATURE: float = setting(None, NUMBER, "not set: TEMPERATURE")
    PUBLISHED_ESTIMATOR: bool = setting(False, FLAG, "measure also what the published scripts call the KL")
    KL_DTYPE: str = setting(None, DTYPE, "in which both models score; not set: the script's default")

    # Machines
    NEEDS_GPU: bool = setting(True, FLAG, "refuse to start on a machine without a GPU")
    GPUS: int = setting(None, NATURAL, "of this machine that are used; not set: all that nvidia-smi lists")
    SIDE_BY_SIDE: int = setting(
        1, COUNT, "that share the cores of a machine without a GPU, where a stage has several", "commands"
    )
    NUM_MACHINES: int = setting(1, COUNT, "that run the same driver; they share RUN_DIR")
    MACHINE_RANK: int = setting(0, NATURAL, "of this machine; 0 makes the data, all train")
    MASTER_ADDR: str = setting("localhost", TEXT, "machine of rank 0, where there are several")
    MASTER_PORT: int = setting(29500, COUNT, "its port for training, where there are several machines")

    @property
    def processes(self) -> int:
        """How many processes train."""
        return 1 if self.ACCELERATE_CONFIG == "single" else self.GPUS * self.NUM_MACHINES or 1

    @property
    def kl_part(self) -> str:
        """Whose responses the KL is measured on, with SCORE_KL: the evaluation's own, where temperatures agree."""
        agree = self.EVAL_TEMPERATURE == self.KL_TEMPERATURE and self.EVAL_K == 1
        return "test_prompts" if agree else "kl_prompts"


KNOWN = {option.name: option.metadata for option in fields(Settings)}
# Headings of the help: the first setting of each group.
GROUPS = {
    "RECIPE": "The run",
    "ASSETS": "Models and prompts",
    "K": "Generation",
    "REWARD_MODEL": "Rewards",
    "TRAINER": "Training",
    "EVAL_K": "Evaluation",
    "NEEDS_GPU": "Machines",
}


def show(value) -> str:
    """Return a value as one word of a command: 5e-7, True, names with spaces between them, a table as JSON."""
    if isinstance(value, list):
        return " ".join(map(show, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("e-0", "e-")
    return "" if value in (None, {}) else json.dumps(value) if isinstance(value, dict) else str(value)
