"""KL divergence of a policy from its reference on held-out prompts.

Samples responses of the policy at temperature T (top-p 1), or takes existing ones (--responses), and sums the exact
per-token KL along them, scored at the same T; see kl.py.

Reads   a policy, a reference with the same tokenizer, and prompts as generate.py does.
Writes  OUT.json: {"kl": nats per response, "stderr": over prompts, "kl_per_token", "num_prompts",
        "truncated_fraction", "log_ratio_kl", ..., "settings"}. Until it is complete a journal lies beside it, from
        which the same command continues.

    python alignment/evaluation/get_kl.py --model_name_or_path P --ref_model_name_or_path R \\
        --dataset_name_or_path prompts.jsonl --temperature 0.7 --max_new_tokens 128 --output_file kl.json

For several models: FLAGS --then FLAGS, and so on, starts Python once.
"""

import argparse
import json
import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' table is the bandit's

from bandit.mixtures import MIXTURES
from common.cli import Parser, UserError, checked, each, natural, positive_int, run
from common.journal import Journal, is_done, journal
from common.models import (
    check_same_vocabulary,
    default_device,
    default_dtype,
    encode_prompt,
    encode_response,
    give_memory_back,
    load_causal_lm,
    load_config,
    load_tokenizer,
    stop_token_ids,
)
from common.provenance import data_inputs, model_inputs, provenance
from common.records import read_records, sha256, write_json
from generation.backends import load_generator
from generation.flags import add_engine_flags, add_prompt_flags, check_room, prompt_settings, read_prompts
from generation.interface import Sampling
from generation.plan import Plan, requests
from generation.samplers import pairs_from_json

POLICY_ALONE = MIXTURES["online"].pairs(0.0)

temperature_above_zero = checked(
    float, lambda v: 0 < v < float("inf"), "a temperature above 0 (the KL of greedy decoding is not finite)"
)


def parser() -> Parser:
    """The command line."""
    p = Parser(__doc__)
    p.add("--model_name_or_path", "the policy: folder or hub name", required=True)
    p.add("--ref_model_name_or_path", "the reference", required=True)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset_name_or_path", help="prompts: file(s), folder(s) or hub name(s)", nargs="+")
    source.add_argument("--responses", help="a data file of generate.py whose responses are scored instead")
    add_prompt_flags(p)
    p.add("--start", "first prompt, counted after the filters", type=natural, default=0)
    p.add("--end", "prompt to stop before (default: all)", type=positive_int)
    p.add("--temperature", "of sampling and of scoring", type=temperature_above_zero, default=0.7)
    p.add("--seed", "of the responses' random streams", type=natural, default=0)
    p.add("--output_file", "where the result goes", required=True)
    add_engine_flags(p)
    p.add("--batch_size", "responses scored at a time", type=positive_int, default=8)
    return p


def main() -> None:
    args = parser().parse_args()
    args.dtype = args.dtype or default_dtype()
    tokenizer = check_models(args)
    prompts = None if args.responses else read_prompts(args, tokenizer, args.start, args.end)
    settings = settings_of(args)
    if is_done(args.output_file, "kl", settings):
        print(f"{args.output_file}: already done")
        return
    given = read_responses(args, tokenizer) if args.responses else None
    with journal(args.output_file, settings) as book:
        sequences = given or sample(args, prompts, book, tokenizer)
        result = score(args, sequences, book, tokenizer)
        stored = {"settings": {"kl": settings}, "provenance": {"kl": made_from(args)}}
        write_json(args.output_file, {**result, **stored})
    print(report(result))


def settings_of(args: argparse.Namespace) -> dict:
    """What decides the result."""
    kept = ("model_name_or_path", "ref_model_name_or_path", "temperature", "dtype")
    settings = {name: getattr(args, name) for name in kept}
    if args.responses:
        return settings | {"responses_sha256": sha256(args.responses)}
    kept = ("start", "end", "max_new_tokens", "seed", "backend")
    return settings | prompt_settings(args) | {name: getattr(args, name) for name in kept}


def made_from(args: argparse.Namespace) -> dict:
    """Versions, and the hashes of both models and of the prompts or responses."""
    models = model_inputs({"policy": args.model_name_or_path, "reference": args.ref_model_name_or_path})
    data = [args.responses] if args.responses else args.dataset_name_or_path
    samples_with_vllm = args.backend == "vllm" and not args.responses
    return provenance(["vllm"] if samples_with_vllm else [], models + data_inputs(data))


def check_models(args: argparse.Namespace):
    """Refuses, before any weight is loaded, models that cannot be compared; returns the tokenizer."""
    tokenizers = []
    for name, what in ((args.model_name_or_path, "policy"), (args.ref_model_name_or_path, "reference")):
        config = load_config(name, what, args.trust_remote_code)
        if not args.responses:
            check_room(args, config, f"{what} {name}")
        tokenizers.append(load_tokenizer(name, what, args.trust_remote_code))
    check_same_vocabulary(*tokenizers)
    return tokenizers[0]


