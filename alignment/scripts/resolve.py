"""Reads and checks the settings of a run, before anything is started; called by common.sh.

Reads   arguments NAME=value, the recipe that they name, and what the machine has.
Writes  to standard output, one per line, what a driver needs: all settings as JSON, RUN_DIR, the files of the lock
        and of the stages' seconds, the Python of all stages where they run on a CPU, ITERS, SEEDS and SAMPLERS. A
        wrong setting is one line on standard error and exit code 2.

    python alignment/scripts/resolve.py DRIVER SAMPLERS="online mixp" ITERS=2
    python alignment/scripts/resolve.py DRIVER --help
"""

import contextlib
import difflib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ALIGNMENT = Path(__file__).resolve().parents[1]
PROJECT = ALIGNMENT.parent
sys.path[:0] = [str(PROJECT), str(ALIGNMENT)]

from annotate_data.reward_function import FunctionRewards
from bandit.mixtures import get_mixture
from common.cli import UserError, fail
from common.models import is_path, lacks_chat_template
from generation.sampling import check_count, check_temperature, sampler_from_json
from scripts import machine, memory, stages
from scripts.settings import GROUPS, KNOWN, Settings, is_name, show

# What a recipe may hold besides settings: the name of a recipe that it starts from.
EXTENDS = "EXTENDS"
# Settings that other programs have as environment variables too; nothing is said about those.
COMMON_NAMES = {
    *("K", "SEED", "SEEDS", "GPUS", "BETA", "LABELS", "BACKEND", "TEMPLATE", "TEMPERATURE", "ATTENTION", "OPTIMIZER"),
    *("TRAINER", "EPOCHS", "BF16", "MASTER_ADDR", "MASTER_PORT", "ASSETS", "MAX_STEPS", "MAX_LENGTH"),
}
# Settings that only the training script can judge. Importing it takes seconds: it is asked where one is given.
JUDGED_IN_TRAINING = {"LOSS_TYPE", "CHOOSE_TYPE", "LENGTH_PENALTY", "LABELS", "LABEL_NOISE", "LR_SCHEDULER"} | {
    *("TRAINER", "TRL_LOSS_TYPE", "OPTIMIZER", "REPORT_TO", "USE_LORA", "QLORA", "EVAL_FRACTION", "BETA")
}
PARSE = """import sys
sys.path.insert(0, {!r})
from common.cli import run
from dpo_iteration.{} import parse
run(lambda: parse(sys.argv[1:]))"""


