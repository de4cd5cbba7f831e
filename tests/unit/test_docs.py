"""The documents name files that exist, and the README stays short."""

import re
import subprocess

import pytest
from commands import PROJECT

LISTED = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True).stdout.split()
FILES = set(LISTED) or {str(file.relative_to(PROJECT)) for file in PROJECT.rglob("*") if file.is_file()}
PAGES = sorted(name for name in FILES if name.endswith(".md"))
# A path of the project in backticks or in a command: a folder of it, then a file with an extension.
PATH = re.compile(
    r"(?<![\w/.{}-])((?:alignment|bandit|benchmarks|docs|tests)/[\w/.-]+\.(?:py|sh|md|yaml|txt|png|svg))\b"
)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (PROJECT / page).read_text(encoding="utf-8")
    folder = (PROJECT / page).parent
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"", text)
    local = {a or b for a, b in links if not re.match(r"[a-z]+:", a or b)}
    missing = sorted(link for link in local if not (folder / link).exists())
    made = re.compile(r"alignment/(runs|assets)/|bandit/results/|alignment/lab/results/")
    missing += sorted({path for path in PATH.findall(text) if path not in FILES and not made.match(path)})
    assert not missing


def test_the_readme_is_short():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    assert len(text.split()) <= 1500
