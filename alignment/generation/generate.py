"""Samples K responses for every prompt, each from the distribution that the sampler's table gives it.

Reads   a policy, a reference, prompts (JSON, JSONL, Parquet, CSV, a folder saved by `datasets`, or a name on a hub);
        for samplers with history the policy of the iteration before.
Writes  OUT.json: prompts, responses, the ids that were sampled, which pair of the sampler each came from, why it
        stopped, all settings. Until that is complete, OUT.json.journal: the same command continues from it.

    python alignment/generation/generate.py --model_name_or_path P --ref_model_name_or_path R \\
        --dataset_name_or_path prompts.jsonl --sampler mixp --K 2 --temperature 0.7 \\
        --max_new_tokens 128 --max_input_length 128 --output_file OUT.json

For several samplers or models: FLAGS --then FLAGS, and so on, starts Python once, and one engine for all that
follow one another with the same other models, or with a single model, of one shape.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' table is the bandit's

from bandit.mixtures import MIXTURES, Mixture, WeightPairs
from common import scale_out
from common.cli import Parser, UserError, command_lines, natural, non_negative, positive, positive_int, run
from common.journal import Journal, is_done, journal
from common.models import (
    check_same_vocabulary,
    choose_dtype,
    load_config,
    load_tokenizer,
    response_text,
    stop_token_ids,
    tokenizer_fingerprint,
    weights_of,
)
from common.provenance import data_inputs, model_inputs, provenance
from common.record_stream import RecordStream
from common.records import write_records
from generation.prompts import (
    Prompt,
    PromptFile,
    add_prompt_flags,
    check_same_prompts,
    prompt_settings,
    read_prompts,
    text_digest,
)
from generation.sampling import (
    Engines,
    Plan,
    Request,
    Response,
    Sampling,
    add_engine_flags,
    as_settings,
    check_count,
    check_temperature,
    load_generator,
    longest_prompt,
    models_needed,
    sampler_by_name,
    sampler_from_json,
)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add("--model_name_or_path", "the policy: folder or hub name", required=True)
    p.add("--ref_model_name_or_path", "the reference; needed by samplers that use it")
    p.add(
        "--previous_model_name_or_path",
        "the policy of the iteration before; needed by the samplers history, in which it stands for the reference, "
        "and history-mixp, and by --pairs of three weights",
    )
    p.add("--dataset_name_or_path", "prompts: file(s), folder(s) or hub name(s)", nargs="+", required=True)
    add_prompt_flags(p)
    p.add("--keep_fields", "copy the data set's other fields, for a reward function to read", action="store_true")
    p.add(
        "--start",
        "first prompt, counted after the filters; one per slice",
        type=natural,
        nargs="+",
        default=[0],
    )
    p.add("--end", "prompt to stop before (default: all); one per slice", type=positive_int, nargs="+")
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--sampler",
        help=f"a row of the table: {', '.join(MIXTURES)}; or mix_A_B_P: with probability P from (1 + A, -A) against "
        "(1 - B, B), else both on-policy (default: online)",
    )
    which.add_argument(
        "--pairs",
        help="a table of your own: [[p, [w_policy, w_ref], [w, w]], ...], or three "
        "weights each, the third that of the policy of the iteration before",
    )
    p.add(
        "--beta",
        "KL coefficient of the DPO loss; pilaf and theory take their weights from it",
        type=positive,
        default=0.1,
    )
    p.add("--K", "responses per prompt (default: the sampler's own, mostly 2)", type=positive_int)
    p.add("--temperature", "0 = greedy", type=non_negative, default=0.7)
    p.add("--seed", "of the pairs' and the responses' random streams", type=natural, default=0)
    p.add("--output_file", "where the result goes; one per slice", nargs="+", required=True)
    add_engine_flags(p)
    scale_out.add_flag(p)
    return p


FLAGS = {
    "policy": "model_name_or_path",
    "reference": "ref_model_name_or_path",
    "previous": "previous_model_name_or_path",
}


def chosen_models(args: argparse.Namespace, sampler: Mixture) -> dict[str, str | None]:
    """Return what each model is → its folder or name, in the order of the weights; None for one that is not used."""
    found = {}
    for what, is_needed in zip(sampler.models, models_needed(sampler.pairs(args.beta)), strict=True):
        found[what] = getattr(args, FLAGS[what]) if is_needed else None
        if is_needed and not found[what]:
            raise UserError(f"this sampler needs --{FLAGS[what]}")
    return found


def check_models(args: argparse.Namespace, used: dict[str, str | None]):
    """Refuse, before any weight is loaded, models that cannot do this.

    Returns:
        (the policy's tokenizer, longest prompt in tokens). That tokenizer is used with every sampler, so that all of
        them see the same prompts.
    """
    trust = args.trust_remote_code
    loaded = {
        what: (load_config(name, what, trust), load_tokenizer(name, what, trust))
        for what, name in {**used, "policy": args.model_name_or_path}.items()
        if name
    }
    models = {f"{what} {used[what]}": loaded[what] for what in used if used[what]}
    check_same_vocabulary({f"policy {args.model_name_or_path}": loaded["policy"], **models})
    check_same_vocabulary(models, are_mixed=len(models) > 1)
    return loaded["policy"][1], longest_prompt(args, models)


def settings_of(args: argparse.Namespace, sampler: Mixture, models: dict[str, str | None], fingerprint: str) -> dict:
    """Return everything that the responses depend on, but for the slice; and the rule that makes pairs of them."""
    kept = ("K", "temperature", "max_new_tokens", "seed", "backend", "dtype")
    return {
        "policy": None,
        "reference": None,
        **models,
        "weights": weights_of(models),
        "tokenizer": fingerprint,
        **prompt_settings(args),
        "sampler": as_settings(sampler.pairs(args.beta)),
        "choose_type": sampler.choose,
        **{name: getattr(args, name) for name in kept},
    }


def slices(args: argparse.Namespace) -> list[tuple[int, int | None, str]]:
    """Return (start, end, output file) per slice. Raises `UserError` unless every output has one of each."""
    ends = args.end or [None]
    if not len(args.start) == len(ends) == len(args.output_file):
        raise UserError("--start, --end and --output_file must have the same number of values")
    if len(set(args.output_file)) != len(args.output_file):
        raise UserError("--output_file: the same file twice")
    for start, end in zip(args.start, ends, strict=True):
        if end is not None and end <= start:
            raise UserError(f"--start {start} --end {end}: an empty slice")
    return list(zip(args.start, ends, args.output_file, strict=True))


def compare_prompts(output: str, prompts: Iterator[Prompt]) -> None:
    """Raise `UserError` if a finished file was made from other prompts than these, or lacks fields that they have."""

    def digests() -> Iterator[tuple[Prompt, str]]:
        for prompt, instance in zip(prompts, RecordStream(output), strict=False):
            if prompt.fields and "fields" not in instance:
                raise UserError(f"{output}: exists, made without --keep_fields; move it away or name another output")
            yield prompt, text_digest(instance["prompt"])

    check_same_prompts(output, digests())


class Slice(NamedTuple):
    """One output: its file, its settings, and which responses it needs."""

    output: str
    settings: dict
    plan: Plan

    @property
    def size(self) -> int:
        return len(self.plan.prompts) * self.plan.count


def slices_to_do(
    args: argparse.Namespace, tokenizer, longest: int, settings: dict, pairs: WeightPairs
) -> list[Slice]:
    """Return those whose file is not there yet; the prompts of all are read, so that a wrong slice is refused."""
    todo = []
    for start, end, output in slices(args):
        own_settings = {**settings, "start": start, "end": end}
        read = functools.partial(read_prompts, args, tokenizer, longest, start, end)
        if is_done(output, "generate", own_settings):
            read(functools.partial(compare_prompts, output), args.keep_fields)
            print(f"generate: {output} is already complete")
        else:
            prompts = read(functools.partial(PromptFile, output), args.keep_fields)
            todo.append(Slice(output, own_settings, Plan(prompts, start, pairs, args.K, args.seed)))
    return todo


def missing(todo: list[Slice], journals: list[Journal]) -> Iterator[Request]:
    """Yield the requests that the journals lack, slice after slice; their keys begin with the slice's number."""
    for number, (part, done) in enumerate(zip(todo, journals, strict=True)):
        for request in part.plan.requests(done.rows):
            yield request._replace(key=f"{number}/{request.key}")


def sample(todo: list[Slice], start: Callable[[], Any], sampling: Sampling, tokenizer, made_from: dict) -> None:
    """Sample what the journals lack; write each response as it finishes, a slice's file with its last one.

    Args:
        start: makes the back end; called only if a response is missing.
    """
    with contextlib.ExitStack() as stack:
        journals = [stack.enter_context(journal(part.output, part.settings)) for part in todo]
        for part, done in zip(todo, journals, strict=True):
            rows = done.rows
            check_same_prompts(done.path, ((part.plan.prompt(key), rows[key].get("prompt")) for key in rows))
            finish(part, done, made_from)
        if is_complete(todo, journals):
            return
        generator = start()
        bar = stack.enter_context(progress(sum(part.size for part in todo), sum(len(j.rows) for j in journals)))
        tokens = 0
        for response in generator.generate(missing(todo, journals), sampling):
            number, key = response.key.split("/")
            part, done = todo[int(number)], journals[int(number)]
            done.add(key, journal_row(tokenizer, part.plan.prompt(key), response))
            tokens += len(response.token_ids)
            bar.update()
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            finish(part, done, made_from)
        if not is_complete(todo, journals):
            raise UserError("the back end ended before all responses were there; the same command continues")


def journal_row(tokenizer, prompt, response: Response) -> dict:
    """Return what is kept of a response: its ids, their text, why it stopped, and which prompt it answers."""
    ids = response.token_ids[:-1] if response.stop_reason == "stop" else response.token_ids
    text, cut = response_text(tokenizer, prompt.token_ids, ids)
    row = {"text": text, "ids": response.token_ids, "stop_reason": response.stop_reason, "prompt": prompt.digest()}
    return row | ({"half_character": True} if cut else {})


def is_complete(todo: list[Slice], journals: list[Journal]) -> bool:
    """Return whether no response is missing."""
    return all(len(done.rows) == part.size for part, done in zip(todo, journals, strict=True))


def progress(total: int, done: int):
    """Return a bar over all slices."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="response", desc="generate", mininterval=1)


def finish(part: Slice, done: Journal, made_from: dict) -> None:
    """Write the slice's file if its journal is complete."""
    if len(done.rows) < part.size:
        return
    instances = part.plan.instances(done.rows)
    write_records(part.output, instances, {"generate": part.settings}, {"generate": made_from})
    cut = sum("half_character" in done.rows[key] for key in done.rows)
    done.close(done=True)
    print(f"generate: wrote {part.output} ({len(part.plan.prompts)} prompts x {part.plan.count} responses)")
    if cut:
        print(f"generate: {cut} responses end within a character, which their text leaves out")


def start_back_end(args: argparse.Namespace, models: Sequence[str | None], longest: int):
    """Return what samples: one engine in this process, or with `--num_engines` several that look like one."""
    if args.num_engines == 1:
        return load_generator(args, models, longest)
    from generation.many_engines import ManyEngines

    return ManyEngines(args, models, longest)


def generate(args: argparse.Namespace, engines: Engines) -> None:
    """Write the data file(s) of one command line."""
    sampler = sampler_from_json(args.pairs) if args.pairs else sampler_by_name(args.sampler or "online")
    pairs = sampler.pairs(args.beta)
    args.K = args.K or sampler.candidates
    check_count(pairs, args.K)
    check_temperature(args.backend, args.temperature)
    slices(args)
    models = chosen_models(args, sampler)
    tokenizer, longest = check_models(args, models)
    args.dtype = choose_dtype(args, models.values())
    settings = settings_of(args, sampler, models, tokenizer_fingerprint(tokenizer))
    todo = slices_to_do(args, tokenizer, longest, settings, pairs)
    if not todo:
        return
    used = [name for name in models.values() if name]
    stop_ids = sorted({i for name in used for i in stop_token_ids(tokenizer, name, args.trust_remote_code)})
    if not stop_ids:
        print(
            f"no stop token: neither tokenizer nor model has one, so all responses are cut at {args.max_new_tokens}"
        )
    inputs = model_inputs(models) + data_inputs(args.dataset_name_or_path)
    made_from = provenance(["vllm"] if args.backend == "vllm" else [], inputs)
    sampling = Sampling(args.temperature, args.max_new_tokens, stop_ids)
    sample(todo, lambda: engines.load(args, list(models.values()), longest), sampling, tokenizer, made_from)


def main() -> None:
    with contextlib.closing(Engines(start_back_end)) as engines:
        for args in command_lines(parser()):
            generate(args, engines)


if __name__ == "__main__":
    run(main)
