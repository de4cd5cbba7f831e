# Rewards of every model on test and train prompts, then the report. Sourced by the sample_eval_* drivers.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
one_machine

run_for_models 0 "evaluate: generate" generation/generate.py evaluation_flags
annotate_for_evaluation "$REWARD_MODEL" "$REWARD_TEMPLATE" eval_rewarded_data
if [[ -n $JUDGE_MODEL ]]; then annotate_for_evaluation "$JUDGE_MODEL" "$JUDGE_TEMPLATE" eval_judged_data; fi
summarize
