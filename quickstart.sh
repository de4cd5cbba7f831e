#!/usr/bin/env bash
# The whole system on a machine without a GPU: set-up, assets, iterations of online DPO for each sampler, report.
#   bash quickstart.sh                                  four samplers, three iterations; it says how long it will take here
#   bash quickstart.sh SAMPLERS="online mixp" ITERS=2   about 10 minutes, and set-up
# Stopped at any point, the same command continues. Takes every setting of the drivers (--help lists them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export HF_HUB_OFFLINE=1  # all that it reads is in packages

[[ ! " $* " =~ " "(-h|--help)" " ]] || exec bash alignment/sample_train_safe_rlhf.sh RECIPE=quickstart --help
if [[ ! " $* " =~ " DRY_RUN="(1|[Tt]rue|[Yy]es)" " ]]; then
    bash setup.sh cpu
    CPU_PYTHON=.venv/bin/python
    "$CPU_PYTHON" alignment/scripts/progress.py "$@"  # says how long it will take here
    source alignment/scripts/loaded.sh
fi
# The drivers hold the loop of the paper's 7B experiments; the recipe `quickstart` makes it one of a 135M model.
bash alignment/scripts/quickstart_assets.sh "$@"
for driver in train_safe_rlhf eval_safe_rlhf kl; do
    bash "alignment/sample_$driver.sh" RECIPE=quickstart "$@"
done
