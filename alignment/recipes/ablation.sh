# The quickstart's models and prompts, for comparing samplers over seeds: fewer training prompts, one iteration of their
# own.
# shellcheck shell=bash

default SAMPLERS "online offline mix_0.5_0_1 mix_0_0.5_1 mixp mix_1_1_1"
default ITERS 2
default TRAIN_END 40
default GLOBAL_BATCH 8
default KL_PROMPTS 48
# shellcheck source=quickstart.sh
source "$ALIGNMENT/recipes/quickstart.sh"
