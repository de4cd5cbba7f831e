"""vLLM's OpenAI-compatible server, with an engine that mixes the logits of several models.

    python -m vllm_logit_mixture.serve POLICY --with REFERENCE --with THIRD [any vLLM flag]

A request without weights gets POLICY alone. With them, one per model in the order of the command line:

    client.completions.create(..., extra_body={"vllm_xargs": {"mixture": [1.5, -0.5, 0.0]}})
"""

import argparse
import functools
import sys
from typing import NoReturn

from vllm_logit_mixture import MixtureError, engine_options
from vllm_logit_mixture.check import check_options, room
from vllm_logit_mixture.environment import set_defaults
from vllm_logit_mixture.weights import KEY

# Where the user says nothing. A prompt split over steps winds a seeded request's random stream back, which torch
# cannot do on a CPU; blocks of vLLM's own size are longer there than most prompts.
CPU_DEFAULTS = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}


def parser() -> argparse.ArgumentParser:
    """Return the parser of our own flags; vLLM reads the rest."""
    flags = argparse.ArgumentParser("vllm_logit_mixture.serve", description=__doc__, allow_abbrev=False)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("policy", metavar="POLICY", help="the first model: folder or hub name")
    flags.add_argument("--with", dest="others", metavar="MODEL", action="append", default=[], help="one more model")
    flags.error = refuse
    return flags


def refuse(message: str) -> NoReturn:
    """Raise `MixtureError`: what argparse finds wrong, without the usage of vLLM's hundreds of flags."""
    raise MixtureError(message)


def server_arguments(argv: list[str], on_gpu: bool) -> argparse.Namespace:
    """Return what vLLM's server is started with.

    Raises:
        MixtureError: models or options that one engine cannot hold.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    own, rest = parser().parse_known_args(argv)
    vllm_flags = make_arg_parser(FlexibleArgumentParser("vllm_logit_mixture.serve"))
    vllm_flags.error = refuse
    args = vllm_flags.parse_args(rest)
    if args.model_tag or args.model != vllm_flags.get_default("model"):
        raise MixtureError(f"{args.model_tag or args.model}: give the first model first, each other one with --with")
    check_options(vars(args))
    models = [own.policy, *own.others]
    options = engine_options(models, args.trust_remote_code)
    args.model = options["model"]
    args.hf_overrides = {**(args.hf_overrides or {}), **options["hf_overrides"]}
    args.logits_processors = [*(args.logits_processors or []), *options["logits_processors"]]
    if args.max_model_len is None:
        args.max_model_len = room(models, args.trust_remote_code)
    elif (most := room(models[1:], args.trust_remote_code)) is not None and args.max_model_len > most:
        raise MixtureError(f"--max-model-len {args.max_model_len}: one of the other models reads {most} tokens")
    if not on_gpu:
        for name, value in CPU_DEFAULTS.items():
            setattr(args, name, getattr(args, name) or value)
    validate_parsed_serve_args(args)
    return args


def refuse_beams() -> None:
    """Let requests for a beam search with weights fail: vLLM would search with the first model alone."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind in (ChatCompletionRequest, CompletionRequest):
        kind.to_beam_search_params = _without_weights(kind.to_beam_search_params)


def _without_weights(method):
    @functools.wraps(method)
    def checked(request, *args, **options):
        if KEY in (request.vllm_xargs or {}):
            raise ValueError(f"{KEY}: beam search has no weights")
        return method(request, *args, **options)

    return checked


def main(argv: list[str] | None = None) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    set_defaults(on_gpu, server=True)
    try:
        args = server_arguments(sys.argv[1:] if argv is None else argv, on_gpu)
    except MixtureError as error:
        print(f"vllm_logit_mixture.serve: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    configure_logging_from_args(args)
    refuse_beams()
    uvloop.run(run_server(args))


if __name__ == "__main__":
    main()
