"""Sends the README's recipes to a real server and prints each request with its answer, as a Markdown table.

Reads four models of one vocabulary: a base, and three that were trained from it. In the project's top folder
`bash quickstart.sh SAMPLERS="online mixp" ITERS=2` makes such models, in this order alignment/assets/policy and
rlhflow_iter1, rlhflow_iter2_online, rlhflow_iter2_mixp of the run's folder models/.

    python examples/recipes.py BASE FIRST ONLINE MIXP
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

QUESTION = "What is the best way to learn to cook?"


@contextlib.contextmanager
def server(models: list[str]):
    """Start the server on these models; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = [word for name in models[1:] for word in ("--with", name)]
    flags = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    command = [sys.executable, "-m", "vllm_logit_mixture.serve", models[0], *others, *flags]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit("the server ended")
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200:
                    break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def ask(address: str, model: str, xargs: dict) -> str:
    """Return the answer to QUESTION; greedy, at most 40 tokens."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=40,
        extra_body={"vllm_xargs": xargs},
    )
    return answer.choices[0].message.content


# Models in the order base, `first` (one iteration of DPO), `online` and `mixp` (two iterations).
RECIPES = [
    ("the first model alone", {}),
    ("`first` alone", {"mixture": [0, 1, 0, 0]}),
    ("`online` alone", {"mixture": [0, 0, 1, 0]}),
    ("`mixp` alone", {"mixture": [0, 0, 0, 1]}),
    ("contrastive decoding [1]: 1.5 expert `online` - 0.5 amateur `first`", {"mixture": [0, -0.5, 1.5, 0]}),
    ("proxy tuning [2]: `online` + (tuned `first` - untuned base)", {"mixture": [-1, 1, 1, 0]}),
    ("DExperts [3]: base + 2 (expert `mixp` - anti-expert `first`)", {"mixture": [1, -2, 0, 2]}),
    ("several objectives [4]: half `online`, half `mixp`", {"mixture": [0, 0, 0.5, 0.5]}),
    ("the paper's mixture [5], away from the reference", {"mixture": [-0.5, 0, 0, 1.5]}),
    ("the paper's mixture [5], towards the reference", {"mixture": [0.5, 0, 0, 0.5]}),
    ("the project's sampler `history-mixp`, its first side", {"mixture": [-0.25, -0.25, 0, 1.5]}),
    ("a memory decoder's sum [6]", {"mixture": [0.3, 0, 0, 0.7], "mixture_of": "probabilities"}),
]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "first", "online", "mixp"):
        flags.add_argument(name, help="folder of a model")
    models = list(vars(flags.parse_args()).values())
    print(f"> {QUESTION}\n\n| recipe | `vllm_xargs` | answer |\n|---|---|---|")
    with server(models) as address:
        for name, xargs in RECIPES:
            answer = " ".join(ask(address, models[0], xargs).split()).replace("|", "\\|")
            print(f"| {name} | `{json.dumps(xargs)}` | {answer} |", flush=True)


if __name__ == "__main__":
    main()
