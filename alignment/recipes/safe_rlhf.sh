# The paper's Safe-RLHF experiment: a 7B model learns to be harmless. 8 GPUs.
# shellcheck shell=bash

default BASE_MODEL PKU-Alignment/alpaca-7b-reproduced
default REWARD_MODEL sfairXC/FsfairX-LLaMA3-RM-v0.1
default PROMPTS PKU-Alignment/PKU-SafeRLHF-prompt
default TEMPLATE safe_rlhf
default MAX_PROMPT_CHARACTERS 128
default MAX_PROMPT_LENGTH 128
default MAX_LENGTH 256

# The first 10,000 prompts that pass the filters train every iteration, the next 2,000 test.
default TRAIN_START 0
default TRAIN_END 10000
default TEST_START 10000
default TEST_END 12000

default MARGIN_SCALE 4
default GLOBAL_BATCH 16
default PER_DEVICE_BATCH 1
