"""How far a run is, and how long it takes on this machine.

    python alignment/scripts/progress.py SAMPLERS="online mixp" ITERS=2

Reads   settings as the drivers take them; measures, for two seconds, how fast this machine multiplies matrices.
Writes  one line with the minutes that the quickstart will take; RUN_DIR/machine_speed.json, which later lines use.
"""

import contextlib
import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

ALIGNMENT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ALIGNMENT.parent), str(ALIGNMENT)]

from bandit.mixtures import get_mixture
from common.cli import run
from common.records import writing
from scripts.settings import Settings, show

# The reference machine: an AMD EPYC with 2 cores that multiplies bfloat16 itself. Operations per second in products
# of 2048 x 2048 matrices (benchmarks/results/amd-epyc-model-17-2-cores.md).
REFERENCE_SPEED = {"float32": 180e9, "bfloat16": 405e9}
AS_REFERENCE = dict.fromkeys(REFERENCE_SPEED, 1.0)
# The quickstart's seconds on it: to start a stage, and per unit of its work. Of these the first do not depend on how
# fast matrices are multiplied (Python importing, small matrices, memory), the others do.
SECONDS = {
    "unpack": (22, 0, 0),
    "reward_models": (16, 0, 54),
    "generate": (11, 0.0040, 0),
    "annotate": (1, 0, 0.006),
    "train": (10, 0.20, 0.12),
    "evaluate": (10, 0.0035, 0),
    "annotate_evaluation": (3, 0, 0.025),
    "kl_responses": (2, 0, 0),
    "kl": (8, 0, 0.0103),
    "summarize": (2, 0, 0),
}
# Stages whose last number is that in bfloat16 → the setting that says whether it is.
IN_BFLOAT16 = {"train": "BF16"} | dict.fromkeys(("reward_models", "annotate", "annotate_evaluation"), "REWARD_DTYPE")


def plan(s: Settings) -> list[str]:
    """Return the stages of a whole run in order, as the drivers name them: assets, training, evaluation, KL."""
    samplers = " ".join(s.SAMPLERS)
    found = in_driver("scripts/quickstart_assets.sh") if s.RECIPE == "quickstart" else []
    for n in range(1, 0 if s.MODELS else s.ITERS + 1):
        found += [f"{stage} {n} {samplers if n > 1 else 'online'}" for stage in ("generate", "annotate", "train")]
    return found + in_driver("sample_eval_safe_rlhf.sh") + in_driver("sample_kl.sh")


def in_driver(file: str) -> list[str]:
    """Return the stages of a driver that has no loop."""
    return re.findall(r"^stage (\w+)", (ALIGNMENT / file).read_text(), re.MULTILINE)


def units(s: Settings, stage: str) -> float:
    """Return the size of a stage's work: tokens to sample, responses to score, pairs; 1 where it never changes."""
    kind, *rest = stage.split()
    models = len(s.MODELS) + 1 if s.MODELS else 2 + (s.ITERS - 1) * len(s.SAMPLERS)
    prompts = s.TRAIN_END - s.TRAIN_START
    responses = sum(s.K or (2 if name in s.PAIRS else get_mixture(name).candidates) for name in rest[1:]) * prompts
    tests = s.TEST_END - s.TEST_START
    of_evaluation = s.SCORE_KL and s.kl_part == "test_prompts"
    answers = models * s.EVAL_K * (tests + s.EVAL_TRAIN_END - s.TRAIN_START)
    return {
        "reward_models": 1,
        "generate": responses * s.MAX_NEW_TOKENS,
        "annotate": responses,
        "train": prompts * s.EPOCHS * len(rest[1:]),
        "evaluate": answers * s.MAX_NEW_TOKENS,
        "annotate_evaluation": answers,
        "kl": (models - 1) * (tests if of_evaluation else min(tests, s.KL_PROMPTS)) * s.MAX_NEW_TOKENS,
    }.get(kind, 0)


