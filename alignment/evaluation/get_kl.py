"""KL divergence of a policy from its reference on held-out prompts.

Samples responses of the policy at temperature T (top-p 1), or takes existing ones (--responses). Sums the exact
per-token KL along their sampled ids, scored at the same T and in float32; see kl.py. Where one
of several visible GPUs cannot hold both models that score, their layers are spread.

Reads   a policy, a reference with the same tokenizer, and prompts as generate.py does.
Writes  OUT.json: {"kl": nats per response, "stderr": over prompts, "kl_per_token", "num_prompts",
        "truncated_fraction", "log_ratio_kl", ..., "settings"}. Until it is complete a journal lies beside it, from
        which the same command continues.

    python alignment/evaluation/get_kl.py --model_name_or_path P --ref_model_name_or_path R \\
        --dataset_name_or_path prompts.jsonl --temperature 0.7 --max_new_tokens 128 --output_file kl.json

For several models: FLAGS --then FLAGS, and so on, starts Python once; on a CPU also one engine for all of one shape.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' table is the bandit's

from bandit.mixtures import MIXTURES
from common.cli import Parser, UserError, checked, command_lines, natural, positive_int, run
from common.journal import Journal, is_done, journal
from common.models import (
    check_same_vocabulary,
    choose_dtype,
    context_length,
    default_device,
    device_map,
    encode_prompt,
    encode_response,
    give_memory_back,
    load_causal_lm,
    load_config,
    load_tokenizer,
    stop_token_ids,
    tokenizer_fingerprint,
    weights_of,
)
from common.provenance import data_inputs, model_inputs, provenance
from common.record_stream import RecordStream
from common.records import check_response_ids, read_json, sha256, write_json
from generation.prompts import add_prompt_flags, check_same_prompts, prompt_settings, read_prompts
from generation.sampling import (
    Engines,
    Plan,
    Sampling,
    add_engine_flags,
    check_temperature,
    longest_prompt,
    pairs_from_json,
)
from scripts.memory import OVERHEAD, USED

POLICY_ALONE = MIXTURES["online"].pairs(0.0)
# What would change or run the sampling; of --responses all are scored as they are.
OF_SAMPLING = (
    *("start", "end", "seed", "max_new_tokens", "backend", "dtype", "max_num_seqs", "tensor_parallel_size"),
    *("gpu_memory_utilization", "compile", "dataset_split", "dataset_key", "template", "chat_template_kwargs"),
    *("continue_final_message", "max_prompt_characters", "max_input_length"),
)

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
    p.add("--scoring_dtype", "of the models that score", choices=["float32", "bfloat16"], default="float32")
    p.add(
        "--published_estimator",
        "also the published scripts' KL: the log-ratio at T = 1 of responses sampled at --temperature",
        action="store_true",
    )
    return p


def measure(args: argparse.Namespace, engines: Engines) -> None:
    """Write the KL of one command line."""
    if args.responses:
        check_only_scoring(args)
    tokenizer, room = check_models(args)
    prompts = None if args.responses else read_prompts(args, tokenizer, room, args.start, args.end)
    settings = settings_of(args)
    if is_done(args.output_file, "kl", settings):
        if prompts:
            check_same_prompts(
                args.output_file, zip(prompts, read_json(args.output_file).get("prompts", []), strict=False)
            )
        print(f"{args.output_file}: already done")
        return
    given = read_responses(args, tokenizer, room) if args.responses else None
    with journal(args.output_file, settings) as done:
        sequences = given or sample(args, prompts, room, done, tokenizer, engines)
        result = score(args, sequences, done, tokenizer)
        if prompts:
            result["prompts"] = [prompt.digest() for prompt in prompts]
        stored = {"settings": {"kl": settings}, "provenance": {"kl": made_from(args)}}
        write_json(args.output_file, {**result, **stored})
    print(report(result))


def check_only_scoring(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags of sampling that are not at their defaults."""
    flags = parser()
    if given := [f"--{name}" for name in OF_SAMPLING if getattr(args, name) != flags.get_default(name)]:
        raise UserError(
            f"{', '.join(given)}: for sampling from prompts, without effect on --responses, all of which are scored"
        )


def main() -> None:
    with contextlib.closing(Engines()) as engines:
        for args in command_lines(parser()):
            measure(args, engines)


def settings_of(args: argparse.Namespace) -> dict:
    """Return what decides the result."""
    kept = ("model_name_or_path", "ref_model_name_or_path", "temperature", "scoring_dtype", "published_estimator")
    models = {"policy": args.model_name_or_path, "reference": args.ref_model_name_or_path}
    settings = {name: getattr(args, name) for name in kept} | {"weights": weights_of(models)}
    if args.responses:
        return settings | {"responses_sha256": sha256(args.responses)}
    kept = ("start", "end", "max_new_tokens", "seed", "backend", "dtype")
    return settings | prompt_settings(args) | {name: getattr(args, name) for name in kept}


