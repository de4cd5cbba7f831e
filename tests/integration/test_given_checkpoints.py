"""Given checkpoints beside their base model, through the real drivers: no training, reward and KL of one policy."""

import csv
import json
import statistics

import pytest
from commands import FORKS, bash, settings
from driver_runs import EVALUATE, KL, inputs, save_inputs
from tiny import save_tiny_policy

from scripts import names


@pytest.mark.parametrize(("temperature", "part"), [(1.0, "test_prompts"), (0.7, "kl_prompts")])
def test_a_checkpoint_is_evaluated_without_training(temperature, part, tmp_path):
    """The evaluation's own responses serve the KL where it has their temperature."""
    save_inputs(tmp_path)
    theirs = save_tiny_policy(tmp_path / "theirs", seed=7, sharpness=5.0)
    run_dir = tmp_path / "run"
    given = inputs(tmp_path) | {"RUN_DIR": run_dir, "MODELS": f"theirs={theirs}", "SCORE_KL": True, "BACKEND": "hf"}
    given |= {"EVAL_TEMPERATURE": 1.0, "KL_TEMPERATURE": temperature}
    for driver in (KL, EVALUATE):
        result = bash(f"alignment/{driver}", *settings(**given), LOADED_PYTHON=FORKS.started())
        assert result.returncode == 0, f"{driver}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert not (run_dir / "models").exists()
    other = given | {"MAX_NEW_TOKENS": 5}  # not those of the files
    result = bash(f"alignment/{KL}", *settings(**other), LOADED_PYTHON=FORKS.started())
    assert result.returncode == 2 and "max_new_tokens=8, now max_new_tokens=5" in result.stderr, result.stderr
    rows = {row["sampler"]: row for row in csv.DictReader((run_dir / "results/summary.csv").open())}
    assert list(rows) == ["base", "theirs"]
    kl = json.loads(names.kl(run_dir, None, "theirs").read_text())["kl"]
    scored = names.evaluation(run_dir, part, None, "theirs", "rewards")
    instances = json.loads(scored.read_text())["instances"]
    reward = statistics.fmean(i["rewards"][0] for i in instances)
    resolved = (run_dir / "settings.yaml").read_text()
    beta, scale = (float(resolved.split(f"\n{name}: ")[1].split("\n")[0]) for name in ("BETA", "MARGIN_SCALE"))
    assert kl > 0 and float(rows["theirs"]["kl"]) == pytest.approx(kl)
    assert float(rows["theirs"]["value"]) == pytest.approx(reward - beta / scale * kl)
    assert (run_dir / "results/report.html").exists()
