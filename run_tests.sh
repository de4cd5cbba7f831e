#!/usr/bin/env bash
# Lint and tests on a machine without a GPU; makes the environment first.
#   bash run_tests.sh --fast      lint and tests/unit: no engine, no training; under 3 minutes
#   bash run_tests.sh             lint and everything: about 45 minutes on 2 cores
#   bash run_tests.sh tests/unit/test_pairs.py -k word      arguments go to pytest, and lint is left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh cpu
export PATH=$PWD/.venv/bin:$PATH

lint() {
    ruff check .
    ruff format --check .
    git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck --external-sources --severity=style
}

# The bandit's half beside the rest: about a minute and a half of a core each.
unit() {
    local status=0
    python -m pytest -q tests/unit/test_bandit*.py &
    python -m pytest -q tests/unit --ignore-glob='*/test_bandit*' || status=$?
    wait $! || status=$?
    return "$status"
}

case ${1:-} in
    "") lint && python -m pytest ;;
    --fast) lint && unit ;;
    *) python -m pytest "$@" ;;
esac
