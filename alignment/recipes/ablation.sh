# The quickstart's models and prompts, for comparing samplers over seeds: more test prompts, one iteration of their own.
# shellcheck shell=bash

default SAMPLERS "online offline mix_0.5_0_1 mix_0_0.5_1 mixp mix_1_1_1"
default ITERS 2
default TEST_END 496
default KL_PROMPTS 48
# shellcheck source=quickstart.sh
source "$ALIGNMENT/recipes/quickstart.sh"
