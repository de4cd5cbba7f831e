# KL from the base model of every trained model, then the report. Sourced by sample_kl.sh.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
one_machine

while read -r n label <&3; do
    if ((n > 0)) && is_trained "$n" "$label"; then measure_kl "$n" "$label"; fi
done 3< <(all_models)
summarize
