"""The driver that compares samplers over several seeds; its statistics are in unit/test_compare_seeds.py."""

from commands import bash


def test_driver_gives_every_seed_the_same_first_iteration():
    result = bash("alignment/sample_ablation.sh", DRY_RUN="1", RUN_DIR="/study", SEEDS="4 5", SAMPLERS="online pilaf")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert [line[1 : line.index("]")] for line in lines] == [
        "shared: train_safe_rlhf",
        *(f"seed_{n}: {name}" for n in (4, 5) for name in ("train_safe_rlhf", "kl", "eval_safe_rlhf")),
        "compare seeds",
    ]
    for line in lines[1:-1]:
        assert "ITER1_MODEL=/study/shared/models/rlhflow_iter1 " in line and "online\\ pilaf" in line
    refused = bash("alignment/sample_ablation.sh", SEEDS="1;2")
    assert refused.returncode == 2 and "SEEDS" in refused.stderr