def sample(args: argparse.Namespace, prompts: list, book: Journal, tokenizer) -> list[list]:
    """One response of the policy a prompt, in groups of one; the journal keeps each as it finishes."""
    from tqdm import tqdm

    from evaluation.kl import Sequence

    plan = Plan(prompts, args.start, POLICY_ALONE, 1, args.seed)
    wanted = list(requests(plan, book.rows))
    if wanted:
        give_memory_back()  # what the scoring of an earlier command line has left
        generator = load_generator(args, args.model_name_or_path, None)
        stop_ids = stop_token_ids(tokenizer, args.model_name_or_path)
        sampling = Sampling(args.temperature, args.max_new_tokens, stop_ids)
        for response in tqdm(generator.generate(wanted, sampling), "sampling", len(wanted), file=sys.stdout):
            ended = response.stop_reason == "stop"
            ids = response.token_ids[:-1] if ended else response.token_ids
            book.add(response.key, {"ids": ids, "ended": ended})
        generator.close()  # scoring needs its memory for two models
    rows = [book.rows[request.key] for request in requests(plan, {})]
    return [[Sequence(p.token_ids, r["ids"], r["ended"])] for p, r in zip(prompts, rows, strict=True)]


def read_responses(args: argparse.Namespace, tokenizer) -> list[list]:
    """The responses of a data file, grouped by prompt. Raises `UserError` if they are not the policy's."""
    from evaluation.kl import Sequence

    instances, settings = read_records(args.responses, ("responses", "stop_reasons"))
    check_origin(args, settings.get("generate") or {})
    groups = []
    for row, instance in enumerate(instances):
        prompt = encode_prompt(tokenizer, instance["prompt"])
        if not prompt:
            raise UserError(f"{args.responses}: row {row}: an empty prompt")
        pairs = zip(instance["responses"], instance["stop_reasons"], strict=True)
        groups.append(
            [Sequence(prompt, encode_response(tokenizer, r, ended=False), why == "stop") for r, why in pairs]
        )
    return groups


def check_origin(args: argparse.Namespace, made_with: dict) -> None:
    """Raises `UserError` unless the responses come from the policy alone at the temperature of the command line."""
    policy = made_with.get("policy")
    if isinstance(policy, str) and os.path.realpath(policy) != os.path.realpath(args.model_name_or_path):
        raise UserError(f"{args.responses}: sampled from {policy}, not from the policy {args.model_name_or_path}")
    temperature = made_with.get("temperature", args.temperature)
    if temperature != args.temperature:
        raise UserError(f"{args.responses}: sampled at temperature {temperature}, not {args.temperature}")
    sampler = made_with.get("sampler")
    if sampler is not None and pairs_from_json(json.dumps(sampler)) != POLICY_ALONE:
        raise UserError(f"{args.responses}: its sampler is not the policy alone, so it does not estimate its KL")


def score(args: argparse.Namespace, groups: list[list], book: Journal, tokenizer) -> dict:
    """The result; the journal keeps each response's score."""
    from tqdm import tqdm

    from evaluation.kl import LanguageModel, Score, batches, check_same_width, score_sequences, summarize

    names = ((args.model_name_or_path, "policy"), (args.ref_model_name_or_path, "reference"))
    models = [
        LanguageModel(load_causal_lm(name, what, args.dtype, args.trust_remote_code).to(default_device()))
        for name, what in names
    ]
    check_same_width(*models)
    stop_ids = stop_token_ids(tokenizer, args.model_name_or_path)
    sequences = [sequence for group in groups for sequence in group]
    for batch in tqdm(list(batches(sequences, args.batch_size)), "scoring", file=sys.stdout):
        if all(f"score {i}" in book.rows for i in batch):
            continue
        scores = score_sequences(*models, [sequences[i] for i in batch], args.temperature, stop_ids)
        for i, found in zip(batch, scores, strict=True):
            book.add(f"score {i}", found)
    found = iter([Score(*book.rows[f"score {i}"]) for i in range(len(sequences))])
    return summarize([[(sequence, next(found)) for sequence in group] for group in groups])


def report(result: dict) -> str:
    """One line for people."""
    stderr = "?" if result["stderr"] is None else f"{result['stderr']:.4f}"
    return (
        f"KL {result['kl']:.4f} ± {stderr} nats a response ({result['kl_per_token']:.4f} a token) over "
        f"{result['num_prompts']} prompts; log-ratio estimate {result['log_ratio_kl']:.4f}; "
        f"{result['truncated_fraction']:.0%} of the responses cut at the length limit"
    )


if __name__ == "__main__":
    run(each(main))
