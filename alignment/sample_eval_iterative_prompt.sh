#!/usr/bin/env bash
# Evaluates what sample_train_iterative_prompt.sh trained: rewards, win rates, table, figures, report.
# Every constant of alignment/recipes/iterative_prompt.sh can be set in the environment, for example:
#   SAMPLERS="online mixp" ITERS=2 RUN_DIR=/data/run bash sample_eval_iterative_prompt.sh
#   DRY_RUN=1 bash sample_eval_iterative_prompt.sh          prints the commands
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
RECIPE=${RECIPE:-iterative_prompt}
source "$(dirname "${BASH_SOURCE[0]}")/scripts/evaluate.sh"
