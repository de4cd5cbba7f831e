"""The report of a real, tiny run: its files made by the pipeline's own scripts, its page opened in a real browser."""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from tiny import save_tiny_policy, save_tiny_reward_model

from annotate_data import get_rewards
from common.cli import run
from evaluation import get_kl, summarize
from generation import generate

MODELS = [("base", 0), ("iter1", 1), ("online", 2), ("mixp", 2)]
QUESTIONS = ["who are you?", "what is it?", "a cat.", "b?", "why, oh why?", "go on.", "yes or no?", "z."]
FIGURES = ["reward_vs_iteration", "reward_vs_kl", "win_rates", "reward_distributions"]


def call(script, *words):
    """Runs a script's own `main` on a command line, in this process; its exit code."""
    arguments, sys.argv = sys.argv, [script.__name__, *map(str, words)]
    try:
        run(script.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = arguments
    return 0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Four models; rewards and a judge's scores on test and train prompts; KL of all but `mixp`."""
    folder = tmp_path_factory.mktemp("tiny_run")
    data, results = folder / "data", folder / "results"
    data.mkdir()
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    judges = {
        "rewards": save_tiny_reward_model(folder / "rm", 1),
        "judge": save_tiny_reward_model(folder / "j", 2),
    }
    base = None
    for seed, (label, n) in enumerate(MODELS):
        policy = save_tiny_policy(folder / "models" / label, seed=seed, sharpness=5.0)
        base = base or policy
        name = f"iter{{}}_{label}_{n}.json"
        parts = [data / f"test_gen_data_{name.format(part)}" for part in (0, 1)]
        assert call(
            generate, "--model_name_or_path", policy, "--dataset_name_or_path", prompts, "--sampler", "online",
            "--K", 1, "--temperature", 0.8, "--max_new_tokens", 12, "--backend", "hf",
            "--start", 0, 4, "--end", 4, 8, "--output_file", *parts,
        ) == 0  # fmt: skip
        for kind, judge in judges.items():
            scored = [data / f"test_data_with_{kind}_{name.format(part)}" for part in (0, 1)]
            words = (
                "--dataset_name_or_path",
                *parts,
                "--reward_name_or_path",
                judge,
                "--output_file",
                *scored,
            )
            assert call(get_rewards, *words) == 0
        if label not in ("base", "mixp"):
            assert call(
                get_kl, "--model_name_or_path", policy, "--ref_model_name_or_path", base,
                "--dataset_name_or_path", prompts, "--temperature", 0.8, "--max_new_tokens", 12,
                "--backend", "hf", "--output_file", results / f"kl_{label}_{n}.json",
            ) == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def results(run_dir):
    assert call(summarize, "--run_dir", run_dir, "--samplers", "online", "mixp", "--iterations", 2) == 0
    return run_dir / "results"


def test_summary_holds_the_runs_own_numbers(run_dir, results):
    rows = {row["sampler"]: row for row in csv.DictReader((results / "summary.csv").open())}
    assert list(rows) == [label for label, _ in MODELS]
    rewards = {}
    for label, n in MODELS:
        file = run_dir / "data" / f"test_data_with_rewards_iter0_{label}_{n}.json"
        instances = json.loads(file.read_text())["instances"]
        rewards[label] = [i["rewards"][0] for i in instances]
        assert float(rows[label]["test_reward"]) == pytest.approx(statistics.fmean(rewards[label]))
        length = statistics.fmean(i["num_tokens"][0] for i in instances)
        assert float(rows[label]["length"]) == pytest.approx(length)
    won = [(a > b) + (a == b) / 2 for a, b in zip(rewards["online"], rewards["base"], strict=True)]
    assert float(rows["online"]["win_rate"]) == pytest.approx(statistics.fmean(won))
    kl = json.loads((results / "kl_online_2.json").read_text())
    assert float(rows["online"]["kl"]) == kl["kl"] > 0
    assert rows["mixp"]["kl"] == ""
    # mixp's KL, and so matched KL; distinct-2 of all four, whose responses are single words
    assert (results / "summary.md").read_text().count("missing") == 2 + 4


def test_figures_are_drawn(results):
    for name in FIGURES:
        pixels = imread(results / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.02
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_page_needs_nothing_from_outside(results):
    page = (results / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]{22})', page)
    assert sources == ["data:image/png;base64,"] * len(FIGURES)
    assert '"reward_template": "none"' in page.replace("&quot;", '"')


@pytest.fixture(scope="session")
def chromium():
    """The browser's path; on a machine where this may be done it is installed first."""
    if not shutil.which("chromium") and shutil.which("apt-get") and os.geteuid() == 0:
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *words], capture_output=True, check=False)
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium here, and it cannot be installed (needs root and apt-get)")
    return found


def browse(chromium, page: Path, *flags):
    profile = page.parent / "profile"
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
    words = [
        chromium,
        *plain,
        *quiet,
        f"--user-data-dir={profile}",
        "--window-size=1300,3000",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=180, check=True).stdout


def test_page_in_a_real_browser(results, chromium, tmp_path):
    probe = """<script>onload = () => {
    const widths = [...document.images].map(image => image.naturalWidth);
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const rows = document.querySelectorAll("table")[0].rows.length;
    document.body.dataset.found = JSON.stringify({widths, wide, rows});
    }</script></body>"""
    page = tmp_path / "report.html"
    page.write_text((results / "report.html").read_text().replace("</body>", probe))
    dom = browse(chromium, page, "--dump-dom")
    found = json.loads(re.search(r'data-found="([^"]+)"', dom)[1].replace("&quot;", '"'))
    assert len(found["widths"]) == len(FIGURES) and min(found["widths"]) > 300
    assert found["wide"] <= 0 and found["rows"] == 1 + len(MODELS)
    browse(chromium, page, f"--screenshot={tmp_path}/page.png")
    pixels = imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[1] == 1300 and pixels.std() > 0.05


def test_a_sampler_that_is_not_trained_yet_is_missing(run_dir, results, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    words = ("--run_dir", copy, "--samplers", "online", "gshf", "--iterations", 3)
    assert call(summarize, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("| gshf, iteration 2")).count("missing") == 7
    assert next(line for line in lines if line.startswith("| online, iteration 2")).count("missing") == 0


def test_other_settings_are_refused_and_nothing_is_overwritten(run_dir, results, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    file = copy / "data" / "test_data_with_rewards_iter0_mixp_2.json"
    file.write_text(file.read_text().replace('"temperature": 0.8', '"temperature": 0.7'))
    before = (copy / "results" / "summary.csv").read_bytes()
    assert call(summarize, "--run_dir", copy, "--samplers", "online", "mixp", "--iterations", 2) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "temperature=0.7" in error and file.name in error
    assert (copy / "results" / "summary.csv").read_bytes() == before
    assert call(summarize, "--run_dir", tmp_path / "nowhere", "--samplers", "online", "--iterations", 2) == 2
