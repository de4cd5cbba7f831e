"""Samples K responses for every prompt, each from the distribution that the sampler's table gives it.

Reads   a policy, a reference, prompts (JSON, JSONL, a folder saved by `datasets`, or a name on a hub); for samplers
        with history the policy of the iteration before.
Writes  OUT.json: prompts, responses, which pair of the sampler each came from, why it stopped, all settings.
        Until that is complete, OUT.json.journal: the same command continues from it.

    python alignment/generation/generate.py --model_name_or_path P --ref_model_name_or_path R \\
        --dataset_name_or_path prompts.jsonl --sampler mixp --K 2 --temperature 0.7 \\
        --max_new_tokens 128 --max_input_length 128 --output_file OUT.json

For several samplers or models: FLAGS --then FLAGS, and so on, starts Python once.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' table is the bandit's

from bandit.mixtures import MIXTURES, Mixture, WeightPairs
from common import scale_out
from common.cli import Parser, UserError, each, natural, non_negative, positive, positive_int, run
from common.journal import Journal, is_done, journal
from common.models import (
    check_same_vocabulary,
    default_dtype,
    load_config,
    load_tokenizer,
    stop_token_ids,
    tokenizer_fingerprint,
)
from common.provenance import data_inputs, model_inputs, provenance
from common.records import write_records
from generation.backends import make_generator
from generation.flags import add_engine_flags, add_prompt_flags, check_room, prompt_settings, read_prompts
from generation.interface import Request, Sampling
from generation.plan import Plan, instances, requests
from generation.samplers import (
    as_settings,
    check_count,
    models_needed,
    sampler_by_name,
    sampler_from_json,
    sampler_of_family,
)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add("--model_name_or_path", "the policy: folder or hub name", required=True)
    p.add("--ref_model_name_or_path", "the reference; needed by samplers that use it")
    p.add(
        "--previous_model_name_or_path",
        "the policy of the iteration before; needed by the sampler history, in which it stands for the reference",
    )
    p.add("--dataset_name_or_path", "prompts: file(s), folder(s) or hub name(s)", nargs="+", required=True)
    add_prompt_flags(p)
    p.add(
        "--start",
        "first prompt, counted after the filters; one a slice",
        type=natural,
        nargs="+",
        default=[0],
    )
    p.add("--end", "prompt to stop before (default: all); one a slice", type=positive_int, nargs="+")
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--sampler",
        help=f"a row of the table: {', '.join(MIXTURES)}; or mix_A_B_P, see --family (default: online)",
    )
    which.add_argument("--pairs", help="a table of your own: [[p, [w_policy, w_reference], [w, w]], ...]")
    which.add_argument(
        "--family",
        nargs=3,
        type=float,
        metavar=("a", "b", "p"),
        help="with probability p: (1 + a, -a) against (1 - b, b); else both on-policy",
    )
    p.add("--beta", "KL coefficient of the DPO loss, used by the sampler pilaf", type=positive, default=0.1)
    p.add("--K", "responses a prompt (default: the sampler's own, mostly 2)", type=positive_int)
    p.add("--temperature", "0 = greedy", type=non_negative, default=0.7)
    p.add("--seed", "of the pairs' and the responses' random streams", type=natural, default=0)
    p.add("--output_file", "where the result goes; one a slice", nargs="+", required=True)
    add_engine_flags(p)
    scale_out.add_flag(p)
    return p


def chosen_sampler(args: argparse.Namespace) -> Mixture:
    """The sampler that the flags name. Raises `UserError` if there is none such."""
    if args.pairs:
        return sampler_from_json(args.pairs)
    if args.family:
        return sampler_of_family(*args.family)
    return sampler_by_name(args.sampler or "online")


def chosen_models(args: argparse.Namespace, sampler: Mixture) -> tuple[str | None, str | None]:
    """(policy, second model), None for one that the sampler does not use."""
    needs_policy, needs_second = models_needed(sampler.pairs(args.beta))
    flag = {"reference": "ref_model_name_or_path", "previous": "previous_model_name_or_path"}[sampler.second_model]
    second = getattr(args, flag)
    if needs_second and not second:
        raise UserError(f"this sampler needs --{flag}")
    return args.model_name_or_path if needs_policy else None, second if needs_second else None


def check_models(args: argparse.Namespace, policy: str | None, reference: str | None):
    """Refuses, before any weight is loaded, models that cannot do this; returns the tokenizer."""
    trust = args.trust_remote_code
    tokenizers, widths = [], set()
    for name, what in ((policy, "policy"), (reference, "reference")):
        if name is None:
            continue
        config = load_config(name, what, trust)
        widths.add(config.get_text_config().vocab_size)
        check_room(args, config, f"{what} {name}")
        tokenizers.append(load_tokenizer(name, what, trust))
    check_same_vocabulary(tokenizers[0], tokenizers[-1])
    if len(widths) > 1:
        raise UserError(f"policy and reference give logits for {' and '.join(map(str, sorted(widths)))} ids")
    return tokenizers[0]


def settings_of(
    args: argparse.Namespace, sampler: Mixture, pairs: WeightPairs, policy: str | None, reference: str | None
) -> dict:
    """Everything that the responses depend on, but for the slice; and the rule that makes pairs of them."""
    kept = ("K", "temperature", "max_new_tokens", "seed", "backend", "dtype")
    return {
        "policy": policy,
        "reference": reference,
        **prompt_settings(args),
        "sampler": as_settings(pairs),
        "choose_type": sampler.choose,
        **{name: getattr(args, name) for name in kept},
    }


def slices(args: argparse.Namespace) -> list[tuple[int, int | None, str]]:
    """(start, end, output file) of each slice. Raises `UserError` unless there is one of each for every output."""
    ends = args.end or [None]
    if not len(args.start) == len(ends) == len(args.output_file):
        raise UserError("--start, --end and --output_file must have the same number of values")
    if len(set(args.output_file)) != len(args.output_file):
        raise UserError("--output_file: the same file twice")
    for start, end in zip(args.start, ends, strict=True):
        if end is not None and end <= start:
            raise UserError(f"--start {start} --end {end}: an empty slice")
    return list(zip(args.start, ends, args.output_file, strict=True))


class Slice(NamedTuple):
    """One output: its file, its settings, and which responses it needs."""

    output: str
    settings: dict
    plan: Plan

    @property
    def size(self) -> int:
        return len(self.plan.prompts) * self.plan.count


def slices_to_do(
    args: argparse.Namespace,
    wanted: list[tuple[int, int | None, str]],
    tokenizer,
    settings: dict,
    pairs: WeightPairs,
) -> list[Slice]:
    """Those whose file is not there yet; the prompts of all are read, so that a wrong slice is refused."""
    todo = []
    for start, end, output in wanted:
        own_settings = {**settings, "start": start, "end": end}
        prompts = read_prompts(args, tokenizer, start, end)
        if is_done(output, "generate", own_settings):
            print(f"generate: {output} is already complete")
        else:
            todo.append(Slice(output, own_settings, Plan(prompts, start, pairs, args.K, args.seed)))
    return todo


def missing(todo: list[Slice], books: list[Journal]) -> Iterator[Request]:
    """The requests that the journals lack, one slice after the other; their keys begin with the slice's number."""
    for number, (part, book) in enumerate(zip(todo, books, strict=True)):
        for request in requests(part.plan, book.rows):
            yield request._replace(key=f"{number}/{request.key}")


