#!/usr/bin/env bash
# Makes the environments that the scripts run in.
#   bash setup.sh cpu   one environment, .venv, for everything on a machine without a GPU
#   bash setup.sh gpu   three, .venv-vllm, .venv-rlhflow and .venv-rewardflow, from requirements_*.yaml
# Safe to run again: an environment is rebuilt only when what it is made from has changed.
# TORCH_INDEX_URL names a package index with CPU builds of torch, where pip's own index has none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PLUGIN=alignment/generation/logit_mixture

die() { echo "setup.sh: $*" >&2; exit 2; }

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3; do
        if [[ -n $name ]] && "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$name"; return
        fi
    done
    die "Python 3.11 is needed and was not found; PYTHON=/path/to/python3.11 names one"
}

fingerprint() { cat setup.sh "$@" "$PLUGIN/pyproject.toml" | sha256sum | cut -d' ' -f1; }
is_current() { [[ -f $1/.made_from && $(<"$1/.made_from") == "$2" ]]; }

# torch comes first and alone: PyPI's Linux build brings several GB of CUDA libraries that a CPU never uses.
install_cpu_torch() {
    local pip=$1 pin index=()
    pin=$(grep '^torch==' requirements_cpu.txt)
    [[ -n ${TORCH_INDEX_URL:-} ]] && index=(--index-url "$TORCH_INDEX_URL")
    local hint="set TORCH_INDEX_URL to an index with CPU builds of torch (pytorch.org, 'Start Locally', CPU)"
    local plan
    plan=$("$pip" install --dry-run --quiet --report - "${index[@]}" "$pin") || die "pip finds no $pin; $hint"
    if grep -qE '"name": "(nvidia|cuda)-' <<<"$plan"; then
        die "pip's index has only a CUDA build of $pin; $hint"
    fi
    "$pip" install --quiet "${index[@]}" "$pin"
}

make_cpu() {
    local made_from
    made_from=$(fingerprint requirements_cpu.txt)
    if is_current .venv "$made_from"; then return; fi
    echo "setup.sh: making .venv (about 5 GB; some minutes)"
    local python; python=$(find_python)
    rm -rf .venv
    "$python" -m venv .venv
    install_cpu_torch .venv/bin/pip
    .venv/bin/pip install --quiet --no-deps -r requirements_cpu.txt
    install_plugin .venv
    # A bare `import vllm` succeeds even where the real thing is broken.
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 .venv/bin/python -c 'from vllm import LLM; from trl import DPOTrainer' \
        >/dev/null 2>.venv/import.log || die "vllm or trl does not import; see .venv/import.log"
    echo "$made_from" >.venv/.made_from
    echo "setup.sh: .venv is ready"
}

install_plugin() { "$1/bin/pip" install --quiet --no-deps --no-build-isolation --editable "$PLUGIN"; }

# The pip section of a conda file, one requirement a line.
pip_section() { awk '/^ *- pip:/ {inside=1; next} inside && /^ *- / {sub(/^ *- /, ""); sub(/ *#.*/, ""); print}' "$1"; }

make_gpu() {
    local name
    for name in vllm rlhflow rewardflow; do make_gpu_environment "$name"; done
}

# A conda environment under a prefix and a virtual environment look the same to the drivers: FOLDER/bin/python.
make_gpu_environment() {
    local folder=.venv-$1 file=requirements_$1.yaml made_from conda=""
    made_from=$(fingerprint "$file")
    if is_current "$folder" "$made_from"; then return; fi
    echo "setup.sh: making $folder from $file"
    rm -rf "$folder"
    for conda in mamba conda ""; do command -v "${conda:-true}" >/dev/null && break; done
    if [[ -n $conda ]]; then
        "$conda" env create --quiet --yes --prefix "$folder" --file "$file"
    else
        local python; python=$(find_python)
        "$python" -m venv "$folder"
        pip_section "$file" | "$folder/bin/pip" install --quiet -r /dev/stdin
    fi
    if [[ $1 == vllm ]]; then install_plugin "$folder"; fi
    echo "$made_from" >"$folder/.made_from"
    echo "setup.sh: $folder is ready"
}

case ${1:-} in
    cpu) make_cpu ;;
    gpu) make_gpu ;;
    *) die "say which machine: bash setup.sh cpu | bash setup.sh gpu" ;;
esac
