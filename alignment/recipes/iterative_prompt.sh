# The paper's Iterative-Prompt experiment: a 3B model learns to follow instructions. 8 GPUs.
# shellcheck shell=bash

default BASE_MODEL openlm-research/open_llama_3b_v2
default REWARD_MODEL sfairXC/FsfairX-LLaMA3-RM-v0.1
default PROMPTS "RLHFlow/iterative-prompt-v1-iter1-20K RLHFlow/iterative-prompt-v1-iter2-20K \
RLHFlow/iterative-prompt-v1-iter3-20K RLHFlow/iterative-prompt-v1-iter4-20K"
default TEMPLATE alpaca
default MAX_PROMPT_CHARACTERS 256
default MAX_PROMPT_LENGTH 256
default MAX_LENGTH 384

# The first 10,000 prompts that pass the filters train every iteration, the next 2,000 test.
default TRAIN_START 0
default TRAIN_END 10000
default TEST_START 10000
default TEST_END 12000

# Here mixp takes 30% of its pairs on-policy.
default PAIRS_mixp '[[0.3,[1,0],[1,0]],[0.7,[1.5,-0.5],[0.5,0.5]]]'

default MARGIN_SCALE 1
default GLOBAL_BATCH 32
default PER_DEVICE_BATCH 2
