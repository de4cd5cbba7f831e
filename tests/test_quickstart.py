"""quickstart.sh itself, reduced by its own variables: the real policy, prompts and reward models."""

import json

from commands import bash

from common.records import read_records


def test_quickstart(tmp_path):
    run = tmp_path / "run"
    result = bash(
        "quickstart.sh",
        RUN_DIR=run,
        SAMPLERS="mixp",
        ITERS="2",
        TRAIN_END="8",
        TEST_END="404",
        KL_PROMPTS="4",
        MAX_NEW_TOKENS="12",
        EPOCHS="1",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    instances, settings = read_records(
        run / "data/data_with_rewards_iter2_mixp.json", ("responses", "rewards")
    )
    assert len(instances) == 8
    # A real language model answers in words, and the two distributions differ.
    assert all(any(c.isalpha() for c in text) for i in instances for text in i["responses"])
    assert sum(len(set(i["responses"])) == 2 for i in instances) >= 6
    assert settings["generate"]["sampler"] == [[1.0, [1.5, -0.5], [0.5, 0.5]]]
    assert json.loads((run / "results/kl_mixp_2.json").read_text())["kl"] > 0
    table = (run / "results/summary.md").read_text()
    assert "base" in table and "mixp" in table
    assert str(run / "results/report.html") in result.stdout
