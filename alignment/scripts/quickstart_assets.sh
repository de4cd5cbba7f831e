#!/usr/bin/env bash
# Makes the quickstart's assets, once: policy, prompts, and from human labels a reward model and a judge.
#   bash alignment/scripts/quickstart_assets.sh
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
RECIPE=quickstart
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

run "unpack policy and prompts" "$RLHFLOW_PYTHON" "$ALIGNMENT/scripts/quickstart_assets.py" --output_dir "$ASSETS"
run "human labels" "$RLHFLOW_PYTHON" "$ALIGNMENT/reward_model/human_labels.py" --output_dir "$ASSETS"

# The judge learns from other prompts, in another order, than the reward model that training sees.
train_reward_model() {
    run "train $(basename "$1")" "$RLHFLOW_PYTHON" "$ALIGNMENT/reward_model/train_reward_model.py" \
        --model_name_or_path "$ASSETS/encoder" --train_file "$ASSETS/$2" --output_dir "$1" \
        --trainable_layers 2 --max_steps 60 --seed "$3"
}
train_reward_model "$REWARD_MODEL" reward_pairs.jsonl 0
train_reward_model "$JUDGE_MODEL" judge_pairs.jsonl 1
