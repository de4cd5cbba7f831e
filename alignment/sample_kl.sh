#!/usr/bin/env bash
# Measures how far each trained model is from the base model (KL), on held-out prompts.
#   bash sample_kl.sh RECIPE=iterative_prompt RUN_DIR=/data/run     (--help, DRY_RUN=1)
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/scripts/common.sh" RECIPE=safe_rlhf "$@"

stage kl
stage summarize
