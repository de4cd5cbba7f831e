"""What several integration tests start from."""

import fcntl
from pathlib import Path

import pytest
from commands import ALIGNMENT, run
from tiny import save_tiny_policy


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """(policy, reference), two unlike tiny Llamas; nothing may be written into their folders."""
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_policy(folder / "policy", seed=1), save_tiny_policy(folder / "reference", seed=2)


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """The quickstart's real models and prompts; made here unless they are there already, which takes two minutes."""
    folder = (ALIGNMENT / "assets").resolve()  # the path is part of what made them
    folder.mkdir(exist_ok=True)
    words = [f"ASSETS={folder}", f"RUN_DIR={tmp_path_factory.mktemp('assets')}"]
    with (folder / ".lock").open("w") as lock:  # test processes side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(["bash", ALIGNMENT / "scripts/quickstart_assets.sh", *words])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder
