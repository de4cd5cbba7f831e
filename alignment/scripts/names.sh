# The one place that builds names inside RUN_DIR.
# shellcheck shell=bash

# The model after iteration $1 with sampler $2; iteration 0 is the base model, iteration 1 is shared by all samplers.
model_of() {
    case $1 in
        0) echo "$BASE_MODEL" ;;
        1) echo "${ITER1_MODEL:-$RUN_DIR/models/rlhflow_iter1}" ;;
        *) echo "$RUN_DIR/models/rlhflow_iter$1_$2" ;;
    esac
}

# Training data of iteration $1 with sampler $2, before and after annotation.
gen_data() { echo "$RUN_DIR/data/gen_data_iter$1_$2.json"; }
rewarded_data() { echo "$RUN_DIR/data/data_with_rewards_iter$1_$2.json"; }

# Evaluation of the model after iteration $3 with sampler $2, on the prompts $1: 0 = test prompts, 1 = train prompts.
# Models that all samplers share have the names `base` (iteration 0) and `iter1`.
eval_gen_data() { echo "$RUN_DIR/data/test_gen_data_iter$1_$2_$3.json"; }
eval_rewarded_data() { echo "$RUN_DIR/data/test_data_with_rewards_iter$1_$2_$3.json"; }
eval_judged_data() { echo "$RUN_DIR/data/test_data_with_judge_iter$1_$2_$3.json"; }
kl_result() { echo "$RUN_DIR/results/kl_$1_$2.json"; }

# Every trained model and the base model, as lines of "iteration label".
all_models() {
    local n sampler
    echo "0 base"
    echo "1 iter1"
    for ((n = 2; n <= ITERS; n++)); do
        for sampler in $SAMPLERS; do echo "$n $sampler"; done
    done
}

# Whether the model $1 $2 (iteration, label) can be evaluated; says so if it is not trained yet.
is_trained() {
    local model
    model=$(model_of "$1" "$2")
    if [[ $1 -ge 2 || ($1 == 1 && -z ${ITER1_MODEL:-}) ]] && [[ -z ${DRY_RUN:-} && ! -d $model ]]; then
        echo "left out, not trained yet: iteration $1, $2"
        return 1
    fi
}
