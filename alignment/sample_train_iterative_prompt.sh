#!/usr/bin/env bash
# Trains: the paper's Iterative-Prompt experiment: the loop of sample_train_safe_rlhf.sh with another recipe.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/sample_train_safe_rlhf.sh" RECIPE=iterative_prompt "$@"
