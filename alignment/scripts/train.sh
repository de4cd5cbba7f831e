# Iterations of online DPO for every sampler. Sourced by the sample_train_* drivers, which name the recipe.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

# Iteration $1 with each of the samplers that follow: the responses of all first, so a sampler that cannot generate ends
# the iteration before anything is trained. Of several machines, which share RUN_DIR, the first one makes the data; all
# take part in training, for which they wait here: in training itself they would not wait for long.
iterate() {
    local n=$1 sampler
    shift
    if ((MACHINE_RANK == 0)); then
        generate "$n" "$@"
    else
        for sampler in "$@"; do wait_for "$(gen_data "$n" "$sampler")"; done
    fi
    for sampler in "$@"; do
        if ((MACHINE_RANK == 0)); then annotate "$n" "$sampler"; else wait_for "$(rewarded_data "$n" "$sampler")"; fi
        train "$n" "$sampler"
    done
}

# Iteration 1 is on-policy from the base model, and shared.
if [[ -z $ITER1_MODEL ]]; then iterate 1 online; fi
# shellcheck disable=SC2206  # a list of checked names
samplers=($SAMPLERS)
for ((n = 2; n <= ITERS; n++)); do iterate "$n" "${samplers[@]}"; done
echo "trained: $RUN_DIR/models"
