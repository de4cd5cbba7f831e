"""What a run folder holds for evaluation: file names, reading, and refusing what cannot be compared."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from common.records import read_json, read_records

# Names inside RUN_DIR; alignment/scripts/names.sh is their other end.
JUDGES = {"reward": "rewards", "judge": "judge"}
PARTS = {"test": 0, "train": 1}


class Model(NamedTuple):
    """A model of the run: the base model, the shared first iteration, or a sampler's later iteration."""

    label: str
    iteration: int

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        if self.iteration < 2:
            return ("base model", "iteration 1 (shared)")[self.iteration]
        return f"{self.label}, iteration {self.iteration}"


BASE, FIRST = Model("base", 0), Model("iter1", 1)


def answers_file(run_dir: Path, judge: str, part: str, model: Model) -> Path:
    """Scored responses of a model."""
    return run_dir / "data" / f"test_data_with_{JUDGES[judge]}_iter{PARTS[part]}_{model.label}_{model.iteration}.json"


def kl_file(run_dir: Path, model: Model) -> Path:
    """Result of get_kl.py for a model."""
    return run_dir / "results" / f"kl_{model.label}_{model.iteration}.json"


def trajectory(sampler: str, iterations: int) -> list[Model]:
    """A sampler's models, the shared ones first."""
    return [BASE, FIRST, *(Model(sampler, n) for n in range(2, iterations + 1))]


def all_models(samplers: list[str], iterations: int) -> list[Model]:
    """Every model of the run, in the order of the table."""
    return list(dict.fromkeys(m for sampler in samplers for m in trajectory(sampler, iterations)))


def checked_samplers(names: list[str]) -> list[str]:
    """The names, each once. Raises `UserError` for one that could lead out of the run folder."""
    for name in names:
        if "/" in name:
            raise UserError(f"--samplers {name}: a name becomes part of file names and cannot hold '/'")
    return list(dict.fromkeys(names))


class Answers(NamedTuple):
    """A model's responses to the prompts of a part, as one judge scored them; all lists have one entry a prompt."""

    prompts: list[str]
    responses: list[list[str]]
    rewards: np.ndarray  # mean over the prompt's responses
    tokens: np.ndarray
    cut: np.ndarray  # share of responses that ended at the length limit


class Run(NamedTuple):
    """Everything that is there: (judge, part, model) → answers, model → KL result, what made them."""

    answers: dict[tuple[str, str, Model], Answers]
    kl: dict[Model, dict]
    settings: dict[str, dict]


def read_run(run_dir: Path, models: list[Model]) -> Run:
    """The run's evaluation. Raises `UserError` for broken files, and where two files cannot be compared."""
    answers, made = {}, {}
    for judge in JUDGES:
        for part in PARTS:
            for model in models:
                path = answers_file(run_dir, judge, part, model)
                if path.exists():
                    answers[judge, part, model], made[path] = read_answers(path)
    settings = agreed_settings(run_dir, models, made)
    check_same_responses(run_dir, answers)
    kl, settings["kl"] = read_kl(run_dir, models)
    if not answers and not kl:
        raise UserError(f"{run_dir}: nothing to summarize yet: no data/test_data_with_*.json, no results/kl_*.json")
    return Run(answers, kl, {name: value for name, value in settings.items() if value})


def read_answers(path: Path) -> tuple[Answers, dict]:
    """A scored data file and its settings."""
    instances, settings = read_records(path, ("responses", "rewards", "stop_reasons", "num_tokens"))
    mean = lambda key: np.array([np.mean(instance[key]) for instance in instances])  # noqa: E731
    cut = np.array([np.mean([why == "length" for why in i["stop_reasons"]]) for i in instances])
    prompts, responses = [i["prompt"] for i in instances], [i["responses"] for i in instances]
    return Answers(prompts, responses, mean("rewards"), mean("num_tokens"), cut), settings


def agreed_settings(run_dir: Path, models: list[Model], made: dict[Path, dict]) -> dict[str, dict]:
    """The settings that the files share, without what differs by design. Raises `UserError` where others differ."""
    found = {}
    for part in PARTS:
        paths = [answers_file(run_dir, judge, part, model) for judge in JUDGES for model in models]
        sources = {path: made[path].get("generate") or {} for path in paths if path in made}
        found[f"responses to {part} prompts"] = agreed(sources, ("policy", "reference"))
    for judge in JUDGES:
        paths = [answers_file(run_dir, judge, part, model) for part in PARTS for model in models]
        sources = {path: made[path].get("annotate") or {} for path in paths if path in made}
        found[f"scores by the {judge} model"] = agreed(sources, ("dataset_sha256",))
    return found


def agreed(sources: dict[Path, dict], apart: tuple[str, ...]) -> dict:
    """The settings that all files have, except the keys `apart`. Raises `UserError` naming the first that differs."""
    shared, first = None, None
    for path, settings in sources.items():
        settings = {key: value for key, value in settings.items() if key not in apart}
        if shared is None:
            shared, first = settings, path
        for key in {**shared, **settings}:
            if shared.get(key) != settings.get(key):
                raise UserError(
                    f"{path}: made with {key}={settings.get(key)!r}, but {first} with {key}={shared.get(key)!r}: "
                    "they cannot be compared"
                )
    return shared or {}


def check_same_responses(run_dir: Path, answers: dict[tuple[str, str, Model], Answers]) -> None:
    """Raises `UserError` unless all models answer the same prompts and the judge scored the same responses."""
    first = {}
    for (judge, part, model), found in answers.items():
        path = answers_file(run_dir, judge, part, model)
        other = first.setdefault(part, (path, found))
        if found.prompts != other[1].prompts:
            raise UserError(f"{path}: its prompts are not those of {other[0]}: they cannot be compared")
        scored = answers.get(("reward", part, model))
        if scored is not None and scored.responses != found.responses:
            raise UserError(f"{path}: the judge scored other responses than the reward model did; score them again")


def read_kl(run_dir: Path, models: list[Model]) -> tuple[dict[Model, dict], dict]:
    """KL results, one a model that has one, and their shared settings."""
    results, made = {}, {}
    for model in models:
        path = kl_file(run_dir, model)
        if path.exists():
            results[model] = checked_kl(path)
            made[path] = results[model]["settings"].get("kl", {})
    counts = {len(result["kl_of_prompts"]) for result in results.values()}
    if len(counts) > 1:
        raise UserError(f"{run_dir}/results: KL over {sorted(counts)} prompts: they cannot be compared")
    return results, agreed(made, ("model_name_or_path",))


def checked_kl(path: Path) -> dict:
    """The content of a KL file. Raises `UserError` if it is not one."""
    result = read_json(path)
    result = {"settings": {}, "stderr": None, **result} if isinstance(result, dict) else {}
    stages, values = result.get("settings"), result.get("kl_of_prompts")
    if not isinstance(stages, dict) or not isinstance(stages.get("kl", {}), dict):
        raise UserError(f"{path}: 'settings' is not an object that holds one object a stage")
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: not a result of get_kl.py: no list 'kl_of_prompts'")
    stderr = [] if result["stderr"] is None else [result["stderr"]]
    if not all(
        type(value) in (int, float) and math.isfinite(value) for value in (*values, result.get("kl"), *stderr)
    ):
        raise UserError(f"{path}: 'kl', 'stderr' or 'kl_of_prompts' holds a value that is not a finite number")
    return result
