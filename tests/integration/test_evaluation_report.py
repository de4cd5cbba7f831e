"""The report of a real, tiny run: its files made by the pipeline's own scripts, its page opened in a real browser."""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from matplotlib.image import imread
from tiny import save_tiny_policy, save_tiny_reward_model

from annotate_data import get_rewards
from common.cli import run
from evaluation import get_kl, summarize
from evaluation.run_files import KL, PARTS, TEST
from generation import generate
from scripts import names

MODELS = [("base", 0), ("shared", 1), ("online", 2), ("mixp", 2)]
QUESTIONS = ["who are you?", "what <b>is</b> it?", "a cat.", "b?", "why, oh why?", "go on.", "yes or no?", "z."]
FIGURES = ["reward_vs_kl", "reward_vs_iteration", "win_rates", "reward_distributions"]


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
    """Four models; rewards and a judge's scores on all prompts; KL of all but `mixp`, on scored responses."""
    folder = tmp_path_factory.mktemp("tiny_run")
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
        *parts, on_kl = [names.evaluation(folder, part, n, label) for part in PARTS]
        for files, slices in ((parts, ("--start", 0, 4, "--end", 4, 8)), ([on_kl], ("--end", 4))):
            assert call(
                generate, "--model_name_or_path", policy, "--dataset_name_or_path", prompts, "--sampler", "online",
                "--K", 1, "--temperature", 0.8, "--max_new_tokens", 12, "--backend", "hf",
                *slices, "--output_file", *files,
            ) == 0  # fmt: skip
        for kind, judge in judges.items():
            scored = [names.evaluation(folder, part, n, label, kind) for part in PARTS]
            words = ("--reward_name_or_path", judge, "--output_file", *scored)
            assert call(get_rewards, "--dataset_name_or_path", *parts, on_kl, *words) == 0
        if label not in ("base", "mixp"):
            assert call(
                get_kl, "--model_name_or_path", policy, "--ref_model_name_or_path", base, "--responses", on_kl,
                "--temperature", 0.8, "--output_file", names.kl(folder, n, label),
            ) == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def results(run_dir):
    words = ("--samplers", "online", "mixp", "--iterations", 2, "--beta", 0.3, "--margin_scale", 2)
    assert call(summarize, "--run_dir", run_dir, *words) == 0
    return run_dir / "results"


def test_summary_holds_the_runs_own_numbers(run_dir, results):
    rows = {row["sampler"]: row for row in csv.DictReader((results / "summary.csv").open())}
    assert list(rows) == [label for label, _ in MODELS]
    rewards = {}
    for label, n in MODELS:
        instances = json.loads(names.evaluation(run_dir, TEST, n, label, "rewards").read_text())["instances"]
        rewards[label] = [i["rewards"][0] for i in instances]
        assert float(rows[label]["test_reward"]) == pytest.approx(statistics.fmean(rewards[label]))
        length = statistics.fmean(i["num_tokens"][0] for i in instances)
        assert float(rows[label]["length"]) == pytest.approx(length)
    won = [(a > b) + (a == b) / 2 for a, b in zip(rewards["online"], rewards["base"], strict=True)]
    assert float(rows["online"]["win_rate"]) == pytest.approx(statistics.fmean(won))
    kl = json.loads(names.kl(run_dir, 2, "online").read_text())
    assert float(rows["online"]["kl"]) == pytest.approx(kl["kl"]) and kl["kl"] > 0
    assert rows["mixp"]["kl"] == ""
    of_kl = json.loads(names.evaluation(run_dir, KL, 2, "online", "rewards").read_text())["instances"]
    value = statistics.fmean(i["rewards"][0] for i in of_kl) - 0.3 / 2 * kl["kl"]
    assert float(rows["online"]["value"]) == pytest.approx(value) and rows["mixp"]["value"] == ""


def test_figures_are_drawn(results):
    for name in FIGURES:
        pixels = imread(results / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.02
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_page_needs_nothing_from_outside(results):
    page = (results / "report.html").read_text()
    assert not re.search(r"https?://|<script [^>]*src|<link|@import|url\(", page)
    assert "default-src 'none'" in page  # a browser refuses whatever a response might want to load
    sources = re.findall(r'src="([^"]{22})', page)
    assert sources == ["data:image/png;base64,"] * len(FIGURES)
    assert '"reward_template": "none"' in page.replace("&quot;", '"')


def test_page_holds_what_the_models_say(run_dir, results):
    page = (results / "report.html").read_text()
    assert escape(QUESTIONS[1]) in page and QUESTIONS[1] not in page
    for label, n in MODELS:
        for scored in ("rewards", "judge"):
            instances = json.loads(names.evaluation(run_dir, TEST, n, label, scored).read_text())["instances"]
            assert all(f"{i['rewards'][0]:z.2f}</span>" in page for i in instances)
        assert all(f"<p>{escape(i['responses'][0])}</p>" in page for i in instances if i["responses"][0].strip())
    assert page.count("<article") == 2 * 4 * 4  # side by side; all four again as the best and worst of each model


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
        *(() if any(flag.startswith("--window-size") for flag in flags) else ["--window-size=1300,3000"]),
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=180, check=True).stdout


