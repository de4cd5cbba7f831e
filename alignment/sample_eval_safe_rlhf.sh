#!/usr/bin/env bash
# Evaluates what sample_train_safe_rlhf.sh trained: rewards, a judge's scores, win rates, table, figures, report.
#   bash sample_eval_safe_rlhf.sh SAMPLERS="online mixp" ITERS=2 RUN_DIR=/data/run     (--help, DRY_RUN=1)
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/scripts/common.sh" RECIPE=safe_rlhf "$@"

stage evaluate              # every model answers the test prompts and the train prompts
stage annotate_evaluation   # their rewards, and the scores of JUDGE_MODEL, where there is one
stage summarize
