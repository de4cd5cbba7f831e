#!/usr/bin/env bash
# Training over several nodes of a Slurm cluster. Every node runs the same driver: the first one generates and annotates
# (with engines on all nodes, through Ray), and all train together. Submit it in the project's top folder, which all
# nodes must see, as they must see RUN_DIR and the models:
#   sbatch --nodes=8 alignment/configs/slurm.sh                                     the training driver of Safe-RLHF
#   sbatch --nodes=8 alignment/configs/slurm.sh sample_train_iterative_prompt.sh RUN_DIR=/shared/run GLOBAL_BATCH=64
#   sbatch ... DRY_RUN=1                                                            prints what would run
# A job that was stopped continues when it is submitted again. Evaluate with the other drivers, on one node.
#SBATCH --job-name=dpo-samplers
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
set -euo pipefail

die() { echo "slurm.sh: error: $*" >&2; exit 2; }

# Slurm runs a copy of this file, so its own place says nothing.
[[ -n ${SLURM_JOB_ID:-} ]] || die "not a Slurm job; submit it: sbatch --nodes=2 alignment/configs/slurm.sh"
cd "${SLURM_SUBMIT_DIR:-.}"
DRIVER=alignment/sample_train_safe_rlhf.sh
if [[ ${1:-} == *.sh ]]; then DRIVER=alignment/$1; shift; fi
DRY_RUN=$([[ " $* " != *" DRY_RUN=1 "* ]] || echo 1)
[[ -f $DRIVER ]] || die "no $DRIVER in $PWD: submit in the project's top folder, with a driver of alignment/"
[[ $DRIVER == alignment/sample_train_*.sh ]] || die "$DRIVER: only training runs over several nodes; start it on one"

NODES=()
while read -r node; do NODES+=("$node"); done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#NODES[@]} > 0)) || die "scontrol names no node of $SLURM_JOB_NODELIST"
NUM_MACHINES=${#NODES[@]} HEAD=${NODES[0]} GPUS=${SLURM_GPUS_ON_NODE:-8}
[[ $SLURM_JOB_ID =~ ^[1-9][0-9]*$ ]] || die "SLURM_JOB_ID '$SLURM_JOB_ID': not a whole number"
# Jobs that share a node need ports of their own.
RAY_PORT=${RAY_PORT:-$((30000 + SLURM_JOB_ID % 10000))}
# What the caller says comes last, and counts.
SETTINGS=("NUM_MACHINES=$NUM_MACHINES" "MASTER_ADDR=$HEAD" "MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))"
    "GPUS=$GPUS" "$@")
ON_ONE=(srun --overlap --nodes=1 --ntasks=1 --gpus-per-node="$GPUS")

# Ray reports nothing home, and takes commands only from those who know this job's token.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}

# Ends the job steps that hold Ray's processes. What is left after a minute, Slurm ends with the job.
STEPS=()
stop_ray() {
    ((${#STEPS[@]} > 0)) || return 0
    kill "${STEPS[@]}" 2>/dev/null || true
    local second
    for ((second = 0; second < 60; second++)); do
        kill -0 "${STEPS[@]}" 2>/dev/null || return 0
        sleep 1
    done
}

in_background() {
    printf '[ray] %s\n' "$(printf '%q ' "$@")"
    [[ -z $DRY_RUN ]] || return 0
    "$@" &
    STEPS+=($!)
}

# Returns when $2 nodes have joined the Ray cluster at $1; fails after 3 minutes.
wait_for_ray() {
    [[ -z $DRY_RUN ]] || return 0
    "$PYTHON" - "$1" "$2" <<'PYTHON' || die "Ray: not all of the $2 nodes joined $1"
import sys, time
import ray

end = time.time() + 180
while time.time() < end:
    try:
        ray.is_initialized() or ray.init(address=sys.argv[1], logging_level="ERROR")
        if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[2]):
            sys.exit(0)
    except ConnectionError:
        pass
    time.sleep(2)
sys.exit(1)
PYTHON
}

start_ray() {
    local address node
    address=$(getent ahostsv4 "$HEAD" | awk 'NR == 1 {print $1}') || true
    [[ -n $address ]] || die "node $HEAD: no IPv4 address"
    in_background "${ON_ONE[@]}" --nodelist="$HEAD" \
        "$PYTHON" -m ray.scripts.scripts start --head --node-ip-address="$address" --port="$RAY_PORT" \
        --include-dashboard=false --block
    wait_for_ray "$address:$RAY_PORT" 1
    for node in "${NODES[@]:1}"; do
        in_background "${ON_ONE[@]}" --nodelist="$node" \
            "$PYTHON" -m ray.scripts.scripts start --address="$address:$RAY_PORT" --block
    done
    wait_for_ray "$address:$RAY_PORT" "$NUM_MACHINES"
    export RAY_ADDRESS=$address:$RAY_PORT
}

if ((NUM_MACHINES > 1)); then
    PYTHON=$PWD/.venv-vllm/bin/python
    [[ -x $PYTHON ]] || PYTHON=$PWD/.venv/bin/python
    [[ -x $PYTHON || -n $DRY_RUN ]] || die "no environment: run 'bash setup.sh gpu' in $PWD first"
    trap stop_ray EXIT
    start_ray
fi
# One task per node; SLURM_NODEID counts the nodes in the order in which scontrol names them.
# shellcheck disable=SC2016  # expanded in the tasks
srun --overlap --nodes="$NUM_MACHINES" --ntasks="$NUM_MACHINES" --ntasks-per-node=1 --gpus-per-node="$GPUS" \
    --kill-on-bad-exit=1 bash -c 'exec bash "$0" "$@" MACHINE_RANK="$SLURM_NODEID"' "$DRIVER" "${SETTINGS[@]}"
