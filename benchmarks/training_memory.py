"""Peak memory of training as the number of pairs grows: the real run_dpo.py, a tiny model.

Reads nothing; writes nothing that stays; prints a Markdown table. What is measured is the
first process of a training, the one that makes the rows; others hold less.

    python benchmarks/training_memory.py
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import PROJECT, Row, peak_memory, report

MIB = 2**20
ALLOWED = 1.2
WORDS = """
Peak memory of run_dpo.py as a process of its own: rows, reference pass over all pairs, {} optimizer steps of 32
pairs; a tiny random model. Baseline: {} pairs, ours: {} pairs, with their sampled ids.
"""
MODEL = """
import sys
from common.models import tokenizer_fingerprint
from tiny import save_tiny_policy, tiny_tokenizer
save_tiny_policy(sys.argv[1], 0)
print(tokenizer_fingerprint(tiny_tokenizer()))
"""


def make_model(folder: Path) -> str:
    """Save a tiny policy, by a process of its own: this one has to stay small; return its tokenizer's fingerprint."""
    paths = f"import sys; sys.path[:0] = {[str(PROJECT / name) for name in ('tests/support', 'alignment')]!r}\n"
    command = [sys.executable, "-c", paths + MODEL, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]


def write_pairs(path: Path, count: int, fingerprint: str) -> None:
    """Write a data file of `count` prompts with two responses each, one instance at a time."""
    rng = random.Random(0)
    head = json.dumps({"generate": {"tokenizer": fingerprint}})
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"settings": {head}, "instances": [')
        for number in range(count):
            ids = [[rng.randrange(4, 36) for _ in range(rng.randint(4, 12))] for _ in range(2)]
            texts = ["".join(chr(93 + i) for i in one) for one in ids]
            instance = {"prompt": f"a cat {number}", "responses": texts, "response_ids": ids}
            instance |= {"rewards": [rng.random() for _ in ids], "stop_reasons": ["length"] * 2}
            file.write(", " * (number > 0) + json.dumps(instance) + "\n")
        file.write("]}\n")


def train(folder: Path, count: int, steps: int) -> int:
    """Return the peak memory of a training on `count` pairs, bytes."""
    flags = {
        "model_name_or_path": folder / "policy",
        "ref_model": folder / "policy",
        "train_file": folder / f"pairs_{count}.json",
        "output_dir": folder / f"trained_{count}",
        "max_length": 32,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
        "max_steps": steps,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return peak_memory([sys.executable, str(PROJECT / "alignment/dpo_iteration/run_dpo.py"), *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, nargs=2, default=[10_000, 100_000], help="few and many (default 10000 100000)"
    )
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each training (default 50)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, peaks = Path(name), []
        fingerprint = make_model(folder / "policy")
        for count in args.pairs:
            write_pairs(folder / f"pairs_{count}.json", count, fingerprint)
            peaks.append(train(folder, count, args.steps))
    few, many = peaks
    each = (many - few) / (args.pairs[1] - args.pairs[0])
    figures = f"{few / MIB:.0f} MiB", f"{many / MIB:.0f} MiB", f"{many / few:.3f}"
    row = Row("train", *figures, f"<= {ALLOWED}", "1", f"the libraries; {each:.0f} bytes per further pair")
    report("Memory of training", WORDS.format(args.steps, *args.pairs), [row])


if __name__ == "__main__":
    main()
