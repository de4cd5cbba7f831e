#!/usr/bin/env bash
# Measures how far each trained model is from the base model (KL); RECIPE=iterative_prompt for that experiment.
# Every constant of alignment/recipes/safe_rlhf.sh can be set in the environment, for example:
#   SAMPLERS="online mixp" ITERS=2 RUN_DIR=/data/run bash sample_kl.sh
#   DRY_RUN=1 bash sample_kl.sh          prints the commands
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
RECIPE=${RECIPE:-safe_rlhf}
source "$(dirname "${BASH_SOURCE[0]}")/scripts/kl.sh"
