#!/usr/bin/env bash
# Measures how far each trained model is from the base model (KL), on held-out prompts.
#   bash sample_kl.sh RECIPE=iterative_prompt RUN_DIR=/data/run     (--help, DRY_RUN=1)
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/scripts/common.sh" RECIPE=safe_rlhf "$@"

stage kl_responses    # with SCORE_KL=True: what the KL is measured on, so that reward, KL and value are of one
stage annotate_kl     # policy; where KL_TEMPERATURE is EVAL_TEMPERATURE these are the evaluation's own
stage kl
stage summarize
