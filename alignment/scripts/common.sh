# Every driver begins here: its settings are read and checked, the run folder is locked, `stage` is defined.
# shellcheck shell=bash
set -euo pipefail
set -f  # lists of names are never expanded to file names
DRIVER=$(basename "$0")
SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Any Python with PyYAML reads settings; each stage then runs in its own environment.
for PYTHON in "$SCRIPTS"/../../.venv{-rlhflow,}/bin/python python3; do [[ ! -x $PYTHON ]] || break; done

[[ ! " $* " =~ " "(-h|--help)" " ]] || exec "$PYTHON" "$SCRIPTS/resolve.py" "$DRIVER" "$@"
RESOLVED=$("$PYTHON" "$SCRIPTS/resolve.py" "$DRIVER" "$@")
# shellcheck disable=SC2034  # used by the drivers
{
    IFS= read -r SETTINGS
    IFS= read -r RUN_DIR
    IFS= read -r LOCK_FILE
    IFS= read -r SECONDS_FILE
    IFS= read -r CPU_PYTHON
    read -r ITERS
    read -r SEEDS
    read -r SAMPLERS
} <<<"$RESOLVED"

# Becomes the command of a stage (stages.py) and notes its time. What it prints and its Ctrl-C are the command's own.
stage() {
    local began=$SECONDS
    "$PYTHON" "$SCRIPTS/stages.py" "$SETTINGS" "$@" {LOCK}>&- || failed "$?" "$*"
    printf '%s\t%s\n' "$*" "$((SECONDS - began))" >>"$SECONDS_FILE"
}

failed() {
    (($1 != 141)) || exit "$1"  # whoever read the output has seen enough: DRY_RUN=1 | head
    echo "$DRIVER: stage '$2' failed (exit code $1); the same command continues from here" >&2
    exit "$1"
}
refused() { echo "$DRIVER: error: $1" >&2; exit 2; }

# Bash runs this when the stage at hand, which gets the signal too, has ended.
stopped() { echo "$DRIVER: stopped; the same command continues from here" >&2; exit 130; }
trap stopped INT TERM

# One driver per run folder and machine: the lock goes with this process, however it ends; stages do not inherit it.
exec {LOCK}>>"$LOCK_FILE"
[[ $LOCK_FILE == /dev/null ]] || flock --nonblock "$LOCK" || refused "another driver works in $RUN_DIR"
"$PYTHON" "$SCRIPTS/stages.py" "$SETTINGS" record
