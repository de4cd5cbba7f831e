"""Where a run is: every stage that the drivers start has its place in the whole, and the minutes add up."""

import re

import pytest
from commands import alone, ends_in_one_line
from plans import plan

from scripts import progress
from scripts.resolve import resolve

QUICKSTART = [
    "scripts/quickstart_assets.sh",
    "sample_train_safe_rlhf.sh",
    "sample_eval_safe_rlhf.sh",
    "sample_kl.sh",
]


def numbers(line: str) -> list[int]:
    """Return place, stages, minutes so far and minutes in all of a line."""
    return [int(n) for n in re.fullmatch(r"\[(\d+)/(\d+)\] .+, (\d+) of about (\d+) minutes", line).groups()]


@pytest.mark.parametrize(
    "given",
    [
        {"SAMPLERS": "online mixp", "ITERS": 2, "SCORE_KL": True},
        {"SAMPLERS": "gshf", "ITERS": 3, "SCORE_KL": True},
        {"ITERS": 1, "SCORE_KL": True},
    ],
)
def test_the_plan_is_what_the_drivers_run(given, tmp_path):
    given = given | {"RECIPE": "quickstart", "RUN_DIR": tmp_path}
    started = list(dict.fromkeys(stage for driver in QUICKSTART for stage, _ in plan(driver, **given)))
    s = resolve([f"{name}={value}" for name, value in given.items()])
    # A stage of several commands is a line for each; those of training have one per sampler.
    expected = []
    for stage in progress.plan(s):
        kind, *rest = stage.split()
        expected += [f"train {rest[0]} {sampler}" for sampler in rest[1:]] if kind == "train" else [stage]
    assert list(dict.fromkeys(expected)) == started


def test_minutes_and_place_through_a_run(tmp_path):
    words = f"RECIPE=quickstart ITERS=2 RUN_DIR={tmp_path} BF16=True REWARD_DTYPE=bfloat16".split()
    s = resolve(["SAMPLERS=online mixp", *words])
    stages = progress.plan(s)
    assert progress.line(s, "compare_seeds") is None  # belongs to no single run
    places, expected = [], round(sum(progress.expected(s, stage) for stage in stages) / 60)
    for stage in stages:  # twice as long as the reference machine
        place, count, before, whole = numbers(progress.line(s, stage))
        assert count == len(stages) and before <= whole and expected <= whole <= 2 * expected + 1
        places.append(place)
        with open(tmp_path / "stage_seconds.tsv", "a") as file:
            file.write(f"{stage}\t{2 * progress.expected(s, stage)}\n")
    assert places == list(range(1, len(stages) + 1))
    # Started again: nothing is left, and what is done takes a second each.
    _, _, before, whole = numbers(progress.line(s, stages[0]))
    assert before == whole == pytest.approx(2 * expected, abs=1)


def test_what_waits_for_matrices_takes_twice_as_long_at_half_the_speed(tmp_path):
    s = resolve(["RECIPE=quickstart", f"RUN_DIR={tmp_path}", "BF16=True", "REWARD_DTYPE=bfloat16"])
    stages = progress.plan(s)
    matrices = sum(progress.units(s, stage) * progress.SECONDS.get(stage.split()[0], [0])[-1] for stage in stages)
    _, whole = progress.minutes(s, stages, 0)
    progress.speed_file(s).write_text('{"float32": 0.5, "bfloat16": 0.5}')
    assert progress.minutes(s, stages, 0)[1] == pytest.approx(whole + matrices / 60)
    for torn in ("", "2", '{"float32": 0.5}', '{"float32": null, "bfloat16": 1}'):
        progress.speed_file(s).write_text(torn)
        assert progress.minutes(s, stages, 0)[1] == whole


@pytest.mark.parametrize(
    ("dtype", "kinds"), [("bfloat16", {"train", "annotate", "reward_models"}), ("float32", {"kl"})]
)
def test_only_what_multiplies_in_a_type_gains_from_its_speed(dtype, kinds, tmp_path):
    s = resolve(["RECIPE=quickstart", f"RUN_DIR={tmp_path}", "BF16=True", "REWARD_DTYPE=bfloat16"])
    fast = {"float32": 1.0, "bfloat16": 1.0} | {dtype: 7.0}
    gains = {n for n in progress.plan(s) if progress.expected(s, n, fast) < progress.expected(s, n)}
    assert {stage.split()[0] for stage in gains} - {"annotate_evaluation"} == kinds


def test_speed_is_measured():
    found = progress.machine_speed(seconds=0.01)
    assert found.keys() == progress.REFERENCE_SPEED.keys() and min(found.values()) > 0


def test_wrong_settings_of_the_quickstart_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    for word, named in (("SAMPLERS=mixq", "mixq"), (f"RUN_DIR={tmp_path}/file/run", f"{tmp_path}/file/run")):
        ends_in_one_line(alone("scripts/progress.py", word), named)


def test_every_recipe_has_lines(tmp_path):
    for recipe in ("safe_rlhf", "iterative_prompt", "published", "ablation"):
        s = resolve([f"RECIPE={recipe}", f"RUN_DIR={tmp_path}", "DRY_RUN=1"])
        assert all(progress.line(s, stage) for stage in progress.plan(s))
