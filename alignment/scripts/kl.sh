# KL from the base model of every trained model, then the report. Sourced by sample_kl.sh.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
one_machine

run_for_models 1 KL evaluation/get_kl.py kl_flags
summarize
