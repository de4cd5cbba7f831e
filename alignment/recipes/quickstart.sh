# The embedded default: a 135M policy, real safety prompts and a reward model from human labels, on 2 CPU cores.
# quickstart.sh makes the assets. Everything is the paper's but the sizes and the learning rate.
# shellcheck shell=bash

default ASSETS "$ALIGNMENT/assets"
default BASE_MODEL "$ASSETS/policy"
default REWARD_MODEL "$ASSETS/reward_model"
default JUDGE_MODEL "$ASSETS/judge"
default PROMPTS "$ASSETS/prompts.jsonl"
default TEMPLATE chat
default MAX_PROMPT_LENGTH 96
default MAX_NEW_TOKENS 32
default MAX_NUM_SEQS 96  # what the engine's 1 GiB of cache holds
default MAX_LENGTH 128
default NEEDS_GPU 0
default GPUS 0

default TRAIN_START 0
default TRAIN_END 80
default TEST_START 400
default TEST_END 496
default KL_PROMPTS 64
default TEMPERATURE 1.0  # at 0.7 the small model's two responses are often alike

# The reward model compares responses as it was trained: through its own chat template.
default REWARD_TEMPLATE chat

default MARGIN_SCALE 4
default LEARNING_RATE 2e-5  # 135M parameters and few steps: 40 times the paper's
default LR_SCHEDULER linear
default WARMUP_STEPS 0
default GLOBAL_BATCH 16
default PER_DEVICE_BATCH 8
default ACCELERATE_CONFIG single
default GRADIENT_CHECKPOINTING False
default SAVE_STRATEGY no

# The policy's weights come in bfloat16; the few small steps from there would be lost in its spacing.
default SAVE_DTYPE float32

# Twice as fast where the CPU multiplies bfloat16 itself; elsewhere it would be slower.
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then default BF16 True; fi
