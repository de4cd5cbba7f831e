# One function a stage. Each ends at once where its output is complete, and continues where it was interrupted.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
source "$(dirname "${BASH_SOURCE[0]}")/names.sh"

# The prompts and what is done to them: the same in training and evaluation.
prompt_flags() {
    local sources=("$PROMPTS")
    # Several sources are separated by spaces; the path of a file may hold spaces itself.
    if [[ ! -e $PROMPTS ]]; then read -ra sources <<<"$PROMPTS"; fi
    PROMPT_FLAGS=(--dataset_name_or_path "${sources[@]}")
    PROMPT_FLAGS+=(--template "$TEMPLATE" --max_input_length "$MAX_PROMPT_LENGTH")
    if [[ -n $MAX_PROMPT_CHARACTERS ]]; then PROMPT_FLAGS+=(--max_prompt_characters "$MAX_PROMPT_CHARACTERS"); fi
}

engine_flags() {
    ENGINE_FLAGS=(--backend "$BACKEND" --max_num_seqs "$MAX_NUM_SEQS" --max_new_tokens "$MAX_NEW_TOKENS")
    ENGINE_FLAGS+=(--tensor_parallel_size "$TENSOR_PARALLEL_SIZE" --gpu_memory_utilization "$GPU_MEMORY_UTILIZATION")
    if [[ -n $GENERATION_DTYPE ]]; then ENGINE_FLAGS+=(--dtype "$GENERATION_DTYPE"); fi
}

# One engine for every $1 GPUs, or as many as the Ray cluster at RAY_ADDRESS has room for; one alone needs no Ray.
scale_flags() {
    local count=${NUM_ENGINES:-$((GPUS / $1))}
    if [[ -z $NUM_ENGINES && -n ${RAY_ADDRESS:-} ]]; then count=all; fi
    SCALE_FLAGS=()
    if [[ $count == all ]] || ((count > 1)); then SCALE_FLAGS=(--num_engines "$count"); fi
}