def test_page_in_a_real_browser(results, chromium, tmp_path):
    probe = """<script>onload = () => {
    const widths = [...document.images].map(image => image.naturalWidth);
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const rows = document.querySelectorAll("table")[0].rows.length;
    const shown = () => document.querySelectorAll("details.ask-all:not([hidden])").length;
    const all = shown(), search = document.querySelector("input");
    search.value = "OH WHY"; search.dispatchEvent(new Event("input"));
    const few = shown(), marked = document.querySelector("mark")?.textContent;
    search.value = ""; search.dispatchEvent(new Event("input"));
    document.querySelector("button[data-model]").click();
    const hidden = document.querySelectorAll("article[hidden]").length, again = shown();
    document.body.dataset.found = JSON.stringify({widths, wide, rows, all, few, marked, hidden, again});
    }</script></body>"""
    page = tmp_path / "report.html"
    text = (results / "report.html").read_text().replace("why, oh why?", "never").replace("a cat.", "why, oh why?")
    page.write_text(text.replace("</body>", probe))
    for width in (1300, 500):
        dom = browse(chromium, page, "--dump-dom", f"--window-size={width},3000")
        found = json.loads(re.search(r'data-found="([^"]+)"', dom)[1].replace("&quot;", '"'))
        assert len(found["widths"]) == len(FIGURES) and min(found["widths"]) > 300
        assert found["wide"] <= 0 and found["rows"] == 1 + len(MODELS)
        assert found["all"] == found["again"] == 4 + len(MODELS)
        # The question itself, and the best and worst of each model, which are all four questions here.
        assert found["few"] == 1 + len(MODELS) and found["marked"] == "oh why"
        assert found["hidden"] == 2 * 4  # one model's, in both places
    browse(chromium, page, f"--screenshot={tmp_path}/page.png")
    pixels = imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[1] == 1300 and pixels.std() > 0.05


def test_no_request_leaves_the_page(results, chromium, tmp_path):
    """An image that a response might smuggle in is asked for, unless the page's own rule forbids it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        image = f'<img src="http://127.0.0.1:{server.server_port}/{{}}"></body>'
        text = (results / "report.html").read_text()
        open_page = re.sub("<meta http-equiv[^>]*>", "", text)
        for name, content in {"kept": text, "open": open_page}.items():
            page = tmp_path / f"{name}.html"
            page.write_text(content.replace("</body>", image.format(name)))
            browse(chromium, page, "--dump-dom")
        server.shutdown()
    assert asked == ["/open"]


def test_given_checkpoints_without_a_training_run(run_dir, tmp_path, capsys):
    for part in PARTS:
        for scored in ("rewards", "judge"):
            for (n, label), name in {(0, "base"): (0, "base"), (2, "online"): (None, "theirs")}.items():
                target = names.evaluation(tmp_path, part, *name, scored)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(names.evaluation(run_dir, part, n, label, scored), target)
    names.kl(tmp_path, None, "theirs").parent.mkdir()
    shutil.copy(names.kl(run_dir, 2, "online"), names.kl(tmp_path, None, "theirs"))
    assert call(summarize, "--run_dir", tmp_path, "--models", "theirs") == 0
    rows = list(csv.DictReader((tmp_path / "results/summary.csv").open()))
    assert [(row["sampler"], row["iteration"]) for row in rows] == [("base", "0"), ("theirs", "")]
    assert rows[1]["kl"] and rows[1]["value"]
    assert (tmp_path / "results/reward_vs_kl.png").exists()
    assert call(summarize, "--run_dir", tmp_path) == 2
    assert call(summarize, "--run_dir", tmp_path, "--samplers", "online") == 2
    assert call(summarize, "--run_dir", tmp_path, "--models", "../theirs") == 2


def test_a_sampler_that_is_not_trained_yet_is_missing(run_dir, results, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    words = ("--run_dir", copy, "--samplers", "online", "gshf", "--iterations", 3)
    assert call(summarize, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("| gshf, iteration 2")).count("missing") == 6
    assert next(line for line in lines if line.startswith("| online, iteration 2")).count("missing") == 0


def test_other_settings_are_refused_and_nothing_is_overwritten(run_dir, results, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    file = names.evaluation(copy, TEST, 2, "mixp", "rewards")
    file.write_text(file.read_text().replace('"temperature": 0.8', '"temperature": 0.7'))
    before = (copy / "results" / "summary.csv").read_bytes()
    assert call(summarize, "--run_dir", copy, "--samplers", "online", "mixp", "--iterations", 2) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "temperature=0.7" in error and file.name in error
    assert (copy / "results" / "summary.csv").read_bytes() == before
    assert call(summarize, "--run_dir", tmp_path / "nowhere", "--samplers", "online", "--iterations", 2) == 2
