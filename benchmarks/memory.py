"""Peak memory of generation and annotation as the number of prompts grows: the real scripts, tiny models.

Reads   the quickstart's prompts (alignment/assets), repeated as often as needed. Writes nothing that stays; prints a
        Markdown table.

The models are small enough for 100,000 prompts. They keep several layers of each token, since a page of vLLM's cache
(1 GiB) is in memory only when it was written: what fills it late looks like growth.

    python benchmarks/memory.py
    python benchmarks/memory.py --prompts 1000 10000 --max_new_tokens 16
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, PROJECT, Row, peak_memory, report

MIB = 2**20
ALLOWED = 1.2
WORDS = """
Peak memory of the real scripts as processes of their own, two responses per prompt (of at most {} tokens where they
are generated), tiny random models; baseline: few prompts, ours: many. vLLM's cache is 1 GiB of both.
"""
MODELS = """
import sys
from tiny import save_tiny_policy, save_tiny_reward_model
shape = {"hidden": 64, "heads": 2, "layers": 4, "context": 256, "sharpness": 6.0}
save_tiny_policy(sys.argv[1] + "/policy", 0, **shape)
save_tiny_policy(sys.argv[1] + "/reference", 1, **shape)
save_tiny_reward_model(sys.argv[1] + "/reward", 2, context=256)
"""


def make_models(folder: Path) -> None:
    """Policy, reference and reward model of random weights, by a process of its own: this one has to stay small."""
    command = [sys.executable, "-c", MODELS, str(folder)]
    subprocess.run(command, cwd=PROJECT / "tests/support", check=True, capture_output=True)


def write_prompts(path: Path, count: int) -> None:
    """The first `count` of the real prompts, repeated without end."""
    lines = [line for line in (ASSETS / "prompts.jsonl").read_text().splitlines() if len(line) < 120]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{lines[i % len(lines)]}\n" for i in range(count))


def generate(folder: Path, count: int, backend: str, max_new_tokens: int) -> int:
    """Peak memory of generate.py, bytes."""
    flags = {
        "model_name_or_path": folder / "policy",
        "ref_model_name_or_path": folder / "reference",
        "dataset_name_or_path": folder / f"prompts_{count}.jsonl",
        "sampler": "mixp",
        "max_new_tokens": max_new_tokens,
        "max_num_seqs": 256,
        "backend": backend,
        "output_file": folder / f"{backend}_{count}.json",
    }
    return peak_memory(command("generation/generate.py", flags))


def annotate(folder: Path, count: int, **reward: object) -> int:
    """Peak memory of get_rewards.py on `count` rows of two responses and 24 ids each, bytes."""
    data = folder / f"responses_{count}.json"
    with open(data, "w", encoding="utf-8") as file:
        file.write('{"instances": [')
        for i in range(count):
            ids = [i % 30] * 24
            row = {"prompt": f"prompt {i}", "responses": ["a" * (i % 40), f"b {i}"], "response_ids": [ids, ids]}
            file.write(",\n" * (i > 0) + json.dumps(row))
        file.write("]}")
    flags = {"dataset_name_or_path": data, **reward, "output_file": folder / f"{next(iter(reward))}_{count}.json"}
    return peak_memory(command("annotate_data/get_rewards.py", flags))


def annotate_by_model(folder: Path, count: int) -> int:
    """Peak memory with a reward model."""
    return annotate(folder, count, reward_name_or_path=folder / "reward")


def annotate_by_function(folder: Path, count: int) -> int:
    """Peak memory with a function of the user's own; torch is not imported then."""
    (folder / "rules.py").write_text(
        "def length(prompt, responses, fields):\n    return [len(r) for r in responses]\n"
    )
    return annotate(folder, count, reward_function=f"{folder / 'rules.py'}:length")


def command(script: str, flags: dict) -> list[str]:
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, str(PROJECT / "alignment" / script), *words]


def row(case: str, few: int, many: int, counts: list[int]) -> Row:
    """How one script's peak grew from the smaller to the larger number of prompts."""
    each = (many - few) / (counts[1] - counts[0]) / 1024
    figures = f"{few / MIB:.0f} MiB", f"{many / MIB:.0f} MiB", f"{many / few:.3f}"
    return Row(case, *figures, f"<= {ALLOWED}", "1", f"the libraries; {each:.1f} KiB a further prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, nargs=2, default=[10_000, 100_000], help="few and many (default 10000 100000)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=2, help="of a response (default 2)")
    parser.add_argument("--only", default="", help="only cases whose name begins so")
    args = parser.parse_args()
    few, many = args.prompts
    cases = {
        "generate, vLLM": lambda folder, count: generate(folder, count, "vllm", args.max_new_tokens),
        "generate, transformers": lambda folder, count: generate(folder, count, "hf", args.max_new_tokens),
        "annotate": annotate_by_model,
        "annotate with a function": annotate_by_function,
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        for count in args.prompts:
            write_prompts(folder / f"prompts_{count}.jsonl", count)
        for case, peak in cases.items():
            if case.startswith(args.only):
                name = f"{case}, {few:,} and {many:,} prompts"
                rows.append(row(name, *(peak(folder, count) for count in args.prompts), args.prompts))
    report("Memory", WORDS.format(args.max_new_tokens), rows)


if __name__ == "__main__":
    main()
