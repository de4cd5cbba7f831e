#!/usr/bin/env bash
# Evaluates what sample_train_safe_rlhf.sh trained: rewards, win rates, table, figures, report.
# Every constant of alignment/recipes/safe_rlhf.sh can be set in the environment, for example:
#   SAMPLERS="online mixp" ITERS=2 RUN_DIR=/data/run bash sample_eval_safe_rlhf.sh
#   DRY_RUN=1 bash sample_eval_safe_rlhf.sh          prints the commands
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
RECIPE=${RECIPE:-safe_rlhf}
source "$(dirname "${BASH_SOURCE[0]}")/scripts/evaluate.sh"
