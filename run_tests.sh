#!/usr/bin/env bash
# Lint and tests on a machine without a GPU; makes the environment first.
#   bash run_tests.sh --fast      lint and tests/unit: no engine, no training; under 3 minutes
#   bash run_tests.sh             lint and everything: under 30 minutes on 2 cores
#   bash run_tests.sh tests/unit/test_pairs.py -k word      arguments go to pytest, and lint is left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh cpu
export PATH=$PWD/.venv/bin:$PATH
export PYTHONFAULTHANDLER=1  # a process that crashes says where

lint() {
    ruff check .
    ruff format --check .
    git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck --external-sources --severity=style
}

# So many of the integration tests run beside the others that both processes end at about the same time. What starts
# Ray, and so sees the other's processes, stays in one of them.
WITH_FAULTS=""
WITHOUT=""
for part in test_[a-ek] test_[gp][ip] test_lora test_training; do
    WITH_FAULTS+=" tests/integration/$part*.py"
    WITHOUT+=" --ignore-glob=*/$part*"
done

# Runs pytest on each list of files, one after the other.
in_turn() {
    local status=0 files
    for files in "$@"; do
        # shellcheck disable=SC2086  # a list of words
        python -m pytest -q $files || status=$?
    done
    return "$status"
}

# Runs pytest on the files $1 beside pytest on the other lists, one core each.
beside() {
    local status=0 log
    log=$(mktemp)
    in_turn "${@:2}" >"$log" 2>&1 &
    in_turn "$1" || status=$?
    wait $! || status=$?
    cat "$log"
    rm "$log"
    return "$status"
}

case ${1:-} in
    # tests/unit in a process of its own: where numba is loaded vLLM's engine does not start (it looks into all modules).
    "") lint && beside "tests/integration $WITHOUT" tests/unit "tests/faults $WITH_FAULTS" ;;
    --fast) lint && beside "$(echo tests/unit/test_bandit*.py)" "tests/unit --ignore-glob=*/test_bandit*" ;;
    *) python -m pytest "$@" ;;
esac
