"""What a run folder holds for evaluation: reading it, and refusing what cannot be compared."""

import json
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from common.record_stream import read_records
from common.records import read_json
from scripts import names

JUDGES = {"rewards": "training reward model", "judge": "second judge"}
PARTS = (*names.PROMPTS, "kl_prompts")
TEST, TRAIN, KL = PARTS
# What differs between models, or seeds, that are compared.
APART = {"policy", "reference", "weights", "tokenizer", "dataset_sha256", "model_name_or_path", "responses_sha256"}
# The same for responses: a model samples in its own type, which on a GPU is that of its weights.
APART_IN_SAMPLING = APART | {"dtype"}


class Model(NamedTuple):
    """The base model, the shared first iteration, a sampler's later iteration, or a given checkpoint (None)."""

    label: str
    iteration: int | None

    @property
    def title(self) -> str:
        """Its name in tables."""
        if self.iteration is None:
            return self.label
        return {BASE: "base model", FIRST: "iteration 1 (shared)"}.get(
            self, f"{self.label}, iteration {self.iteration}"
        )

    @property
    def short(self) -> str:
        """Its name in figures."""
        if self.iteration is None:
            return self.label
        return {BASE: "base", FIRST: "iteration 1"}.get(self, f"{self.label} {self.iteration}")


BASE, FIRST = Model("base", 0), Model("shared", 1)


def scored_file(run_dir: Path, judge: str, part: str, model: Model) -> Path:
    """Return the file of a model's responses to the prompts `part` (one of PARTS) with the scores of `judge`."""
    return names.evaluation(run_dir, part, model.iteration, model.label, judge)


def kl_file(run_dir: Path, model: Model) -> Path:
    """Return the file of a model's KL."""
    return names.kl(run_dir, model.iteration, model.label)


def trajectory(sampler: str, iterations: int) -> list[Model]:
    """Return a sampler's models, the shared ones first."""
    return [Model(label, n) for n, label in names.models([sampler], iterations)]


def all_models(samplers: list[str], iterations: int, given: list[str] = ()) -> list[Model]:
    """Return every model in the order of the tables: the base model, each sampler's, given checkpoints."""
    later = [m for sampler in samplers for m in trajectory(sampler, iterations)]
    return list(dict.fromkeys([BASE, *later, *(Model(name, None) for name in given)]))


def checked_names(flag: str, labels: list[str]) -> list[str]:
    """Return the names, each once. Raise `UserError` for one that could lead out of the run folder."""
    for label in labels:
        if "/" in label:
            raise UserError(f"{flag} {label}: a name becomes part of file names and cannot hold '/'")
    return list(dict.fromkeys(labels))


class Answers:
    """A model's K responses per prompt as one judge scored them: arrays are [N, K], lists have N entries."""

    def __init__(self, instances: list[dict]) -> None:
        self.prompts = [i["prompt"] for i in instances]
        self.questions = [question(i) for i in instances]
        self.responses = [i["responses"] for i in instances]
        self.scores = np.array([i["rewards"] for i in instances], dtype=float)
        self.tokens = np.array([i["num_tokens"] for i in instances], dtype=float)
        self.cut = np.array([[why == "length" for why in i["stop_reasons"]] for i in instances])

    @cached_property
    def rewards(self) -> np.ndarray:
        """Mean over the responses of a prompt, [N]."""
        return self.scores.mean(axis=1)

    @cached_property
    def texts(self) -> list[str]:
        """All responses in one list."""
        return [text for responses in self.responses for text in responses]


def question(instance: dict) -> str:
    """Return what a person asked: the prompt without its template, where the file has that."""
    messages = instance.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", instance["prompt"]))
    return str(instance.get("raw_prompt") or instance["prompt"])


class Run(NamedTuple):
    """Everything that is there: (judge, part, model) → answers, model → KL result, what made them."""

    answers: dict[tuple[str, str, Model], Answers]
    kl: dict[Model, dict]
    settings: dict[str, dict]

    def test(self, model: Model, judge: str = "rewards") -> Answers | None:
        """Return the answers to the test prompts; None where there are none."""
        return self.answers.get((judge, TEST, model))


def read_run(run_dir: Path, models: list[Model]) -> Run:
    """Return the run's evaluation. Raise `UserError` for broken files, and where two files cannot be compared."""
    answers, made = {}, {}
    for key in [(judge, part, model) for judge in JUDGES for part in PARTS for model in models]:
        path = scored_file(run_dir, *key)
        if path.exists():
            instances, made[key] = read_records(path, ("responses", "rewards", "stop_reasons", "num_tokens"))
            answers[key] = Answers(instances)
    settings = agreed_settings(run_dir, made)
    check_same_responses(run_dir, answers)
    kl, settings["KL"] = read_kl(run_dir, models)
    if measured_on_test_prompts(kl, made):
        answers |= {("rewards", KL, model): answers["rewards", TEST, model] for model in (BASE, *kl)}
        made |= {("rewards", KL, model): made["rewards", TEST, model] for model in (BASE, *kl)}
    for model, result in kl.items():
        if ("rewards", KL, model) in answers:
            check_same_policy(run_dir, model, result, made["rewards", KL, model])
    if not answers and not kl:
        raise UserError(f"{run_dir}: nothing to summarize yet: no eval/*_prompts/*.json, no results/kl_*.json")
    return Run(answers, kl, {name: value for name, value in settings.items() if value})