def made_from(args: argparse.Namespace) -> dict:
    """Return versions, and the hashes of both models and of the prompts or responses."""
    models = model_inputs({"policy": args.model_name_or_path, "reference": args.ref_model_name_or_path})
    data = [args.responses] if args.responses else args.dataset_name_or_path
    samples_with_vllm = args.backend == "vllm" and not args.responses
    return provenance(["vllm"] if samples_with_vllm else [], models + data_inputs(data))


def check_models(args: argparse.Namespace) -> tuple:
    """Refuse, before any weight is loaded, models that cannot be compared.

    Returns:
        (the policy's tokenizer, most tokens of a prompt that is sampled from, or of prompt + response in a file).
    """
    models = {}
    for name, what in ((args.model_name_or_path, "policy"), (args.ref_model_name_or_path, "reference")):
        trust = args.trust_remote_code
        models[f"{what} {name}"] = load_config(name, what, trust), load_tokenizer(name, what, trust)
    check_same_vocabulary(models)
    _, tokenizer = next(iter(models.values()))
    if args.responses:
        rooms = [context_length(*model) for model in models.values()]
        return tokenizer, min((room for room in rooms if room is not None), default=None)
    check_temperature(args.backend, args.temperature)
    args.dtype = choose_dtype(args, [args.model_name_or_path])
    return tokenizer, longest_prompt(args, models)


def sample(
    args: argparse.Namespace, prompts: list, longest: int, done: Journal, tokenizer, engines: Engines
) -> list[list]:
    """Return one response of the policy per prompt, in groups of one; the journal keeps each as it finishes."""
    from tqdm import tqdm

    from evaluation.kl import Sequence

    plan = Plan(prompts, args.start, POLICY_ALONE, 1, args.seed)
    keys = [request.key for request in plan.requests({})]
    check_same_prompts(done.path, ((plan.prompt(k), done.rows[k].get("prompt")) for k in keys if k in done.rows))
    wanted = list(plan.requests(done.rows))
    if wanted:
        give_memory_back()  # what the scoring of an earlier command line has left
        generator = engines.load(args, [args.model_name_or_path, None], longest)
        stop_ids = stop_token_ids(tokenizer, args.model_name_or_path, args.trust_remote_code)
        sampling = Sampling(args.temperature, args.max_new_tokens, stop_ids)
        for response in tqdm(generator.generate(wanted, sampling), "sampling", len(wanted), file=sys.stdout):
            row = {"ids": response.token_ids, "ended": response.stop_reason == "stop"}
            done.add(response.key, row | {"prompt": plan.prompt(response.key).digest()})
        if args.is_last or default_device() == "cuda":
            engines.close()  # scoring needs its memory for two models
    rows = [done.rows[key] for key in keys]
    return [[Sequence(list(p.token_ids), r["ids"], r["ended"])] for p, r in zip(prompts, rows, strict=True)]


def read_responses(args: argparse.Namespace, tokenizer, room: int | None) -> list[list]:
    """Return the responses of a data file, grouped by prompt. Raises `UserError` if they are not the policy's."""
    data = RecordStream(args.responses, ("responses", "stop_reasons"))
    made_with = data.settings.get("generate") or {}
    check_origin(args, made_with)
    if why := data.why_not_ids_of(tokenizer_fingerprint(tokenizer)):
        print(f"{args.responses}: {why}; the responses' text is encoded")
    stop_ids = stop_token_ids(tokenizer, args.model_name_or_path, args.trust_remote_code)
    width = load_config(args.model_name_or_path, "policy", args.trust_remote_code).get_text_config().vocab_size
    groups = []
    for row, instance in enumerate(data):
        where = f"{args.responses}: row {row}"
        if not why:
            check_response_ids(where, instance, width)
        groups.append(sequences_of(where, instance, tokenizer, not why, bool(stop_ids)))
    fitting = [group for group in groups if room is None or all(len(s.prompt + s.response) <= room for s in group)]
    if len(fitting) < len(groups):
        print(
            f"{len(groups) - len(fitting)} prompts left out: longer with a response than the {room} tokens of a model"
        )
    if not fitting:
        raise UserError(f"{args.responses}: no prompt fits with its responses into the {room} tokens of the models")
    return fitting


