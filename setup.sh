#!/usr/bin/env bash
# Makes the environments that the scripts run in.
#   bash setup.sh cpu      one, .venv, for everything on a machine without a GPU (5 GB, or 8 GB: see below)
#   bash setup.sh gpu      three, .venv-vllm, .venv-rlhflow and .venv-rewardflow, from requirements_*.yaml
# (on a GPU Triton compiles kernels: that needs gcc and the headers of Python)
#   bash setup.sh bandit   a small one, .venv-bandit, for the tabular simulator alone: no torch, seconds
# Safe to run again: an environment is rebuilt only when what it is made from has changed.
# torch for the CPU comes from pip's own index if that has a CPU build, else from TORCH_INDEX_URL, else, where that
# cannot be reached, it is pip's own build with its CUDA libraries: larger, and right on a CPU too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PLUGIN=alignment/generation/logit_mixture
# The index of CPU builds that pytorch.org documents ("Start Locally", CPU).
TORCH_INDEX_URL=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}

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

# Installs torch first and alone: PyPI's build for Linux brings several GB of CUDA libraries that a CPU never uses.
install_cpu_torch() {
    local pip=$1 pin plan
    pin=$(grep '^torch==' requirements_cpu.txt)
    plan=$("$pip" install --dry-run --quiet --report - "$pin") || plan="nvidia-"
    if ! grep -qE '"name": "(nvidia|cuda)-|^nvidia-$' <<<"$plan"; then
        echo "setup.sh: torch from pip's own index"
        "$pip" install --quiet "$pin"
    elif "$pip" install --quiet --retries 1 --timeout 20 --index-url "$TORCH_INDEX_URL" "$pin" 2>/dev/null; then
        echo "setup.sh: torch from $TORCH_INDEX_URL"
    else
        echo "setup.sh: $TORCH_INDEX_URL cannot be reached; pip's own build of torch is 2.7 GB larger"
        "$pip" install --quiet "$pin" || die "pip finds no $pin"
    fi
}

# Makes the environment $1 from the file $3, unless it is current; $2 is what is said about its size.
begin() {
    MADE_FROM=$(fingerprint "$3")
    if is_current "$1" "$MADE_FROM"; then return 1; fi
    echo "setup.sh: making $1 ($2)"
    rm -rf "$1"
}

finish() {
    echo "$MADE_FROM" >"$1/.made_from"
    echo "setup.sh: $1 is ready"
}

make_venv() { local python; python=$(find_python); "$python" -m venv "$1"; }
install_plugin() { "$1/bin/pip" install --quiet --no-deps --no-build-isolation --editable "$PLUGIN"; }

# Runs imports in the environment $1: a bare `import vllm` succeeds even where the real thing is broken.
check_imports() {
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 "$1/bin/python" -c "$2" >/dev/null 2>"$1/import.log" ||
        die "$1: '$2' fails; see $1/import.log"
}

make_cpu() {
    begin .venv "5 to 8 GB; some minutes" requirements_cpu.txt || return 0
    make_venv .venv
    install_cpu_torch .venv/bin/pip
    .venv/bin/pip install --quiet --no-deps -r requirements_cpu.txt
    install_plugin .venv
    check_imports .venv 'from vllm import LLM; from trl import DPOTrainer'
    finish .venv
}

make_bandit() {
    begin .venv-bandit "0.3 GB; seconds" requirements_bandit.txt || return 0
    make_venv .venv-bandit
    .venv-bandit/bin/pip install --quiet -r requirements_bandit.txt
    finish .venv-bandit
    echo "setup.sh: .venv-bandit/bin/python bandit/examples/tabular.py"
}

# The pip section of a conda file, one requirement per line.
pip_section() { awk '/^ *- pip:/ {inside=1; next} inside && /^ *- / {sub(/^ *- /, ""); sub(/ *#.*/, ""); print}' "$1"; }

# A CPU build of torch, or a driver that is too old for it, would train on the CPU without a word.
check_cuda() {
    check_imports "$1" 'import torch; assert torch.version.cuda, "a CPU build of torch"'
    if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
        check_imports "$1" 'import torch; assert torch.cuda.is_available(), "torch sees no GPU: is the driver too old?"'
    fi
}

make_gpu() {
    make_gpu_environment vllm 'from vllm import LLM'
    make_gpu_environment rlhflow 'import deepspeed; from trl import DPOTrainer'
    make_gpu_environment rewardflow 'from transformers import AutoModelForSequenceClassification'
}

# A conda environment under a prefix and a virtual environment look the same to the drivers: FOLDER/bin/python.
make_gpu_environment() {
    local folder=.venv-$1 file=requirements_$1.yaml conda
    begin "$folder" "from $file" "$file" || return 0
    for conda in mamba conda ""; do command -v "${conda:-true}" >/dev/null && break; done
    if [[ -n $conda ]]; then
        "$conda" env create --quiet --yes --prefix "$folder" --file "$file"
    else
        make_venv "$folder"
        pip_section "$file" | "$folder/bin/pip" install --quiet -r /dev/stdin
    fi
    if [[ $1 == vllm ]]; then install_plugin "$folder"; fi
    check_imports "$folder" "$2"
    check_cuda "$folder"
    finish "$folder"
}

case ${1:-} in
    cpu | gpu | bandit) "make_$1" ;;
    *) die "say what for: bash setup.sh cpu | bash setup.sh gpu | bash setup.sh bandit" ;;
esac