def expected(s: Settings, stage: str, speed: dict[str, float] = AS_REFERENCE) -> float:
    """Return the seconds that a stage takes on a machine of this `speed` (see `machine_speed`)."""
    kind, dtype = stage.split()[0], "float32"
    to_start, other, matrices = SECONDS.get(kind, (0, 0, 0))
    if kind in IN_BFLOAT16:
        dtype = "bfloat16" if getattr(s, IN_BFLOAT16[kind]) in ("True", "bfloat16") else "float32"
        matrices *= REFERENCE_SPEED["bfloat16"] / REFERENCE_SPEED[dtype]
    return to_start + units(s, stage) * (other + matrices / speed[dtype])


def speed_file(s: Settings) -> Path:
    """Return the file that holds what `machine_speed` found."""
    return Path(s.RUN_DIR, "machine_speed.json")


def speed_of(s: Settings) -> dict[str, float]:
    """Return what `machine_speed` found when the run began; the reference machine's where nobody asked it."""
    try:
        found = json.loads(speed_file(s).read_text())
        return {dtype: max(0.01, float(found[dtype])) for dtype in REFERENCE_SPEED}
    except (OSError, ValueError, TypeError, KeyError):
        return AS_REFERENCE


def spent(s: Settings) -> dict[str, float]:
    """Return stage -> seconds, over all starts of the run, of the stages that ended."""
    took = defaultdict(float)
    with contextlib.suppress(OSError, ValueError):
        for row in Path(s.RUN_DIR, "stage_seconds.tsv").read_text().splitlines():
            stage, seconds = row.split("\t")
            took[stage] += float(seconds)
    return took


def minutes(s: Settings, stages: list[str], index: int) -> tuple[float, float]:
    """Return the minutes that the run had taken before its stage `index`, and about how many it takes in all."""
    took, speed = spent(s), speed_of(s)
    # What the stages before took is the better guide, once there are minutes of it.
    done = {stage for stage in stages[:index] if stage in took}
    weight = 300
    planned = sum(expected(s, stage, speed) for stage in done)
    slower = (sum(took[stage] for stage in done) + weight) / (planned + weight)
    before = sum(took[stage] for stage in set(stages) & took.keys())
    left = sum(expected(s, stage, speed) for stage in stages if stage not in took)
    return before / 60, (before + slower * left) / 60


def line(s: Settings, stage: str) -> str | None:
    """Return where a stage is in the whole run, as "[6/19] train 1 online, 2 of about 15 minutes"."""
    stages, took = plan(s), spent(s)
    places = [i for i, name in enumerate(stages) if name == stage]
    if not places:
        return None
    # A stage that comes twice (summarize): the last place that the run has come to.
    index = next((i for i in reversed(places) if i and stages[i - 1] in took), places[0])
    before, whole = minutes(s, stages, index)
    about = f"{before:.0f} minutes so far" if s.GPUS else f"{before:.0f} of about {whole:.0f} minutes"
    return f"[{index + 1}/{len(stages)}] {stage}, {about}"


def machine_speed(seconds: float = 1.0) -> dict[str, float]:
    """Return how many times the reference machine's speed this one has, by type: products of matrices, all cores.

    Args:
        seconds: to measure each type.
    """
    import torch

    size, found = 2048, {}
    for dtype, reference in REFERENCE_SPEED.items():
        a = torch.ones(size, size, dtype=getattr(torch, dtype))
        a @ a  # the first product sets things up
        began, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - began < seconds:
            a @ a
            count += 1
        found[dtype] = round(2 * size**3 * count / (time.perf_counter() - began) / reference, 2)
    return found


def main() -> None:
    from scripts.resolve import check, resolve

    s = resolve(["RECIPE=quickstart", *sys.argv[1:]])
    check(s, "sample_train_safe_rlhf.sh")
    speed = machine_speed()
    with writing(s.RUN_DIR):
        Path(s.RUN_DIR).mkdir(parents=True, exist_ok=True)
        speed_file(s).write_text(json.dumps(speed) + "\n")
    before, whole = minutes(s, plan(s), 0)
    so_far = f", of which {before:.0f} are done" if before >= 1 else ""
    print(
        f"quickstart: about {whole:.0f} minutes after set-up{so_far}, for SAMPLERS={show(s.SAMPLERS)!r} "
        f"ITERS={s.ITERS}; this machine multiplies float32 at {speed['float32']:.1f} and bfloat16 at "
        f"{speed['bfloat16']:.1f} times the reference machine's speed"
    )


if __name__ == "__main__":
    run(main)