def agreed_settings(run_dir: Path, made: dict[tuple, dict]) -> dict[str, dict]:
    """Return the settings that the files share. Raise `UserError` where they differ in more than their model."""
    found = {}
    for part in PARTS:
        sources = {scored_file(run_dir, *key): s.get("generate") or {} for key, s in made.items() if key[1] == part}
        found[f"responses to {part.replace('_', ' ')}"] = agreed(sources, APART_IN_SAMPLING)
    for judge, name in JUDGES.items():
        sources = {scored_file(run_dir, *key): s.get("annotate") or {} for key, s in made.items() if key[0] == judge}
        found[f"scores by the {name}"] = agreed(sources)
    return found


def agreed(sources: dict[Path, dict], apart: set[str] = APART) -> dict:
    """Return the settings that all files have, without the keys `apart`. Raise `UserError` if another differs."""
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
    """Raise `UserError` unless all models answer the same prompts and the judge scored the same responses."""
    first = {}
    for (judge, part, model), found in answers.items():
        path = scored_file(run_dir, judge, part, model)
        other = first.setdefault(part, (path, found))
        if found.prompts != other[1].prompts:
            raise UserError(f"{path}: its prompts are not those of {other[0]}: they cannot be compared")
        scored = answers.get(("rewards", part, model))
        if scored is not None and scored.responses != found.responses:
            raise UserError(f"{path}: the judge scored other responses than the reward model did; score them again")


def measured_on_test_prompts(kl: dict[Model, dict], made: dict[tuple, dict]) -> bool:
    """Return whether every model's KL is of its responses to the test prompts, which then serve reward and KL."""
    if not kl or any(("rewards", TEST, model) not in made for model in (BASE, *kl)):
        return False
    pairs = [(responses_of(result), scored_responses(made["rewards", TEST, model])) for model, result in kl.items()]
    return all(measured == scored and measured for measured, scored in pairs)


def responses_of(result: dict) -> str | None:
    """Return the hash of the responses that a KL was measured on; None where it sampled its own."""
    return result["settings"].get("kl", {}).get("responses_sha256")


def scored_responses(settings: dict) -> str | None:
    """Return the hash of the responses that a scored file holds."""
    return (settings.get("annotate") or {}).get("dataset_sha256")


def check_same_policy(run_dir: Path, model: Model, result: dict, made: dict) -> None:
    """Raise `UserError` unless the KL was measured on the responses that `kl_prompts` holds with rewards."""
    if responses_of(result) != scored_responses(made):
        raise UserError(
            f"{kl_file(run_dir, model)}: not measured on the responses of "
            f"{scored_file(run_dir, 'rewards', KL, model)}: measure it again with --responses"
        )


def read_kl(run_dir: Path, models: list[Model]) -> tuple[dict[Model, dict], dict]:
    """Return each model's KL result, where it has one, and their shared settings."""
    results = {model: checked_kl(path) for model in models if (path := kl_file(run_dir, model)).exists()}
    if not of_same_prompts(list(results.values())):
        raise UserError(f"{run_dir}/results: the models' KL is of different prompts: they cannot be compared")
    made = {kl_file(run_dir, model): result["settings"].get("kl", {}) for model, result in results.items()}
    return results, agreed(made, APART_IN_SAMPLING)


def of_same_prompts(results: list[dict]) -> bool:
    """Return whether KL results are of the same prompts, as far as they say."""
    counts = {len(result["kl_of_prompts"]) for result in results}
    return len(counts) < 2 and len({json.dumps(result["prompts"]) for result in results if "prompts" in result}) < 2


def checked_kl(path: Path) -> dict:
    """Return the content of a KL file. Raise `UserError` if it is not one."""
    result = read_json(path)
    result = {"settings": {}, "stderr": None, **result} if isinstance(result, dict) else {}
    stages, values = result.get("settings"), result.get("kl_of_prompts")
    if not isinstance(stages, dict) or not isinstance(stages.get("kl", {}), dict):
        raise UserError(f"{path}: 'settings' is not an object that holds one object per stage")
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: not a result of get_kl.py: no list 'kl_of_prompts'")
    numbers = [
        *values,
        result.get("kl"),
        *(v for v in (result["stderr"], result.get("kl_per_token")) if v is not None),
    ]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise UserError(f"{path}: a KL, 'stderr' or 'kl_of_prompts' holds a value that is not a finite number")
    return result
