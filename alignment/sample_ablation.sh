#!/usr/bin/env bash
# Compares samplers over several seeds, all from one shared iteration 1; then a table and a figure with the spread.
# Every seed is a run folder of its own, RUN_DIR/seed_N, made by the other drivers. Stopped, the same command continues.
#   bash sample_ablation.sh SEEDS="1 2 3 4 5" SAMPLERS="online pilaf mix_0.5_0.5_0.7"
#   bash sample_ablation.sh RECIPE=safe_rlhf          at the paper's size     (--help, DRY_RUN=1)
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/scripts/common.sh" RECIPE=ablation "$@"
HERE=$(dirname "$0")
SHARED=$RUN_DIR/shared
# On a CPU all stages are forks of one Python, which has the libraries loaded.
[[ -z $CPU_PYTHON || -v LOADED_PYTHON ]] || source "$HERE/scripts/loaded.sh"

# Where ITER1_MODEL is given, it is what all start from, and nothing is trained here.
bash "$HERE/sample_train_safe_rlhf.sh" RECIPE=ablation "$@" ITERS=1 RUN_DIR="$SHARED"
for seed in $SEEDS; do
    for driver in train_safe_rlhf eval_safe_rlhf kl; do
        echo "[seed $seed] sample_$driver.sh"
        bash "$HERE/sample_$driver.sh" RECIPE=ablation ITER1_MODEL="$SHARED/models/rlhflow_iter1" "$@" \
            SEED="$seed" RUN_DIR="$RUN_DIR/seed_$seed"
    done
done
stage compare_seeds
