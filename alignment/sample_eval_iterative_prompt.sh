#!/usr/bin/env bash
# Evaluates the models of the paper's Iterative-Prompt experiment: the loop of sample_eval_safe_rlhf.sh with another recipe.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/sample_eval_safe_rlhf.sh" RECIPE=iterative_prompt "$@"
