# Rewards of every model on test and train prompts, then the report. Sourced by the sample_eval_* drivers.
# shellcheck shell=bash source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
one_machine

while read -r n label <&3; do
    if is_trained "$n" "$label"; then generate_for_evaluation "$n" "$label"; fi
done 3< <(all_models)
annotate_for_evaluation "$REWARD_MODEL" "$REWARD_TEMPLATE" eval_rewarded_data
if [[ -n $JUDGE_MODEL ]]; then annotate_for_evaluation "$JUDGE_MODEL" "$JUDGE_TEMPLATE" eval_judged_data; fi
summarize
