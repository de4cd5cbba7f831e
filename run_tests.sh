#!/usr/bin/env bash
# Set-up, lint and the whole test suite on a machine without a GPU.
#   bash run_tests.sh                     everything
#   bash run_tests.sh tests/test_x.py -k word   arguments go to pytest (and lint is left out)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh cpu
export PATH=$PWD/.venv/bin:$PATH
if (($# == 0)); then
    ruff check .
    ruff format --check .
    git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck --external-sources --severity=style
fi
python -m pytest "$@"
