"""From command line to checked settings: every complaint is one line, made before anything is computed or written."""

import argparse
import hashlib
import math
import sys
from collections.abc import Callable

import numpy as np

from bandit import presets
from bandit.problem import draw_rewards, logsumexp
from bandit.samplers import SAMPLERS, get_sampler
from bandit.steps import RULES
from bandit.theory import BOUNDS


class BadInput(ValueError):
    """A wrong setting; the message says what and where."""


class OneLineParser(argparse.ArgumentParser):
    """Ends with exit code 2 and exactly one line on a wrong argument; the usage is in --help."""

    def error(self, message: str) -> None:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` on."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text!r}")
        return int(text)

    return convert


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, got {text!r}")
    return value


def _lr(text: str) -> float | str:
    if text in RULES:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor matched nor theory") from None


def make_parser(description: str) -> OneLineParser:
    """All flags; None means: as the preset has it."""
    table = "\n".join(f"  {name:19} {row.about}" for name, row in SAMPLERS.items())
    parser = OneLineParser(
        prog="tabular.py",
        description=description,
        epilog=f"samplers:\n{table}\n  {'mix_A_B_P':19} with probability P one arm from pi^(1+A) pi_ref^-A, "
        "the other from pi^(1-B) pi_ref^B, else online\n\n"
        "numpy on the CPU; there is no --device: the updates are too short for a GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=presets.NAMES, help="settings that other flags override (default: paper-exact, or "
        "paper-empirical with --mode empirical or both)")  # fmt: skip
    add("--mode", choices=list(presets.MODES), help="exact or sampled gradients (default exact)")
    add("--samplers", nargs="+", metavar="NAME", help="rows of the table below (default: the paper's three)")
    add("--rewards", metavar="FILE.npy", help="rewards, shape [|Y|] or [envs, |Y|] (default: drawn)")
    add("--reward_dist", choices=["normal", "uniform"], help="N(0,1) or U[0,1] where drawn (default normal)")
    add("--ref_logprobs", metavar="FILE.npy", help="log-probabilities of the reference policy, shape [|Y|] or "
        "[envs, |Y|] (default uniform)")  # fmt: skip
    add(
        "--num_actions",
        type=int,
        metavar="N",
        help="|Y|, number of arms where rewards are drawn (default 20)",
    )
    add("--num_envs", type=int, metavar="E", help="number of reward vectors drawn (default 1)")
    add("--beta", type=float, help="KL strength, in units of reward (default 3)")
    add("--lr", type=_lr, metavar="X|matched|theory", help="step on the loss whose pair weights sum to 1: a number "
        "(default 10; sampled 0.05), matched: lr* = Z/(2 beta^2 |Y|), Z the sum of the unnormalised weights at the "
        "current policy; theory: alpha/(beta^2 |Y|), alpha = 2|Y|^2 for DPO-Unif, Z/2 for the mixtures")  # fmt: skip
    add(
        "--num_iter",
        type=int,
        metavar="T",
        help="length of the series: the states after 0 ... T - 1 updates (default 100; sampled 3000)",
    )
    add(
        "--num_samples",
        type=int,
        metavar="N",
        help="labelled pairs per update, sampled gradients (default 8192)",
    )
    add("--seed", type=int, help="seed of rewards and samples, which are independent streams (default 1)")
    add(
        "--dtype",
        choices=["float64", "float32"],
        help="of the iteration; results are float64 (default float64)",
    )
    add(
        "--output_dir",
        metavar="DIR",
        help="default bandit/results/<preset>, plus a hash where flags override it",
    )
    add("--overwrite", action="store_true", help="replace results of other settings in DIR (default: refuse)")
    add("--theory", action="store_true", help="draw the predicted noise floor (sampled, lr a number) and, with "
        "--lr theory, the theorems' bounds on max |delta| into the parameter figure")  # fmt: skip
    return parser


def resolve(arguments: argparse.Namespace) -> dict[str, dict]:
    """Settings of every run that the arguments ask for: preset name -> settings, checked.

    Raises:
        BadInput: a setting is wrong.
    """
    given = {key: value for key, value in vars(arguments).items() if key in presets.PRESETS["paper-exact"]}
    given = {key: value for key, value in given.items() if value is not None}
    preset = arguments.preset or ("paper-exact" if given.get("mode", "exact") == "exact" else "paper-empirical")
    if preset in presets.GROUPS and "mode" in given:
        raise BadInput(f"argument --mode: --preset {preset} sets it")
    if preset == "theory":
        _check_theory_flags(given)
    runs = {name: {**presets.PRESETS[name], **given} for name in presets.GROUPS.get(preset, [preset])}
    for settings in runs.values():
        if settings["rewards"] is not None:
            _take_rewards_file(settings, given)
        check(settings)
    return runs


def _check_theory_flags(given: dict) -> None:
    allowed = {"samplers", "num_actions", "num_envs", "num_iter", "beta", "seed"}
    for key in given:
        if key not in allowed:
            raise BadInput(f"argument --{key}: --preset theory sets it")
    if given.get("num_iter", 2) < 2:
        raise BadInput("argument --num_iter: the bounds are checked after updates, of which 2 states have the first")
    if "num_actions" in given:
        given["num_actions"] = [given["num_actions"]]
    for name in given.get("samplers", []):
        if name not in BOUNDS:
            raise BadInput(f"argument --samplers: no theorem covers {name!r}; covered: {', '.join(BOUNDS)}")


def _take_rewards_file(settings: dict, given: dict) -> None:
    """The file fixes shape and distribution; flags that contradict it are an error."""
    rewards = load_rewards(settings["rewards"])
    for key, value in zip(("num_envs", "num_actions"), rewards.shape, strict=True):
        if given.get(key, value) != value:
            raise BadInput(f"argument --{key}: {given[key]}, but {settings['rewards']} has {value}")
        settings[key] = value
    if "reward_dist" in given:
        raise BadInput("argument --reward_dist: not allowed with --rewards")
    settings["reward_dist"] = None
    settings["rewards_sha256"] = hashlib.sha256(rewards.tobytes()).hexdigest()


def check(settings: dict) -> None:
    """Raises BadInput on the first setting that is out of range."""
    for key in ("beta", "lr"):
        value = settings[key]
        if not isinstance(value, str) and not (math.isfinite(value) and value > 0):
            raise BadInput(f"argument --{key}: must be a finite number > 0, got {value}")
    sizes = settings["num_actions"] if isinstance(settings["num_actions"], list) else [settings["num_actions"]]
    lowest = {"num_envs": 1, "num_iter": 1, "num_samples": 1, "seed": 0}
    for key, value, least in [(k, settings[k], v) for k, v in lowest.items()] + [
        ("num_actions", n, 2) for n in sizes
    ]:
        if value < least:
            raise BadInput(f"argument --{key}: must be at least {least}, got {value}")
    settings["samplers"] = list(dict.fromkeys(settings["samplers"]))
    for name in settings["samplers"]:
        try:
            sampler = get_sampler(name)
        except ValueError as error:
            raise BadInput(f"argument --samplers: {error}") from None
        if settings["lr"] == "theory" and sampler.alpha is None:
            raise BadInput(f"argument --lr: no theorem covers {name!r}; theory covers {', '.join(BOUNDS)}")


def _load(flag: str, path: str) -> np.ndarray:
    """Float64 array [envs or 1, |Y|] from a .npy file."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .npy file of numbers"
        raise BadInput(f"argument --{flag}: {path}: {reason}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise BadInput(f"argument --{flag}: {path}: not a .npy file of real numbers")
    if array.ndim not in (1, 2) or array.shape[-1] < 2 or array.shape[0] < 1:
        raise BadInput(f"argument --{flag}: {path}: shape {array.shape}, expected [|Y|] or [envs, |Y|] with |Y| >= 2")
    array = np.atleast_2d(array.astype(np.float64))
    if not np.isfinite(array).all():
        raise BadInput(f"argument --{flag}: {path}: holds NaN or infinite values")
    return array


def load_rewards(path: str) -> np.ndarray:
    """Rewards [envs, |Y|], float64, finite."""
    return _load("rewards", path)


def load_arrays(settings: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Rewards [envs, |Y|] and reference log-probabilities [1 or envs, |Y|] (None: uniform).

    Raises:
        BadInput: a file is missing, malformed, or does not fit.
    """
    envs, actions = settings["num_envs"], settings["num_actions"]
    if settings["rewards"] is not None:
        rewards = load_rewards(settings["rewards"])
    else:
        rewards = draw_rewards(settings["reward_dist"], envs, actions, settings["seed"])
    path = settings["ref_logprobs"]
    if path is None:
        return rewards, None
    log_ref = _load("ref_logprobs", path)
    if log_ref.shape not in ((1, actions), (envs, actions)):
        raise BadInput(f"argument --ref_logprobs: {path}: shape {log_ref.shape} does not fit {(envs, actions)}")
    if np.abs(logsumexp(log_ref)).max() > 1e-6:
        raise BadInput(f"argument --ref_logprobs: {path}: probabilities do not sum to 1")
    settings["ref_logprobs_sha256"] = hashlib.sha256(log_ref.tobytes()).hexdigest()
    return rewards, log_ref
