#!/usr/bin/env bash
# Every benchmark in turn, about 40 minutes on 2 quiet cores; the tables go to benchmarks/results/<machine>.md.
#   bash benchmarks/run_all.sh
#   bash benchmarks/run_all.sh annotation kl          only these; the tables of the others stay as they are
# It needs the quickstart's models: `bash quickstart.sh` or `bash alignment/scripts/quickstart_assets.sh` makes them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "run_all.sh: error: $*" >&2; exit 2; }

PYTHON=$PWD/.venv/bin/python
[[ -x $PYTHON ]] || die "no environment: run 'bash setup.sh cpu' first"
[[ -d alignment/assets/judge ]] || die "no models: run 'bash alignment/scripts/quickstart_assets.sh' first"
STAGES=("$@")
if ((${#STAGES[@]} == 0)); then STAGES=(generation_rates annotation training kl bandit_updates memory); fi
for stage in "${STAGES[@]}"; do [[ -f benchmarks/$stage.py ]] || die "no benchmark '$stage'"; done

RESULTS=benchmarks/results/$("$PYTHON" benchmarks/machine.py --name).md
mkdir -p benchmarks/results
MACHINE=$("$PYTHON" benchmarks/machine.py)
for stage in "${STAGES[@]}"; do
    echo "run_all.sh: $stage" >&2
    tables=$("$PYTHON" "benchmarks/$stage.py") || die "$stage failed"
    printf '# Benchmarks\n\nThe machine as the last measured section found it; sections may be of other runs.\n\n%s\n\n%s\n' "$MACHINE" "$(sed -n '/^## /,$p' <<<"$tables")" | "$PYTHON" benchmarks/merge.py "$RESULTS"
done
echo "run_all.sh: $RESULTS"
