"""Trains a reward model from preference pairs (Bradley-Terry: P(chosen beats rejected) = sigmoid of the difference).

Reads:   preference pairs {"prompt", "chosen", "rejected"}: JSONL, JSON, CSV or Parquet, compressed or not, a folder
         of such files or one saved by `datasets`, a hub's name; any encoder or decoder model.
Writes:  DIR, a sequence classifier with one label, its tokenizer, and metrics.json: settings, inputs and pair
         accuracy on held-out prompts. DIR appears when everything is finished.

A pair is rendered by the tokenizer's chat template; where it has none, or with --plain_template, by a plain one
(turns joined by a line break). It is saved with the model, so that `get_rewards.py --reward_template chat` feeds it
what it was trained on. A model of --mean_pooling is read rightly by this project alone: others score its last token.

    python alignment/reward_model/train_reward_model.py --model_name_or_path ENCODER --train_file pairs.jsonl \\
        --output_dir reward_model --trainable_layers 2 --max_steps 100
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, fraction, natural, positive, positive_int, run
from common.journal import refuse_other_settings
from common.models import context_length, default_device, load_config, load_reward_model, load_tokenizer
from common.provenance import data_inputs, model_inputs, provenance
from common.records import read_json, rename_flushed, write_json, writing
from common.sources import content_of
from reward_model.preference_data import read_pairs, split_by_prompt

PLAIN_TEMPLATE = (
    "{% for turn in messages %}{{ turn['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--model_name_or_path", "model to start from: folder or hub name", required=True)
    flags.add("--train_file", "preference pairs: file, folder, or hub name (split train)", required=True)
    flags.add("--output_dir", "folder for the trained model", required=True)
    flags.add(
        "--max_length",
        "tokens kept of a text, in training and later",
        type=positive_int,
        default=96,
    )
    flags.add("--first_layers", "keep the first N layers of the model only; without it all", type=positive_int)
    flags.add(
        "--trainable_layers",
        "train only the last N layers and the head; without it all",
        type=positive_int,
    )
    # None and not False where they are not given: models that were trained before these flags keep their settings.
    switch = {"action": "store_true", "default": None}
    flags.add("--mean_pooling", "score the mean over all tokens, not the last one (decoders)", **switch)
    flags.add("--plain_template", "the plain template in place of the tokenizer's", **switch)
    flags.add(
        "--dtype",
        "of what is multiplied, in training and for the accuracy on held-out pairs; weights are float32 (default: "
        "float32, but training on a GPU bfloat16)",
        choices=("float32", "bfloat16"),
    )
    flags.add("--learning_rate", "peak of AdamW, falling to 0 linearly", type=positive, default=3e-4)
    flags.add("--batch_size", "pairs in one step on one device", type=positive_int, default=8)
    flags.add("--gradient_accumulation_steps", "steps joined in one update", type=positive_int, default=1)
    flags.add("--num_train_epochs", "passes over the pairs", type=positive, default=1.0)
    flags.add("--max_steps", "updates; overrides --num_train_epochs", type=positive_int)
    flags.add(
        "--eval_fraction",
        "share of pairs held out, with prompts of their own",
        type=fraction,
        default=0.2,
    )
    flags.add("--seed", "of the split, the order, the new head and dropout", type=natural, default=0)
    return flags


def main() -> None:
    args = parser().parse_args()
    pairs = read_pairs(args.train_file)
    # A model stays what it is where the type has another default, on another machine; metrics.json has it.
    settings = {k: v for k, v in vars(args).items() if k not in ("output_dir", "dtype")}
    settings |= {f"train_{k}": v for k, v in content_of(args.train_file, "train").items()}
    if is_done(args.output_dir, settings):
        return
    tokenizer = prepare_tokenizer(args)
    different = different_pairs(args, tokenizer, pairs)
    held_out, training = split_by_prompt(different, args.eval_fraction, args.seed)
    if not training:
        raise UserError(f"{args.train_file}: no pairs are left to train on; it needs more than one prompt")
    unfinished = Path(args.output_dir.rstrip("/") + ".tmp")
    trainer = train(args, tokenizer, training, unfinished)
    if trainer.is_world_process_zero():
        save(trainer.model, tokenizer, unfinished)
        metrics = {"train_pairs": len(training), "dropped_pairs": len(pairs) - len(different)}
        metrics |= {**evaluate(unfinished, held_out, args.dtype or "float32"), "settings": settings}
        metrics["dtype"] = "bfloat16" if trainer.args.bf16 else "float32"
        inputs = model_inputs({"base model": args.model_name_or_path}) + data_inputs([args.train_file])
        metrics["provenance"] = {"train": provenance(["accelerate"], inputs)}
        write_json(unfinished / "metrics.json", metrics)
        with writing(args.output_dir):
            rename_flushed(unfinished, args.output_dir)
        print(report(metrics))


def is_done(output_dir: str, settings: dict) -> bool:
    """Whether `output_dir` already holds this training's result; raises `UserError` where it holds another's."""
    if not Path(output_dir).exists():
        return False
    metrics = Path(output_dir) / "metrics.json"
    stored = read_json(metrics) if metrics.is_file() else {}
    refuse_other_settings(output_dir, stored.get("settings") if isinstance(stored, dict) else None, settings)
    print(f"{output_dir}: already done; {report(stored)}")
    return True


def prepare_tokenizer(args):
    """The model's tokenizer, with what annotation needs to build the same inputs: chat template and length."""
    tokenizer = load_tokenizer(args.model_name_or_path, "model")
    if args.plain_template or not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    readable = context_length(load_config(args.model_name_or_path, "model"), tokenizer)
    tokenizer.model_max_length = min(args.max_length, readable or args.max_length)
    if tokenizer.model_max_length < args.max_length:
        print(f"--max_length {args.max_length}: the model reads {tokenizer.model_max_length}; texts are cut there")
    tokenizer.padding_side = "right"
    return tokenizer


