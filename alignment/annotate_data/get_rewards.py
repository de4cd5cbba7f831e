"""Scores every response of a data file with a reward model.

Reads:   a data file of generate.py, or any JSON of the form {"instances": [{"prompt", "responses": [K]}]}.
Writes:  the same file with `rewards` [K] in every instance; while it runs, a journal beside it, from which a second
         run of the same command continues.

    python alignment/annotate_data/get_rewards.py --dataset_name_or_path gen_data.json \\
        --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --output_file data_with_rewards.json
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.texts import TEMPLATES, check_template, instance_texts
from common.cli import Parser, UserError, natural, positive_int, run
from common.models import default_dtype
from common.provenance import data_inputs, model_inputs, provenance
from common.records import is_done, journal, read_provenance, read_records, sha256, write_records


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--dataset_name_or_path", "data file(s) with the responses", nargs="+", required=True)
    flags.add(
        "--reward_name_or_path", "reward model: folder or hub name, one label or several", required=True
    )
    flags.add("--output_file", "where the scored data goes, one for each data file", nargs="+", required=True)
    flags.add(
        "--reward_template",
        "none: the model reads prompt + response as they stand in the file (as published); chat: the reward "
        "model's own chat template over the user's text (`messages` or `raw_prompt` of the instance; its `prompt` "
        "where no policy template was applied) and the response",
        choices=TEMPLATES,
        default="none",
    )
    flags.add("--reward_column", "which label is the reward, where the model has several", type=natural)
    flags.add("--max_length", "tokens kept of a text; without it what the model allows", type=positive_int)
    flags.add(
        "--token_budget", "most tokens, padding included, in one batch", type=positive_int, default=16384
    )
    flags.add("--dtype", "float32 or bfloat16; without it bfloat16 on a GPU", choices=("float32", "bfloat16"))
    flags.add("--trust_remote_code", "run Python code that the model brings along", action="store_true")
    return flags


def main() -> None:
    args = parser().parse_args()
    todo = [(source, output) for source, output in files(args) if not is_annotated(args, source, output)]
    if not todo:
        return
    scorer = load_scorer(args)
    models = model_inputs({"reward model": args.reward_name_or_path})
    for source, output in todo:
        annotate(args, scorer, models, source, output)


def files(args) -> list[tuple[str, str]]:
    """(input, output) of every data file. Raises `UserError` unless there is one output an input."""
    if len(args.dataset_name_or_path) != len(args.output_file):
        raise UserError("--dataset_name_or_path and --output_file must have the same number of values")
    if len(set(args.output_file)) != len(args.output_file):
        raise UserError("--output_file: the same file twice")
    return list(zip(args.dataset_name_or_path, args.output_file, strict=True))


def is_annotated(args, source: str, output: str) -> bool:
    """Whether the output is there already; reads the input, so that a wrong one is refused before a model loads."""
    read_records(source)
    if not is_done(output, "annotate", stage_settings(args, source)):
        return False
    print(f"{output}: already done")
    return True


def annotate(args, scorer, models: list[dict], source: str, output: str) -> None:
    """Scores one data file."""
    instances, settings = read_records(source)
    wanted = stage_settings(args, source)
    texts = all_texts(instances, settings, source, args.reward_template, scorer.tokenizer)
    scorer.cut = 0
    with journal(output, wanted) as finished:
        scores = score_all(scorer, texts, finished, source)
        rows = with_rewards(instances, scores)
        made_from = provenance([], models + data_inputs([source]))
        stages = {**read_provenance(source), "annotate": made_from}
        write_records(output, rows, {**settings, "annotate": wanted}, stages)
    print(f"{output}: {summary(rows, scorer)}")


def stage_settings(args, source: str) -> dict:
    """What decides the scores; the token budget does not."""
    return {
        "dataset_sha256": sha256(source),
        "reward_name_or_path": args.reward_name_or_path,
        "reward_template": args.reward_template,
        "reward_column": args.reward_column,
        "max_length": args.max_length,
        "dtype": args.dtype or default_dtype(),
    }


def load_scorer(args):
    """The reward model of the command line."""
    from annotate_data.scorer import RewardScorer

    scorer = RewardScorer(
        args.reward_name_or_path,
        column=args.reward_column,
        max_length=args.max_length,
        token_budget=args.token_budget,
        dtype=args.dtype or default_dtype(),
        trust_remote_code=args.trust_remote_code,
    )
    check_template(args.reward_template, scorer.tokenizer, args.reward_name_or_path)
    return scorer


def all_texts(
    instances: list[dict], settings: dict, source: str, template: str, tokenizer
) -> list[tuple[int, int, str]]:
    """(row, response index, text that the reward model reads), in file order."""
    policy_template = (settings.get("generate") or {}).get("template")
    found = []
    for row, instance in enumerate(instances):
        texts = instance_texts(instance, template, tokenizer, f"{source}: row {row}", policy_template)
        found += [(row, k, text) for k, text in enumerate(texts)]
    return found


def score_all(
    scorer, texts: list[tuple[int, int, str]], finished, source: str
) -> dict[tuple[int, int], float]:
    """(row, response index) → score; each score is in the journal as soon as its batch is done."""
    from tqdm import tqdm

    scores = {
        i: finished.rows[f"{row}/{k}"] for i, (row, k, _) in enumerate(texts) if f"{row}/{k}" in finished.rows
    }
    # The bar goes to standard output: standard error is for the one line of an error.
    bar = tqdm(
        total=len(texts), initial=len(scores), desc="scoring", unit="text", file=sys.stdout, mininterval=1
    )
    for i, score in scorer.stream([text for _, _, text in texts], skip=frozenset(scores)):
        row, k, text = texts[i]
        if not math.isfinite(score):
            bar.close()
            raise UserError(
                f"{source}: row {row}: response {k} was given the score {score} (text {text[:60]!r} …)"
            )
        scores[i] = score
        finished.add(f"{row}/{k}", score)
        bar.update()
    bar.close()
    return {texts[i][:2]: score for i, score in scores.items()}


def with_rewards(instances: list[dict], scores: dict[tuple[int, int], float]) -> list[dict]:
    """The instances with their `rewards`."""
    return [
        {**instance, "rewards": [scores[row, k] for k in range(len(instance["responses"]))]}
        for row, instance in enumerate(instances)
    ]


def summary(instances: list[dict], scorer) -> str:
    """Mean and best-of-K reward, and how many texts were too long."""
    every = [reward for instance in instances for reward in instance["rewards"]]
    best = [max(instance["rewards"]) for instance in instances]
    text = (
        f"{len(instances)} prompts, {len(every)} responses: mean reward {sum(every) / len(every):.4f}, "
        f"best-of-K reward {sum(best) / len(best):.4f}"
    )
    if scorer.cut:
        text += f"; {scorer.cut} texts were cut to {scorer.max_length} tokens"
    return text


if __name__ == "__main__":
    run(main)