def sequences_of(where: str, instance: dict, tokenizer, by_ids: bool, has_stop: bool) -> list:
    """Return the responses of one prompt with their sampled ids, or with those that their text encodes to.

    Args:
        where: the file and row, for the error.
        by_ids: use the sampled ids.
        has_stop: there is a stop token, of which the text of a response that ended says nothing.

    Raises:
        UserError: there is nothing to predict, or nothing to predict it from.
    """
    from evaluation.kl import ANY_STOP, Sequence

    prompt = encode_prompt(tokenizer, instance["prompt"])
    if not prompt:
        raise UserError(f"{where}: an empty prompt")
    ended = [reason == "stop" for reason in instance["stop_reasons"]]
    if by_ids:
        responses = instance["response_ids"]
    else:
        texts = [encode_response(tokenizer, text, ended=False) for text in instance["responses"]]
        responses = [ids + [ANY_STOP] * (end and has_stop) for ids, end in zip(texts, ended, strict=True)]
    if [] in responses:
        raise UserError(f"{where}: response {responses.index([])} has no tokens, not even a stop token: no KL")
    return [Sequence(prompt, ids, end) for ids, end in zip(responses, ended, strict=True)]


def check_origin(args: argparse.Namespace, made_with: dict) -> None:
    """Raise `UserError` unless the responses come from the policy alone at the temperature of the command line."""
    policy = made_with.get("policy")
    if isinstance(policy, str) and os.path.realpath(policy) != os.path.realpath(args.model_name_or_path):
        raise UserError(f"{args.responses}: sampled from {policy}, not from the policy {args.model_name_or_path}")
    temperature = made_with.get("temperature", args.temperature)
    if temperature != args.temperature:
        raise UserError(f"{args.responses}: sampled at temperature {temperature}, not {args.temperature}")
    sampler = made_with.get("sampler")
    if sampler is not None and pairs_from_json(json.dumps(sampler)) != POLICY_ALONE:
        raise UserError(f"{args.responses}: its sampler is not the policy alone, so it does not estimate its KL")


def score(args: argparse.Namespace, groups: list[list], done: Journal, tokenizer) -> dict:
    """Return the result; the journal keeps each response's score."""
    from tqdm import tqdm

    from evaluation.kl import LanguageModel, Score, batches, check_same_width, score_sequences, summarize

    names = ((args.model_name_or_path, "policy"), (args.ref_model_name_or_path, "reference"))
    models = [LanguageModel(load_scorer(args, name, what)) for name, what in names]
    check_same_width(*models)
    stop_ids = stop_token_ids(tokenizer, args.model_name_or_path, args.trust_remote_code)
    sequences = [sequence for group in groups for sequence in group]
    for batch in tqdm(list(batches(sequences, args.batch_size)), "scoring", file=sys.stdout):
        if all(f"score {i}" in done.rows for i in batch):
            continue
        chosen = [sequences[i] for i in batch]
        scores = score_sequences(*models, chosen, args.temperature, stop_ids, args.published_estimator)
        for i, found in zip(batch, scores, strict=True):
            done.add(f"score {i}", [value for value in found if value is not None])
    found = iter([Score(*done.rows[f"score {i}"]) for i in range(len(sequences))])
    return summarize([[(sequence, next(found)) for sequence in group] for group in groups])


def load_scorer(args: argparse.Namespace, name: str, what: str):
    """Return a model that scores: on the first GPU that has room, its layers on several where it needs them."""
    room = gpu_room()
    if len(room) < 2:
        return load_causal_lm(name, what, args.scoring_dtype, args.trust_remote_code).to(default_device())
    places = device_map(name, what, args.scoring_dtype, room, args.trust_remote_code)
    return load_causal_lm(name, what, args.scoring_dtype, args.trust_remote_code, device_map=places)


def gpu_room() -> dict[int, int]:
    """Return the bytes that weights can still take on each visible GPU."""
    import torch

    if torch.cuda.device_count() < 2:
        return {}
    give_memory_back()
    sizes = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return {i: max(0, int(free - (1 - USED) * total - OVERHEAD)) for i, (free, total) in enumerate(sizes)}


def report(result: dict) -> str:
    """Return one line for people."""
    stderr = "?" if result["stderr"] is None else f"{result['stderr']:.4f}"
    published = f"published estimator {result['published_kl']:.4f}; " if "published_kl" in result else ""
    return (
        f"KL {result['kl']:.4f} ± {stderr} nats per response ({result['kl_per_token']:.4f} per token) over "
        f"{result['num_prompts']} prompts; log-ratio estimate {result['log_ratio_kl']:.4f}; {published}"
        f"{result['truncated_fraction']:.0%} of the responses cut at the length limit"
    )


if __name__ == "__main__":
    run(main)