def different_pairs(args, tokenizer, pairs: list[dict]) -> list[dict]:
    """The pairs whose two texts differ in what the model reads. Raises `UserError` if there are none."""
    from reward_model.bradley_terry import pair_tokens

    tokens = pair_tokens(tokenizer, pairs)
    found = [pair for pair, (chosen, rejected) in zip(pairs, tokens, strict=True) if chosen != rejected]
    alike = f"of {len(pairs)} pairs are alike in the {tokenizer.model_max_length} tokens that are kept of a text"
    if not found:
        raise UserError(f"{args.train_file}: {len(pairs)} {alike} (--max_length)")
    if len(found) < len(pairs):
        print(f"{args.train_file}: {len(pairs) - len(found)} {alike}, and dropped")
    return found


def train(args, tokenizer, pairs: list[dict], folder: Path):
    """The finished trainer."""
    from transformers import TrainingArguments, set_seed

    from reward_model.bradley_terry import BradleyTerryTrainer, freeze_all_but_last, pair_tokens

    set_seed(args.seed)  # the new head is drawn when the model is loaded
    changes = {"num_labels": 1, "mean_pooling": args.mean_pooling}
    if args.first_layers:
        changes["num_hidden_layers"] = layers_kept(args)
    model = load_reward_model(args.model_name_or_path, "float32", needs_head=False, **changes)
    if args.trainable_layers:
        freeze_all_but_last(model, args.trainable_layers)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    on_gpu = default_device() == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps or -1,
        warmup_steps=0.1,  # below 1: a share of all steps
        seed=args.seed,
        bf16=args.dtype == "bfloat16" or (on_gpu and not args.dtype),
        use_cpu=not on_gpu,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a plain process uses one GPU, not DataParallel on all
    trainer = BradleyTerryTrainer(model, arguments, pair_tokens(tokenizer, pairs))
    trainer.train()
    return trainer


def layers_kept(args) -> int:
    """Return --first_layers. Raises `UserError` where the model has fewer: the rest would be random."""
    config = load_config(args.model_name_or_path, "model").get_text_config()
    if args.first_layers > config.num_hidden_layers:
        raise UserError(f"--first_layers {args.first_layers}: the model has {config.num_hidden_layers} layers")
    return args.first_layers


def save(model, tokenizer, folder: Path) -> None:
    """Saves model and tokenizer in `folder`."""
    # pad_right changed it from batch to batch.
    config = model.config.get_text_config()
    known = tokenizer.pad_token_id is not None and tokenizer.pad_token_id < config.vocab_size
    model.config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id if known else None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluate(folder: Path, pairs: list[dict], dtype: str) -> dict:
    """Accuracies and loss of the saved model on held-out pairs, scored exactly as annotation scores."""
    import torch

    from annotate_data.scorer import RewardScorer
    from reward_model.bradley_terry import bradley_terry_losses, hits, length_matched_accuracy, pair_texts

    names = ("eval_accuracy", "eval_accuracy_length_matched", "eval_loss", "shorter_is_chosen")
    if not pairs:
        return {"eval_pairs": 0, **dict.fromkeys(names)}
    scorer = RewardScorer(str(folder), dtype=dtype)
    texts = [text for pair in pairs for text in pair_texts(scorer.tokenizer, pair)]
    scores = torch.tensor(scorer.score(texts)).view(-1, 2)
    lengths = torch.tensor([[len(p["chosen"]), len(p["rejected"])] for p in pairs])
    right, shorter = hits(*scores.T), hits(*-lengths.T)
    figures = (
        right.mean().item(),
        length_matched_accuracy(right, shorter),
        bradley_terry_losses(*scores.T).mean().item(),
        # What a rule that knows nothing but length would get.
        shorter.mean().item(),
    )
    return {"eval_pairs": len(pairs), **dict(zip(names, figures, strict=True))}


def report(metrics: dict) -> str:
    """One line on how good the model is."""
    if not metrics["eval_pairs"]:
        return f"{metrics['train_pairs']} training pairs, none held out"
    matched, dtype = metrics.get("eval_accuracy_length_matched"), metrics.get("dtype")
    beside = "" if matched is None else f"{matched:.3f} with lengths matched; "
    return (
        f"pair accuracy {metrics['eval_accuracy']:.3f} on {metrics['eval_pairs']} pairs of held-out prompts "
        f"({beside}choosing the shorter answer gets {metrics['shorter_is_chosen']:.3f} and 0.5; "
        f"loss {metrics['eval_loss']:.3f}{f'; trained in {dtype}' if dtype else ''})"
    )


if __name__ == "__main__":
    run(main)
