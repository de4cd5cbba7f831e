#!/usr/bin/env bash
# Trains: iterations of online DPO for each sampler; the paper's Safe-RLHF experiment, unless RECIPE says another.
#   bash sample_train_safe_rlhf.sh SAMPLERS="online mixp" ITERS=2 RUN_DIR=/data/run
#   bash sample_train_safe_rlhf.sh DRY_RUN=1     prints the commands
#   bash sample_train_safe_rlhf.sh --help        lists every setting
# Stopped at any point, the same command continues.
# shellcheck source-path=SCRIPTDIR disable=SC2086  # $SAMPLERS is a list of checked names
source "$(dirname "$0")/scripts/common.sh" RECIPE=safe_rlhf "$@"

# Iteration 1 is on-policy from the base model, and shared by all samplers.
stage generate 1 online
stage annotate 1 online
stage train 1 online

# From there each sampler goes on alone: responses of its model, their rewards, its next model.
for ((n = 2; n <= ITERS; n++)); do
    stage generate "$n" $SAMPLERS
    stage annotate "$n" $SAMPLERS
    stage train "$n" $SAMPLERS
done
echo "trained: $RUN_DIR/models"
