# What every driver needs before its first stage: folders, the recipe's constants, the environments, `run`.
# Expects RECIPE.
# shellcheck shell=bash source-path=SCRIPTDIR

set -f  # what a user sets is never expanded to file names
ALIGNMENT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PROJECT=$(dirname "$ALIGNMENT")

die() { echo "$(basename "$0"): error: $*" >&2; exit 2; }

# Sets a constant unless the caller's environment already has it.
default() { [[ -v $1 ]] || printf -v "$1" '%s' "$2"; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }

# How many GPUs a process may use; MIG parts are not counted.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .; return; fi
    nvidia-smi --list-gpus | grep -c '^GPU '
}

# Names become parts of paths, so they must not be able to leave the run folder.
check_name() { [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9_+.-]*$ ]] || die "$2 '$1': only letters, digits and _ + . - are allowed"; }

# Bash arithmetic runs what stands in a variable (x='a[$(command)]'), so numbers are checked before any is done.
check_whole() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name '${!name}': not a whole number from 0 to 999999999"
    done
}

load_recipe() {
    check_name "$RECIPE" RECIPE
    [[ -f $ALIGNMENT/recipes/$RECIPE.sh ]] || die "no recipe '$RECIPE' in alignment/recipes"
    # shellcheck source=/dev/null
    source "$ALIGNMENT/recipes/$RECIPE.sh"
    # shellcheck source=../recipes/common.sh
    source "$ALIGNMENT/recipes/common.sh"
    local sampler
    for sampler in $SAMPLERS; do check_name "$sampler" sampler; done
    [[ $ITERS =~ ^[1-9][0-9]*$ ]] || die "ITERS '$ITERS': not a whole number above 0"
    [[ $SEEDS =~ ^([0-9]{1,9}\ *)+$ ]] || die "SEEDS '$SEEDS': not whole numbers with spaces between them"
    check_whole SEED GLOBAL_BATCH PER_DEVICE_BATCH NUM_MACHINES MACHINE_RANK TEST_START KL_PROMPTS TENSOR_PARALLEL_SIZE
    ((TENSOR_PARALLEL_SIZE > 0)) || die "TENSOR_PARALLEL_SIZE 0: not a whole number above 0"
    ((PER_DEVICE_BATCH > 0)) || die "PER_DEVICE_BATCH 0: not a whole number above 0"
    [[ -z $NUM_ENGINES || $NUM_ENGINES == all ]] || check_whole NUM_ENGINES
    ((MACHINE_RANK < NUM_MACHINES)) || die "MACHINE_RANK $MACHINE_RANK: with NUM_MACHINES $NUM_MACHINES it is below that"
}

# A run on the wrong machine ends here, with what to do instead.
check_machine() {
    if has_gpu; then
        default GPUS "$(visible_gpus)"
    elif [[ -n ${DRY_RUN:-} ]]; then
        default GPUS "$([[ $NEEDS_GPU == 1 ]] && echo 8 || echo 0)"
    elif [[ $NEEDS_GPU == 1 ]]; then
        die "recipe $RECIPE needs GPUs and none was found. Without one: 'bash quickstart.sh' in the top folder," \
            "or RECIPE=quickstart before this command. DRY_RUN=1 prints what would run."
    else
        default GPUS 0
    fi
    check_whole GPUS
    if ((GPUS == 0)); then export DS_ACCELERATOR=cpu; fi
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}  # from libraries, about one another
}

# The interpreter of a stage's environment: the one that `setup.sh gpu` made for it, else the one of `setup.sh cpu`.
python_of() {
    local name
    for name in ".venv-$1" .venv; do
        if [[ -x $PROJECT/$name/bin/python ]]; then echo "$PROJECT/$name/bin/python"; return; fi
    done
    if [[ -n ${DRY_RUN:-} ]]; then echo python; return; fi
    die "no environment for $1: run 'bash setup.sh gpu' (or cpu) in $PROJECT first"
}

# Runs one stage: prints its command; with DRY_RUN does no more; else keeps its time in RUN_DIR/stage_seconds.tsv.
run() {
    local stage=$1 began=$SECONDS status=0
    shift
    printf '\n[%s] %s\n' "$stage" "$(printf '%q ' "$@")"
    [[ -z ${DRY_RUN:-} ]] || return 0
    "$@" {LOCK}>&- || status=$?
    if ((status != 0)); then
        echo "$(basename "$0"): stage '$stage' failed (exit code $status); the same command continues from here" >&2
        exit "$status"
    fi
    ((MACHINE_RANK > 0)) || printf '%s\t%s\n' "$stage" $((SECONDS - began)) >>"$RUN_DIR/stage_seconds.tsv"
}

# One driver a run folder (and machine): the lock goes with this process, however it ends. Stages do not inherit it.
lock_run() {
    { mkdir -p "$RUN_DIR" && : >>"$RUN_DIR/.lock.$MACHINE_RANK"; } 2>/dev/null || die "RUN_DIR $RUN_DIR: cannot be written"
    exec {LOCK}>>"$RUN_DIR/.lock.$MACHINE_RANK"
    flock --nonblock "$LOCK" || die "another driver works in $RUN_DIR"
}

# Bash runs this when the stage at hand, which gets the signal too, has ended.
stopped() {
    echo "$(basename "$0"): stopped; the same command continues from here" >&2
    exit 130
}

# Evaluation and studies are no work for several machines.
one_machine() { ((NUM_MACHINES == 1)) || die "runs on one machine: NUM_MACHINES is $NUM_MACHINES"; }

load_recipe
check_machine
# Not inside of a command: there its failure would not end the driver.
# shellcheck disable=SC2034  # used by the stages
VLLM_PYTHON=$(python_of vllm)
# shellcheck disable=SC2034
RLHFLOW_PYTHON=$(python_of rlhflow)
# shellcheck disable=SC2034
REWARDFLOW_PYTHON=$(python_of rewardflow)
if [[ -z ${DRY_RUN:-} ]]; then lock_run; fi
trap stopped INT TERM
