"""The one place that builds names inside a run folder; imported by stages.py, which writes, and by evaluation/.

    data/gen_data_iter{n}_{sampler}.json           responses of iteration n, to be trained on
    data/data_with_rewards_iter{n}_{sampler}.json  the same with rewards
    models/rlhflow_iter1                           iteration 1, which all samplers share
    models/rlhflow_iter{n}_{sampler}               the later ones
    eval/{prompts}/{label}_iter{n}.json            a model's responses to `test_prompts` or `train_prompts`
    eval/{prompts}/{label}_iter{n}_{scored}.json   the same, scored: `rewards` (training's model) or `judge`
    eval/kl_prompts/{label}_iter{n}[_{scored}].json  what the KL is measured on, where it is kept and scored
    results/kl_{label}_iter{n}.json                its KL from the base model

A model is named by its iteration and its label: `base` is iteration 0, `shared` iteration 1, later ones are called by
their sampler. A given checkpoint (MODELS="name=path") has no iteration: it is `{name}` instead of `{label}_iter{n}`.
Standard library only.
"""

from pathlib import Path

PROMPTS = ("test_prompts", "train_prompts")


def models(samplers: list[str], iterations: int) -> list[tuple[int, str]]:
    """Return (iteration, label) of every model of a run, the base model first, then by iteration and sampler."""
    later = [(n, sampler) for n in range(2, iterations + 1) for sampler in samplers]
    return [(0, "base"), (1, "shared"), *later]


def model(run_dir: str | Path, iteration: int, sampler: str) -> Path:
    """Return the folder that training writes in an iteration, 1 or later."""
    return Path(run_dir, "models", "rlhflow_iter1" if iteration == 1 else f"rlhflow_iter{iteration}_{sampler}")


def responses(run_dir: str | Path, iteration: int, sampler: str) -> Path:
    """Return the data file of an iteration before annotation."""
    return Path(run_dir, "data", f"gen_data_iter{iteration}_{sampler}.json")


def rewarded(run_dir: str | Path, iteration: int, sampler: str) -> Path:
    """Return the data file of an iteration with rewards."""
    return Path(run_dir, "data", f"data_with_rewards_iter{iteration}_{sampler}.json")


def stem(iteration: int | None, label: str) -> str:
    """Return what a model is called in file names; iteration None: a given checkpoint."""
    return label if iteration is None else f"{label}_iter{iteration}"


def evaluation(
    run_dir: str | Path, prompts: str, iteration: int | None, label: str, scored: str | None = None
) -> Path:
    """Return the file of a model's responses to the evaluation prompts: one of `PROMPTS`, or `kl_prompts`.

    `scored`, `rewards` or `judge`: the file with the scores of the reward model or of the judge.
    """
    suffix = f"_{scored}" if scored else ""
    return Path(run_dir, "eval", prompts, f"{stem(iteration, label)}{suffix}.json")


def kl(run_dir: str | Path, iteration: int | None, label: str) -> Path:
    """Return the result of get_kl.py for a model."""
    return Path(run_dir, "results", f"kl_{stem(iteration, label)}.json")
