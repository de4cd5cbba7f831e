"""What several integration tests start from."""

from pathlib import Path

import pytest
from tiny import save_tiny_policy


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """(policy, reference), two unlike tiny Llamas; nothing may be written into their folders."""
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_policy(folder / "policy", seed=1), save_tiny_policy(folder / "reference", seed=2)
