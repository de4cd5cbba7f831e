"""Tabular bandit simulator: how the sampler of response pairs sets the convergence rate of online DPO."""

import sys
from importlib.util import find_spec


def require(*packages: str) -> None:
    """End with exit code 2 and one line that names the remedy if a package is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        print(
            f"{sys.argv[0]}: error: no Python package {', '.join(missing)}: run `bash setup.sh bandit`, or "
            "`pip install -r requirements_bandit.txt` for this Python",
            file=sys.stderr,
        )
        sys.exit(2)
