# Iterations of online DPO for every sampler. Sourced by the sample_train_* drivers, which name the recipe.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

iterate() { generate "$1" "$2"; annotate "$1" "$2"; train "$1" "$2"; }

# Iteration 1 is on-policy from the base model, and shared.
if [[ -z $ITER1_MODEL ]]; then iterate 1 online; fi
for ((n = 2; n <= ITERS; n++)); do
    for sampler in $SAMPLERS; do iterate "$n" "$sampler"; done
done
echo "trained: $RUN_DIR/models"
