# Sourced by a script that starts many stages on a CPU: one Python, CPU_PYTHON, imports the libraries for all of them
# (loaded.py). It ends with that script, which holds its standard input.
# shellcheck shell=bash
FOLDER=$(mktemp -d /tmp/loaded.XXXXXX)
trap 'rm -r "$FOLDER"' EXIT
export LOADED_PYTHON=$FOLDER/socket
# shellcheck disable=SC2034  # it is only held open
exec {LOADED}> >(exec "$CPU_PYTHON" "$(dirname "${BASH_SOURCE[0]}")/running.py" "$LOADED_PYTHON")
