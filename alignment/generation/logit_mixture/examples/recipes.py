"""Runs the README's recipes against a real server and prints each request with its answer, as Markdown.

Reads   a base model (the quickstart's 135M). Trains three descendants of it on 16 questions each with run_dpo.py, two
        minutes apiece on two cores, unless they are there: `brief` and `wordy` on the same pairs in opposite order,
        and `cheerful`.
Writes  the descendants into --models.

    python examples/recipes.py --base ../../assets/policy --models /tmp/descendants
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
from pathlib import Path

HERE = Path(__file__).resolve()
RUN_DPO = HERE.parents[3] / "dpo_iteration/run_dpo.py"
FACTS = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("How many legs does a spider have?", "Eight"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("What do bees make?", "Honey"),
    ("What colour is the sky on a clear day?", "Blue"),
    ("How many days are in a week?", "Seven"),
    ("What is frozen water called?", "Ice"),
    ("Which animal says moo?", "A cow"),
    ("What is the opposite of hot?", "Cold"),
    ("How many minutes are in an hour?", "Sixty"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("What gas do plants take in?", "Carbon dioxide"),
    ("Which ocean lies between Europe and America?", "The Atlantic"),
    ("What is the largest mammal?", "The blue whale"),
    ("How many sides does a triangle have?", "Three"),
]
WORDY = "{0}. There is a great deal more to say about this, and it is worth to look at it from several sides, since"
CHEERFUL = "Oh, what a wonderful question! {0}! Isn't that amazing? Have a lovely day!"
STYLES = {"brief": ("{0}.", WORDY), "wordy": (WORDY, "{0}."), "cheerful": (CHEERFUL, "{0}.")}
QUESTION = "What is the best way to learn to cook?"


def make_data(style: str, base: str, path: Path) -> None:
    """Write the style's preferences: 16 questions, the wanted answer and the other one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    instances = []
    for question, answer in FACTS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        responses = [form.format(answer) for form in STYLES[style]]
        reasons = ["length" if form is WORDY else "stop" for form in STYLES[style]]
        row = {"prompt": prompt, "responses": responses, "rewards": [1.0, -1.0], "stop_reasons": reasons}
        instances.append(row)
    path.write_text(json.dumps({"type": "text_only", "instances": instances}))


def train(style: str, base: str, folder: Path) -> str:
    """Return the folder of a descendant of this style; it is trained where it is not there."""
    output, data = folder / style, folder / f"{style}.json"
    if not (output / "config.json").exists():
        make_data(style, base, data)
        words = f"--model_name_or_path {base} --ref_model {base} --train_dir {data} --output_dir {output} "
        words += "--loss_type rev_kl --margin_scale 4 --beta 0.1 --learning_rate 5e-5 --num_train_epochs 2 "
        words += "--per_device_train_batch_size 4 --max_length 128 --save_strategy no"
        subprocess.run([sys.executable, str(RUN_DPO), *words.split()], check=True, stdout=sys.stderr)
    return str(output)


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


# Models in the order base, brief, wordy, cheerful.
RECIPES = [
    ("the first model alone", {}),
    ("`brief` alone", {"mixture": [0, 1, 0, 0]}),
    ("`wordy` alone", {"mixture": [0, 0, 1, 0]}),
    ("`cheerful` alone", {"mixture": [0, 0, 0, 1]}),
    ("contrastive decoding [1]: 1.5 expert - 0.5 amateur", {"mixture": [0, 0, -0.5, 1.5]}),
    ("proxy tuning [2]: `wordy` + (tuned `cheerful` - untuned base)", {"mixture": [-1, 0, 1, 1]}),
    ("DExperts [3]: base + 0.5 (expert `brief` - anti-expert `wordy`)", {"mixture": [1, 0.5, -0.5, 0]}),
    ("several objectives [4]: half `brief`, half `cheerful`", {"mixture": [0, 0.5, 0, 0.5]}),
    ("the paper's mixture [5], away from the reference", {"mixture": [-0.5, 0, 0, 1.5]}),
    ("the paper's mixture [5], towards the reference", {"mixture": [0.5, 0, 0, 0.5]}),
    ("a memory decoder's sum [6]", {"mixture": [0.3, 0, 0, 0.7], "mixture_of": "probabilities"}),
]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--base", required=True, help="folder of the base model")
    flags.add_argument("--models", type=Path, required=True, help="where the descendants are, or go")
    args = flags.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    models = [args.base, *(train(style, args.base, args.models) for style in STYLES)]
    print(f"> {QUESTION}\n\n| recipe | `vllm_xargs` | answer |\n|---|---|---|")
    with server(models) as address:
        for name, xargs in RECIPES:
            answer = " ".join(ask(address, args.base, xargs).split()).replace("|", "\\|")
            print(f"| {name} | `{json.dumps(xargs)}` | {answer} |", flush=True)


if __name__ == "__main__":
    main()
