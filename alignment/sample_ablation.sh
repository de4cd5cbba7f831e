#!/usr/bin/env bash
# Compares samplers over several seeds, all from one shared iteration 1; then a table and a figure with the spread.
# Every seed is a run folder of its own, RUN_DIR/seed_N, made by the other drivers. Stopped, the same command continues.
#   SEEDS="1 2 3 4 5" SAMPLERS="online pilaf mix_0.5_0.5_0.7" bash sample_ablation.sh
#   RECIPE=safe_rlhf bash sample_ablation.sh          at the paper's size
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
export RECIPE=${RECIPE:-ablation}
source "$(dirname "${BASH_SOURCE[0]}")/scripts/settings.sh"
one_machine

# One of the other drivers, $2, in the run folder $1, with what follows set for it.
driver() {
    local folder=$1 name=$2
    shift 2
    run "$(basename "$folder"): $name" env "RUN_DIR=$folder" "$@" bash "$ALIGNMENT/sample_$name.sh"
}

if [[ -z $ITER1_MODEL ]]; then
    driver "$RUN_DIR/shared" train_safe_rlhf ITERS=1 "SEED=$SEED"
    ITER1_MODEL=$RUN_DIR/shared/models/rlhflow_iter1
fi
for number in $SEEDS; do
    settings=("SEED=$number" "ITER1_MODEL=$ITER1_MODEL" "SAMPLERS=$SAMPLERS" "ITERS=$ITERS")
    for name in train_safe_rlhf kl eval_safe_rlhf; do driver "$RUN_DIR/seed_$number" "$name" "${settings[@]}"; done
done
read -ra seeds <<<"$SEEDS"
read -ra samplers <<<"$SAMPLERS"
run "compare seeds" "$REWARDFLOW_PYTHON" "$ALIGNMENT/evaluation/compare_seeds.py" \
    --run_dir "$RUN_DIR" --seeds "${seeds[@]}" --samplers "${samplers[@]}" --iterations "$ITERS"
