"""Puts the sections of new benchmark output into a results file, each in the place of the older one of its title.

Reads   standard input: what the benchmarks printed; what stands above the first `## ` is about the machine.
Writes  the results file, in which sections that were not measured again stay as they are. Its first section is a
        table of all ratios that are to reach something, beside it and beside their limit. With titles after the
        file's name only these sections of it stay.

    bash benchmarks/run_all.sh        uses it
"""

import re
import sys
from collections.abc import Collection
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1]), *sys.path]

from benchmarks.harness import HEAD

OVERVIEW = "At a glance"


def sections(text: str) -> dict[str, str]:
    """Title → section; "" is what stands above the first."""
    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    return {"": head.strip()} | {part.partition("\n")[0]: f"## {part.strip()}" for part in rest}


def overview(parts: dict[str, str]) -> str:
    """Where each stage stands: the rows of all tables whose ratio is to reach something."""
    lines = [f"## {OVERVIEW}", "", "| stage | case | ratio | to reach | limit |", "| --- | --- | --- | --- | --- |"]
    for title, section in parts.items():
        for line in section.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if len(cells) == len(HEAD) and re.match(r"[<>]=", cells[HEAD.index("to reach")]):
                row = dict(zip(HEAD, cells, strict=True))
                mark = "" if reached(row["ratio"], row["to reach"]) else ": **missed**"
                lines.append(
                    f"| {title} | {row['case']} | {row['ratio']} | {row['to reach']}{mark} | {row['limit']} |"
                )
    return "\n".join(lines)


def reached(ratio: str, aim: str) -> bool:
    """Whether a figure is on the right side of an aim such as ">= 2.5" or "<= 25%"."""
    value, wanted = (float(re.search(r"\d[\d.,]*", text)[0].replace(",", "")) for text in (ratio, aim))
    return value >= wanted if aim.startswith(">") else value <= wanted


def merged(old: str, new: str, keep: Collection[str] | None = None) -> str:
    """`old` with the sections of `new`, new titles at the end; the overview of all comes first.

    Args:
        keep: the titles of `old` that stay; None: all.
    """
    parts = {title: part for title, part in sections(old).items() if keep is None or title in keep} | sections(new)
    head = parts.pop("")
    parts.pop(OVERVIEW, None)
    return "\n\n".join((head, overview(parts), *parts.values())) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    old = path.read_text() if path.exists() else ""
    path.write_text(merged(old, sys.stdin.read(), sys.argv[2:] or None))
