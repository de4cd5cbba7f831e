"""What the benchmarks do with their figures; the figures themselves are nothing to test on a noisy machine."""

import site
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from threading import Thread

from benchmarks.harness import Row, growth_row, shares, table
from benchmarks.merge import OVERVIEW, merged, reached, sections
from benchmarks.quickstart import stage_seconds

PROJECT = Path(__file__).resolve().parents[2]


def test_no_benchmark_hides_a_package():
    """A script's own folder is searched first: a file called like a package would be imported in its place."""
    packages = {path.parent.name for path in PROJECT.glob("*/*/*.py")} | {
        path.parent.name for path in PROJECT.glob("*/*.py")
    }
    for path in (PROJECT / "benchmarks").glob("*.py"):
        assert path.stem not in sys.stdlib_module_names | packages, path.name
        assert PathFinder.find_spec(path.stem, site.getsitepackages()) is None, path.name


OLD = "# Benchmarks\n\n- CPU: old\n\n## Generation\n\n| old |\n\n## KL\n\nwords\n\n| kept |\n"
NEW = "# Benchmarks\n\n- CPU: new\n\n## Generation\n\n| new |\n\n\n## Memory\n\n| first |\n\n"


def test_sections_that_were_not_measured_again_stay():
    both = merged(OLD, NEW)
    found = sections(both)
    assert list(found) == ["", OVERVIEW, "Generation", "KL", "Memory"]
    assert found[""] == "# Benchmarks\n\n- CPU: new"
    for title, last in {"Generation": "| new |", "KL": "| kept |", "Memory": "| first |"}.items():
        assert found[title].endswith(last)
    assert merged("", both) == merged(both, NEW) == both
    assert list(sections(merged(OLD, NEW, ["KL"]))) == ["", OVERVIEW, "KL", "Generation", "Memory"]
    assert list(sections(merged(OLD, NEW, ["none"]))) == ["", OVERVIEW, "Generation", "Memory"]


def test_the_overview_holds_what_is_to_be_reached():
    rows = [
        Row("a|b", "1 s", "2 s", "2.0", ">= 3", "4 a second", "memory"),
        Row("c", "1 s", "9 s", "9", "-", "-"),
        Row("d", "1 s", "9 s", "20%", "<= 25%", "-"),
    ]
    text = merged("", f"# Benchmarks\n\n## KL\n\n{table(rows)}\n")
    assert sections(text)[OVERVIEW].splitlines()[4:] == [
        "| KL | a\\|b | 2.0 | >= 3: **missed** | 4 a second |",
        "| KL | d | 20% | <= 25% | - |",
    ]
    assert reached("1,000", ">= 999") and not reached("4.5", "<= 4.4")


def test_stages_of_a_kind_are_added_up(tmp_path):
    lines = ("generate 1 online\t3", "train 1 online\t5", "generate 2 online mix_1_1_1\t4", "train 2 mix_1_1_1\t7")
    (tmp_path / "stage_seconds.tsv").write_text("\n".join((*lines, "judge\t1", "kl\t6")) + "\n")
    assert stage_seconds(tmp_path) == {"generate": [3, 4], "train": [5, 7], "judge": [1], "kl": [6]}


def test_a_growth_row_and_its_table():
    row = growth_row("a|b", 2.0, 9.0)
    assert row == Row("a|b", "2 s (1x)", "9 s (4x)", "4.50", "<= 4.4", "4", "-")
    assert table([row]).splitlines()[2].startswith("| a\\|b | 2 s (1x) |")


def test_a_profile_of_nothing_but_products():
    import torch

    matrix = torch.ones(512, 512)
    words = shares(lambda: [matrix @ matrix for _ in range(20)])
    assert words.startswith("matrix products ") and words.endswith(", attention 0%")
    assert int(words.removeprefix("matrix products ").split("%")[0]) > 80


def test_a_profile_sees_other_threads():
    """Annotation scores in threads; a profile of the caller's alone would hold none of its products."""
    import torch

    a = torch.ones(300, 300)

    def products():
        thread = Thread(target=lambda: [a @ a for _ in range(20)])
        thread.start()
        thread.join()

    assert int(shares(products).removeprefix("matrix products ").split("%")[0]) > 80