# Sampler $2 in iteration $1: a row of bandit/mixtures.py, unless recipe or caller give it pairs of its own. Iteration 1
# is on-policy, whatever a caller calls `online`.
sampler_flags() {
    local pairs=PAIRS_${2//[^A-Za-z0-9_]/_}
    if (($1 > 1)) && [[ -n ${!pairs:-} ]]; then SAMPLER_FLAGS=(--pairs "${!pairs}"); else SAMPLER_FLAGS=(--sampler "$2"); fi
    if [[ -n $K ]]; then SAMPLER_FLAGS+=(--K "$K"); fi
}

# Runs the script $2 as the stage $1 for each "iteration label" that follows $3, all in one process: Python and its
# libraries start once. The function $3, given an iteration and a label, puts its flags into FLAGS.
run_each() {
    local stage=$1 script=$2 flags_of=$3 n label words=()
    shift 3
    (($#)) || return 0
    while read -r n label; do
        "$flags_of" "$n" "$label"
        words+=(${words[0]:+--then} "${FLAGS[@]}")
    done < <(printf '%s\n' "$@")
    run "$stage" "$VLLM_PYTHON" "$ALIGNMENT/$script" "${words[@]}"
}

# Responses for iteration $1 with each of the samplers that follow.
generate() {
    local n=$1
    shift
    run_each "generate iter$n" generation/generate.py generation_flags "${@/#/$n }"
}

# For iteration $1 with sampler $2, from the model of the iteration before.
generation_flags() {
    local n=$1 sampler=$2
    local before=$((n > 1 ? n - 2 : 0))
    prompt_flags; engine_flags; scale_flags "$TENSOR_PARALLEL_SIZE"; sampler_flags "$n" "$sampler"
    FLAGS=(
        --model_name_or_path "$(model_of $((n - 1)) "$sampler")" --ref_model_name_or_path "$BASE_MODEL"
        --previous_model_name_or_path "$(model_of "$before" "$sampler")"
        "${PROMPT_FLAGS[@]}" --start "$TRAIN_START" --end "$TRAIN_END" "${SAMPLER_FLAGS[@]}" --beta "$BETA"
        --temperature "$TEMPERATURE" "${ENGINE_FLAGS[@]}" "${SCALE_FLAGS[@]}" --seed $((SEED * 1000 + n))
        --output_file "$(gen_data "$n" "$sampler")"
    )
}

annotate() {
    scale_flags 1
    run "annotate iter$1 $2" "$REWARDFLOW_PYTHON" "$ALIGNMENT/annotate_data/get_rewards.py" \
        --dataset_name_or_path "$(gen_data "$1" "$2")" --reward_name_or_path "$REWARD_MODEL" \
        --reward_template "$REWARD_TEMPLATE" "${SCALE_FLAGS[@]}" --output_file "$(rewarded_data "$1" "$2")"
}

# Ends when the file $1, which another machine writes, is there: files get their names when they are complete.
wait_for() {
    printf '\n[wait] %s\n' "$1"
    [[ -z ${DRY_RUN:-} ]] || return 0
    until [[ -f $1 ]]; do sleep 5; done
}

# One process on a machine without a GPU; `accelerate launch` over all of them otherwise.
launcher() {
    LAUNCHER=("$RLHFLOW_PYTHON")
    PROCESSES=1
    if ((GPUS > 0)); then
        PROCESSES=$((GPUS * NUM_MACHINES))
        LAUNCHER+=(-m accelerate.commands.launch --config_file "$ALIGNMENT/configs/$ACCELERATE_CONFIG.yaml")
        LAUNCHER+=(--num_processes "$PROCESSES" --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK")
        if ((NUM_MACHINES > 1)); then
            LAUNCHER+=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
        fi
    fi
}

train() {
    local n=$1 sampler=$2
    launcher
    local together=$((PER_DEVICE_BATCH * PROCESSES))
    ((GLOBAL_BATCH % together == 0)) ||
        die "GLOBAL_BATCH $GLOBAL_BATCH is not a multiple of PER_DEVICE_BATCH $PER_DEVICE_BATCH x $PROCESSES processes"
    local precision=()
    if [[ -n $BF16 ]]; then precision=(--bf16 "$BF16"); fi
    if [[ -n $SAVE_DTYPE ]]; then precision+=(--save_dtype "$SAVE_DTYPE"); fi
    run "train iter$n $sampler" "${LAUNCHER[@]}" "$ALIGNMENT/dpo_iteration/run_dpo.py" \
        --model_name_or_path "$(model_of $((n - 1)) "$sampler")" --ref_model "$BASE_MODEL" \
        --train_dir "$(rewarded_data "$n" "$sampler")" --output_dir "$(model_of "$n" "$sampler")" \
        --loss_type "$LOSS_TYPE" --choose_type "$CHOOSE_TYPE" --beta "$BETA" --margin_scale "$MARGIN_SCALE" \
        --max_length "$MAX_LENGTH" --max_prompt_length "$MAX_PROMPT_LENGTH" \
        --learning_rate "$LEARNING_RATE" --lr_scheduler_type "$LR_SCHEDULER" --warmup_steps "$WARMUP_STEPS" \
        --num_train_epochs "$EPOCHS" --per_device_train_batch_size "$PER_DEVICE_BATCH" \
        --gradient_accumulation_steps $((GLOBAL_BATCH / together)) \
        --gradient_checkpointing "$GRADIENT_CHECKPOINTING" --eval_fraction "$EVAL_FRACTION" \
        --save_strategy "$SAVE_STRATEGY" --save_steps "$SAVE_STEPS" --report_to "$REPORT_TO" --seed "$SEED" "${precision[@]}"
}

# Evaluates every trained model from iteration $1 on; the rest are arguments of `run_each`.
run_for_models() {
    local first=$1 n label models=()
    shift
    while read -r n label; do
        if ((n >= first)) && is_trained "$n" "$label"; then models+=("$n $label"); fi
    done < <(all_models)
    run_each "$@" "${models[@]}"
}

# Responses of the model $1 $2 to the test prompts and to the train prompts, with one engine start.
evaluation_flags() {
    prompt_flags; engine_flags; scale_flags "$TENSOR_PARALLEL_SIZE"
    FLAGS=(
        --model_name_or_path "$(model_of "$1" "$2")" "${PROMPT_FLAGS[@]}" --sampler online
        --start "$TEST_START" "$TRAIN_START" --end "$TEST_END" "$EVAL_TRAIN_END"
        --K "$EVAL_K" --temperature "$EVAL_TEMPERATURE" "${ENGINE_FLAGS[@]}" "${SCALE_FLAGS[@]}" --seed $((SEED * 1000))
        --output_file "$(eval_gen_data 0 "$2" "$1")" "$(eval_gen_data 1 "$2" "$1")"
    )
}

# Scores of all evaluated responses by one reward model: $1 its name, $2 its template, $3 the function that names files.
annotate_for_evaluation() {
    local n label part inputs=() outputs=()
    while read -r n label; do
        is_trained "$n" "$label" >/dev/null || continue
        for part in 0 1; do
            inputs+=("$(eval_gen_data "$part" "$label" "$n")")
            outputs+=("$("$3" "$part" "$label" "$n")")
        done
    done < <(all_models)
    scale_flags 1
    run "evaluate: annotate with $(basename "$1")" "$REWARDFLOW_PYTHON" "$ALIGNMENT/annotate_data/get_rewards.py" \
        --dataset_name_or_path "${inputs[@]}" --reward_name_or_path "$1" --reward_template "$2" \
        "${SCALE_FLAGS[@]}" --output_file "${outputs[@]}"
}

# KL from the base model of the model $1 $2, on held-out prompts.
kl_flags() {
    prompt_flags; engine_flags
    FLAGS=(
        --model_name_or_path "$(model_of "$1" "$2")" --ref_model_name_or_path "$BASE_MODEL" "${PROMPT_FLAGS[@]}"
        --start "$TEST_START" --end $((TEST_START + KL_PROMPTS)) --temperature "$KL_TEMPERATURE"
        "${ENGINE_FLAGS[@]}" --seed $((SEED * 1000))
        --output_file "$(kl_result "$2" "$1")"
    )
}

# Table, figures and report of everything that is there.
summarize() {
    local samplers
    read -ra samplers <<<"$SAMPLERS"
    run summarize "$REWARDFLOW_PYTHON" "$ALIGNMENT/evaluation/summarize.py" \
        --run_dir "$RUN_DIR" --samplers "${samplers[@]}" --iterations "$ITERS"
}
