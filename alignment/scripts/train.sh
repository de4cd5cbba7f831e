# Iterations of online DPO for every sampler. Sourced by the sample_train_* drivers, which name the recipe.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

# Of several machines, which share RUN_DIR, the first one makes the data; all take part in training.
iterate() {
    if ((MACHINE_RANK == 0)); then
        generate "$1" "$2"
        annotate "$1" "$2"
    else
        wait_for "$(rewarded_data "$1" "$2")"
    fi
    train "$1" "$2"
}

# Iteration 1 is on-policy from the base model, and shared.
if [[ -z $ITER1_MODEL ]]; then iterate 1 online; fi
for ((n = 2; n <= ITERS; n++)); do
    for sampler in $SAMPLERS; do iterate "$n" "$sampler"; done
done
echo "trained: $RUN_DIR/models"
