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
BEGAN=$(date -u '+%Y-%m-%d %H:%M')
STAGES=("$@")
if ((${#STAGES[@]} == 0)); then STAGES=(generation_rates annotation training kl bandit_updates memory); fi
for stage in "${STAGES[@]}"; do [[ -f benchmarks/$stage.py ]] || die "no benchmark '$stage'"; done

RESULTS=benchmarks/results/$("$PYTHON" benchmarks/machine.py --name).md
mkdir -p benchmarks/results
MACHINE=$("$PYTHON" benchmarks/machine.py)
RUN="The machine as the last measured section found it; sections may be of other runs: the last was ${STAGES[*]}."
ALL="" TOOK=""
for stage in "${STAGES[@]}"; do
    echo "run_all.sh: $stage" >&2
    SECONDS=0
    tables=$("$PYTHON" "benchmarks/$stage.py" | sed -n '/^## /,$p') || die "$stage failed"
    TOOK+="${TOOK:+, }$stage $((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))"
    ALL+=$tables$'\n\n'
    # At once: a later stage that fails does not cost this one's figures.
    printf '# Benchmarks\n\n%s\n\n%s\n\n%s\n' "$RUN" "$MACHINE" "$tables" | "$PYTHON" benchmarks/merge.py "$RESULTS"
done
if (($# == 0)); then  # all are of this run, and the file says so
    ONE="All sections but Quickstart were measured in one run of \`bash benchmarks/run_all.sh\`, $BEGAN to $(date -u '+%H:%M') UTC, of"
    ONE+=" commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown). Minutes: $TOOK."
    printf '# Benchmarks\n\n%s\n\n%s\n\n%s\n' "$ONE" "$MACHINE" "$ALL" | "$PYTHON" benchmarks/merge.py "$RESULTS" Quickstart
fi
echo "run_all.sh: $RESULTS; minutes: $TOOK"