def read(name: str, value, where: str = ""):
    """Return the value of a setting, given as text or by a recipe. Raises `UserError`."""
    if name not in KNOWN:
        close = difflib.get_close_matches(name.upper(), KNOWN, 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists all"
        raise UserError(f"{where}{name}: no such setting; {hint}")
    kind, default = KNOWN[name]["kind"], KNOWN[name]["default"]
    if value is None or (value == "" and default in (None, {})):
        return default
    try:
        return kind.read(value)
    except ValueError:
        raise UserError(f"{where}{name} {str(value)!r}: not {kind.wanted}") from None


def parse(words: list[str]) -> dict:
    """Return {name: value} of arguments NAME=value; the last one of a name counts."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r}: settings are given as NAME=value; --help lists all")
        found[name] = read(name, value)
    return found


def read_recipe(recipe: str, above: tuple[str, ...] = ()) -> dict:
    """Return {name: value} of a recipe and of the one that it extends; `above`: those that extend it."""
    if recipe in above:
        raise UserError(f"RECIPE {recipe!r}: extends itself")
    path = Path(recipe)
    if not recipe.endswith(".yaml"):
        if not is_name(recipe):
            raise UserError(f"RECIPE {recipe!r}: not a name in alignment/recipes, nor a .yaml file")
        path = ALIGNMENT / "recipes" / f"{recipe}.yaml"
    try:
        import yaml
    except ImportError:
        raise UserError(f"{sys.executable} has no PyYAML: run 'bash setup.sh cpu' (or gpu) in {PROJECT}") from None
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        known = sorted(file.stem for file in (ALIGNMENT / "recipes").glob("*.yaml"))
        raise UserError(f"RECIPE {recipe!r}: no file {path}; there are {', '.join(known)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(rows, dict):
        raise UserError(f"{path}: not a list of NAME: value")
    base = {}
    if EXTENDS in rows:
        other = str(rows.pop(EXTENDS))  # a file's path is relative to this one
        base = read_recipe(str(path.parent / other) if other.endswith(".yaml") else other, (*above, recipe))
    return base | {name: read(str(name), value, f"{path.name}: ") for name, value in rows.items()}


def resolve(words: list[str]) -> Settings:
    """Return all settings: the arguments', else the recipe's, else the defaults."""
    given = parse(words)
    recipe = given.get("RECIPE", KNOWN["RECIPE"]["default"])
    s = Settings(**read_recipe(recipe) | given)
    s.RUN_DIR = s.RUN_DIR or str(ALIGNMENT / "runs" / Path(recipe).name.removesuffix(".yaml"))
    s.ASSETS = s.ASSETS or str(ALIGNMENT / "assets")
    for name in ("BASE_MODEL", "REWARD_MODEL", "JUDGE_MODEL"):  # a recipe's names in the folder of assets
        setattr(s, name, getattr(s, name) and getattr(s, name).replace("${ASSETS}", s.ASSETS))
    s.PROMPTS = s.PROMPTS and [source.replace("${ASSETS}", s.ASSETS) for source in s.PROMPTS]
    s.REWARD_TEMPLATE = s.REWARD_TEMPLATE or ("chat" if s.TEMPLATE == "chat" else "none")
    s.JUDGE_TEMPLATE = s.JUDGE_TEMPLATE or s.REWARD_TEMPLATE
    s.EVAL_TRAIN_END = min(s.EVAL_TRAIN_END or s.TRAIN_END, s.TRAIN_END)
    s.KL_TEMPERATURE = s.TEMPERATURE if s.KL_TEMPERATURE is None else s.KL_TEMPERATURE
    s.GPUS = machine.gpus(s.NEEDS_GPU, s.DRY_RUN) if s.GPUS is None else s.GPUS
    for name, value in {"BF16": "True", "REWARD_DTYPE": "bfloat16"}.items():
        if getattr(s, name) == "native":
            setattr(s, name, value if not s.GPUS and machine.multiplies_bfloat16() else None)
    return s


def check_names(s: Settings) -> None:
    """Raise `UserError` for a name that is in no table: its own stage would find it hours later."""
    for sampler in s.SAMPLERS:
        try:
            own = sampler_from_json(json.dumps(s.PAIRS[sampler])) if sampler in s.PAIRS else get_mixture(sampler)
            check_count(own.pairs(s.BETA), s.K or own.candidates)
        except (ValueError, UserError) as error:
            raise UserError(f"SAMPLERS, {sampler}: {error}") from None
    configs = {"single", *(file.stem for file in (ALIGNMENT / "configs").glob("*.yaml"))}
    tables = {"ACCELERATE_CONFIG": configs}
    if s.LOSS_TYPE != "rev_kl":
        with contextlib.suppress(ImportError):  # of torch: it takes seconds, and this Python may have none
            from dpo_iteration.losses import LOSSES

            tables["LOSS_TYPE"] = LOSSES
    for name, table in tables.items():
        if getattr(s, name) not in table:
            raise UserError(f"{name} {getattr(s, name)!r}: there are {', '.join(sorted(table))}")


def check_files(s: Settings, driver: str) -> None:
    """Raise `UserError`, before a stage has run, for a path that the driver would read here and that is not there.

    Not of the quickstart's assets, which may be made after this. Also for a local model that lacks the chat template
    through which it is to read.
    """
    templates = {"REWARD_MODEL": "REWARD_TEMPLATE", "JUDGE_MODEL": "JUDGE_TEMPLATE"}
    templates |= dict.fromkeys(("BASE_MODEL", "ITER1_MODEL", "MODELS"), "TEMPLATE")
    paths = {"BASE_MODEL": [s.BASE_MODEL]}
    if s.MACHINE_RANK == 0:  # it makes the data
        models = [word.partition("=")[2] for word in s.MODELS]
        paths |= {"PROMPTS": s.PROMPTS, "ITER1_MODEL": [s.ITER1_MODEL], "MODELS": models}
    if s.MACHINE_RANK == 0 and (driver != "sample_kl.sh" or s.SCORE_KL):
        paths |= {"REWARD_MODEL": [] if s.REWARD_FUNCTION else [s.REWARD_MODEL], "JUDGE_MODEL": [s.JUDGE_MODEL]}
        try:
            if s.REWARD_FUNCTION:
                FunctionRewards(s.REWARD_FUNCTION)
        except UserError as error:
            raise UserError(f"REWARD_FUNCTION: {error}") from None
    for name, values in paths.items():
        for value in filter(None, values):
            if is_path(value) and not Path(value).exists() and not value.startswith(f"{s.ASSETS}/"):
                raise UserError(f"{name} {value}: there is no such path")
            template = templates.get(name)
            if template and getattr(s, template) == "chat" and lacks_chat_template(Path(value)):
                raise UserError(f"{name} {value}: its tokenizer has no chat template, but {template} is chat")


def check_values(s: Settings) -> None:
    """Raise `UserError` for values that a later stage would refuse, or that would train on what is tested."""
    deepspeed, fsdp = (s.GPUS > 0 and s.ACCELERATE_CONFIG.startswith(kind) for kind in ("zero", "fsdp"))
    ranges = ("TRAIN_START", "TRAIN_END"), ("TRAIN_START", "EVAL_TRAIN_END"), ("TEST_START", "TEST_END")
    wrong = {
        f"{low} {getattr(s, low)} is not below {high} {getattr(s, high)}": getattr(s, low) >= getattr(s, high)
        for low, high in (*ranges, ("MAX_PROMPT_LENGTH", "MAX_LENGTH"))
    } | {
        f"prompts {s.TEST_START} to {s.TEST_END} (TEST_START, TEST_END) are tested, of which some are trained on: "
        f"{s.TRAIN_START} to {s.TRAIN_END} (TRAIN_START, TRAIN_END)": (
            s.TRAIN_START < s.TEST_END and s.TEST_START < s.TRAIN_END
        ),
        "K 1: a pair needs two responses": s.K == 1,
        "EPOCHS 0: nothing would be trained": s.EPOCHS == 0,
        # Training may be greedy; then only the KL's own stage refuses.
        "KL_TEMPERATURE 0: the KL of greedy decoding is not finite": s.KL_TEMPERATURE == 0 < s.TEMPERATURE,
        "QLORA=1 goes with USE_LORA=1: the 4-bit weights are frozen, only an adapter can be trained": (
            s.QLORA and not s.USE_LORA
        ),
        f"QLORA=1: ACCELERATE_CONFIG {s.ACCELERATE_CONFIG} cannot shard 4-bit weights; single does not": (
            s.QLORA and (deepspeed or fsdp)
        ),
        f"SAVE_DTYPE float32: with BF16 and ACCELERATE_CONFIG {s.ACCELERATE_CONFIG} weights are bfloat16 already": (
            s.SAVE_DTYPE == "float32" and s.BF16 != "False" and deepspeed
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(message)
    for name in ("TEMPERATURE", "EVAL_TEMPERATURE", "KL_TEMPERATURE"):
        check_temperature(s.BACKEND, getattr(s, name), name)


def check(s: Settings, driver: str) -> None:
    """Raise `UserError` for settings that do not go together, or not with this machine; settle the batches."""
    for name in ("BASE_MODEL", "PROMPTS") if s.REWARD_FUNCTION else ("BASE_MODEL", "PROMPTS", "REWARD_MODEL"):
        if not getattr(s, name):
            raise UserError(f"recipe {s.RECIPE} names no {name}; give {name}=...")
    check_names(s)
    check_values(s)
    if not s.DRY_RUN:
        check_files(s, driver)
    if s.MODELS and driver.startswith("sample_train"):
        raise UserError(
            f"MODELS {show(s.MODELS)}: they are evaluated, not trained: sample_kl.sh, sample_eval_safe_rlhf.sh"
        )
    if not s.MACHINE_RANK < s.NUM_MACHINES:
        raise UserError(f"MACHINE_RANK {s.MACHINE_RANK}: with NUM_MACHINES {s.NUM_MACHINES} it is below that")
    if s.NUM_MACHINES > 1 and (s.GPUS == 0 or s.ACCELERATE_CONFIG == "single"):
        raise UserError(f"NUM_MACHINES {s.NUM_MACHINES}: GPUS=0 and ACCELERATE_CONFIG=single are one process")
    if s.NUM_MACHINES > 1 and not driver.startswith("sample_train"):
        raise UserError(f"{driver} runs on one machine: NUM_MACHINES is {s.NUM_MACHINES}")
    if driver.startswith("sample_train"):
        settle_batches(s)
    if s.NEEDS_GPU and s.GPUS == 0 and not s.DRY_RUN:
        raise UserError(
            f"recipe {s.RECIPE} needs GPUs and none was found. Without one: 'bash quickstart.sh' in the top folder, "
            "or RECIPE=quickstart here. DRY_RUN=1 prints what would run."
        )
    size = machine.gpu_memory() if s.GPUS else None
    fits = memory.check(s, driver, size) if size else None
    s.MAX_NUM_SEQS = s.MAX_NUM_SEQS or fits or 64
    if not s.DRY_RUN:
        machine.check_environments(s.GPUS, s.ACCELERATE_CONFIG == "cpu")


def settle_batches(s: Settings) -> None:
    """Make PER_DEVICE_BATCH a divisor of a process's share. Raise `UserError` where shares are not equal."""
    share, rest = divmod(s.GLOBAL_BATCH, s.processes)
    if rest:
        raise UserError(f"GLOBAL_BATCH {s.GLOBAL_BATCH} is not a multiple of the {s.processes} processes that train")
    s.PER_DEVICE_BATCH = max(size for size in range(1, s.PER_DEVICE_BATCH + 1) if share % size == 0)


def check_training(s: Settings, words: list[str]) -> None:
    """Raise `UserError` for what the training script would refuse after the first generation; some seconds."""
    given = parse(words)
    own_recipe = given.get("RECIPE", "").endswith(".yaml")
    if s.DRY_RUN or not (own_recipe or JUDGED_IN_TRAINING & given.keys()):
        return
    [command] = stages.train(s, 2, s.SAMPLERS[:1])
    script = next(i for i, word in enumerate(command) if word.endswith(("run_dpo.py", "run_trl.py")))
    code = PARSE.format(str(ALIGNMENT), Path(command[script]).stem)
    done = subprocess.run([command[0], "-c", code, *command[script + 1 :]], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"training: {done.stderr.strip().splitlines()[-1].removeprefix('-c: error: ')}")


def make_run_folder(s: Settings) -> tuple[str, str]:
    """Make the run folder; return the files of its lock and of its stages' seconds: nowhere in a dry run."""
    if s.DRY_RUN:
        return "/dev/null", "/dev/null"
    lock = Path(s.RUN_DIR, f".lock.{s.MACHINE_RANK}")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.open("a").close()
    except OSError:
        raise UserError(f"RUN_DIR {s.RUN_DIR}: cannot be written") from None
    return str(lock), "/dev/null" if s.MACHINE_RANK else f"{s.RUN_DIR}/stage_seconds.tsv"


def say_what_is_ignored() -> None:
    """Tell a user who exports settings, as earlier versions wanted it, that arguments set them now."""
    found = [name for name in KNOWN if name in os.environ and name not in COMMON_NAMES]
    if "DRY_RUN" in found and os.environ["DRY_RUN"] not in ("", "0"):
        raise UserError("DRY_RUN is set in the environment, which sets nothing here: give DRY_RUN=1 as an argument")
    if found:
        names = ", ".join(found)
        print(f"ignored in the environment: {names}; give {found[0]}=... as an argument", file=sys.stderr)


def help_text(recipe: str) -> str:
    """Return every setting with its value in a recipe, unit and help, group by group."""
    values = read_recipe(recipe)
    lines = []
    for name, option in KNOWN.items():
        if name in GROUPS:
            lines.append(f"\n{GROUPS[name]}")
        unit = f", {option['unit']}" if option["unit"] else ""
        choices = f" ({option['kind'].wanted})" if option["kind"].wanted.startswith("one of") else ""
        lines.append(f"  {name}={show(values.get(name, option['default']))}\n      {option['text']}{choices}{unit}")
    return "\n".join(lines)


def main() -> None:
    driver, *words = sys.argv[1:]
    try:
        if asked := {"--help", "-h"} & set(words):
            recipe = parse([word for word in words if word not in asked]).get("RECIPE", KNOWN["RECIPE"]["default"])
            print(f"Settings of {driver}, given as NAME=value; these are the values of RECIPE={recipe}:")
            print(help_text(recipe))
            return
        settings = resolve(words)
        say_what_is_ignored()
        check(settings, driver)
        if driver.startswith("sample_train"):
            check_training(settings, words)
        lock, seconds = make_run_folder(settings)
    except UserError as error:
        fail(str(error), driver)
    print(json.dumps(asdict(settings)))
    on_cpu = settings.GPUS == 0 and not settings.DRY_RUN
    print(settings.RUN_DIR, lock, seconds, on_cpu and machine.python_of("cpu") or "", settings.ITERS, sep="\n")
    print(show(settings.SEEDS), show(settings.SAMPLERS), sep="\n")


if __name__ == "__main__":
    main()
