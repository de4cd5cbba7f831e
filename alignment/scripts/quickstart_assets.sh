#!/usr/bin/env bash
# Makes the quickstart's assets, once: policy, prompts, and from human labels a reward model and a judge.
#   bash alignment/scripts/quickstart_assets.sh
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh" RECIPE=quickstart "$@"

stage unpack
stage human_labels
stage reward_models
