# What the recipes share; a recipe's own values and the caller's environment come first.
# shellcheck shell=bash

default RUN_DIR "$ALIGNMENT/runs/$RECIPE"
default SAMPLERS "offline online gshf mixp"
default ITERS 3
default ITER1_MODEL ""  # a first-iteration checkpoint to start from, instead of training one
default SEED 42
default SEEDS "1 2 3"  # of sample_ablation.sh
default NEEDS_GPU 1

# Generation. A prompt is left out if it has more characters (with its template) or more tokens than this.
default MAX_PROMPT_CHARACTERS ""
default K ""  # responses a prompt: the sampler's own, mostly 2
default TEMPERATURE 0.7
default MAX_NEW_TOKENS 128
default BACKEND vllm
default GENERATION_DTYPE ""  # bfloat16 on a GPU, else float32
default MAX_NUM_SEQS 64
default TENSOR_PARALLEL_SIZE 1  # GPUs that share a model that does not fit on one
default GPU_MEMORY_UTILIZATION 0.9
default NUM_ENGINES ""  # also of annotation: as many as there are GPUs for, here or in the Ray cluster at RAY_ADDRESS

# Rewards.
default REWARD_TEMPLATE none  # prompt + response as plain text, as published
default JUDGE_MODEL ""        # a second reward model, which training never sees
default JUDGE_TEMPLATE "$REWARD_TEMPLATE"

# Training.
default LOSS_TYPE rev_kl
default CHOOSE_TYPE sampler  # the rule of the sampler's row, mostly max_min
default BETA 0.1
default LEARNING_RATE 5e-7
default LR_SCHEDULER cosine
default WARMUP_STEPS 100
default EPOCHS 2
default EVAL_FRACTION 0
default BF16 ""        # True on a GPU, else False
default SAVE_DTYPE ""  # bfloat16 with BF16, else float32
default ACCELERATE_CONFIG zero3
default GRADIENT_CHECKPOINTING True
default SAVE_STRATEGY steps
default SAVE_STEPS 200
default REPORT_TO none  # wandb, tensorboard
default NUM_MACHINES 1
default MACHINE_RANK 0
default MASTER_ADDR localhost
default MASTER_PORT 29500

# Evaluation.
default EVAL_K 1
default EVAL_TEMPERATURE 0.1
default EVAL_TRAIN_END "$TRAIN_END"
default KL_PROMPTS 200
default KL_TEMPERATURE "$TEMPERATURE"
