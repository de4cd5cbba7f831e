#!/usr/bin/env bash
# The whole system on a machine without a GPU: set-up, assets, iterations of online DPO for each sampler, report.
#   bash quickstart.sh                                  four samplers, three iterations: about 30 minutes on 2 cores
#   SAMPLERS="online mixp" ITERS=2 bash quickstart.sh   about 10 minutes, and set-up
# Stopped at any point, the same command continues. Any constant of alignment/recipes/quickstart.sh can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export RECIPE=quickstart HF_HUB_OFFLINE=1

echo "quickstart: a real 135M model, real prompts and a reward model from human labels; samplers:" \
    "${SAMPLERS:-offline online gshf mixp}; iterations: ${ITERS:-3}. About 30 minutes on 2 cores for all of it."
bash setup.sh cpu
bash alignment/scripts/quickstart_assets.sh
bash alignment/sample_train_safe_rlhf.sh
bash alignment/sample_eval_safe_rlhf.sh
bash alignment/sample_kl.sh