def sample(todo: list[Slice], start: Callable[[], Any], sampling: Sampling, tokenizer, made_from: dict) -> None:
    """Samples what the journals lack; writes each response as it finishes, a slice's file with its last one.

    Args:
        start: makes the back end; called only if a response is missing.
    """
    with contextlib.ExitStack() as stack:
        books = [stack.enter_context(journal(part.output, part.settings)) for part in todo]
        for part, book in zip(todo, books, strict=True):
            finish(part, book, made_from)
        if is_complete(todo, books):
            return
        generator = stack.enter_context(contextlib.closing(start()))
        bar = stack.enter_context(progress(sum(part.size for part in todo), sum(len(b.rows) for b in books)))
        tokens = 0
        for response in generator.generate(missing(todo, books), sampling):
            number, key = response.key.split("/")
            part, book = todo[int(number)], books[int(number)]
            text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
            book.add(key, {"text": text, "ids": response.token_ids, "stop_reason": response.stop_reason})
            tokens += len(response.token_ids)
            bar.update()
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            finish(part, book, made_from)
        if not is_complete(todo, books):
            raise UserError("the back end ended before all responses were there; the same command continues")


def is_complete(todo: list[Slice], books: list[Journal]) -> bool:
    """Whether no response is missing."""
    return all(len(book.rows) == part.size for part, book in zip(todo, books, strict=True))


def progress(total: int, done: int):
    """A bar over all slices."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="response", desc="generate", mininterval=1)


def finish(part: Slice, book: Journal, made_from: dict) -> None:
    """Writes the slice's file if its journal is complete."""
    if len(book.rows) < part.size:
        return
    rows = instances(part.plan, book.rows)
    write_records(part.output, rows, {"generate": part.settings}, {"generate": made_from})
    book.close(done=True)
    print(f"generate: wrote {part.output} ({len(part.plan.prompts)} prompts x {part.plan.count} responses)")


def main() -> None:
    args = parser().parse_args()
    sampler = chosen_sampler(args)
    pairs = sampler.pairs(args.beta)
    args.K = args.K or sampler.candidates
    check_count(pairs, args.K)
    policy, reference = chosen_models(args, sampler)
    args.dtype = args.dtype or default_dtype()
    wanted = slices(args)
    tokenizer = check_models(args, policy, reference)
    settings = settings_of(args, sampler, pairs, policy, reference)
    settings["tokenizer"] = tokenizer_fingerprint(tokenizer)
    todo = slices_to_do(args, wanted, tokenizer, settings, pairs)
    if not todo:
        return
    sampling = Sampling(args.temperature, args.max_new_tokens, stop_token_ids(tokenizer, policy or reference))
    inputs = model_inputs({"policy": policy, "reference": reference}) + data_inputs(args.dataset_name_or_path)
    made_from = provenance(["vllm"] if args.backend == "vllm" else [], inputs)
    sample(todo, lambda: make_generator(args, policy, reference), sampling, tokenizer, made_from)


if __name__ == "__main__":
    run(each(main))
