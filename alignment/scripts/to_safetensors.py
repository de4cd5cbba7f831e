"""Converts a causal language model with pickled weights to safetensors, the only form that the pipeline loads.

Reads   a model folder or hub name. Pickles are read in torch's restricted mode, which runs none of their code.
Writes  DIR: the same model and tokenizer, in its own dtype.

    python alignment/scripts/to_safetensors.py --model_name_or_path openlm-research/open_llama_3b_v2 --output_dir DIR
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, first_line, run
from common.records import rename_flushed


def main() -> None:
    flags = Parser(__doc__)
    flags.add("--model_name_or_path", "folder or hub name", required=True)
    flags.add("--output_dir", "where the converted model goes", required=True)
    args = flags.parse_args()
    if os.path.exists(args.output_dir):
        raise UserError(f"{args.output_dir}: exists already")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    temporary = args.output_dir.rstrip("/") + ".tmp"
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype="auto", weights_only=True)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    except Exception as error:  # pickles that hold more than tensors, files that are missing or torn, ...
        raise UserError(f"{args.model_name_or_path}: cannot be loaded ({first_line(error)})") from None
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    rename_flushed(temporary, args.output_dir)
    print(f"to_safetensors: wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
