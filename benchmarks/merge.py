"""Puts the sections of new benchmark output into a results file, each in the place of the older one of its title.

Reads   standard input: what the benchmarks printed; what stands above the first `## ` is about the machine.
Writes  the results file, in which sections that were not measured again stay as they are.

    bash benchmarks/run_all.sh        uses it
"""

import re
import sys
from pathlib import Path


def sections(text: str) -> dict[str, str]:
    """Title → section; "" is what stands above the first."""
    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    return {"": head.strip()} | {part.partition("\n")[0]: f"## {part.strip()}" for part in rest}


def merged(old: str, new: str) -> str:
    """`old` with the sections of `new`, new titles at the end."""
    return "\n\n".join((sections(old) | sections(new)).values()) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(merged(path.read_text() if path.exists() else "", sys.stdin.read()))
