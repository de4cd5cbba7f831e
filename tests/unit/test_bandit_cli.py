"""The real command line: presets at full size, files and keys, every kind of bad input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bandit import outputs, presets
from bandit.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bandit" / "examples" / "tabular.py"
FIGURES = {f"tabular_DPO_{name}.{kind}" for name in ("param_diff", "value", "value_diff") for kind in ("pdf", "png")}
FILES = {"trajectories.npz", "config.json", "summary.csv"} | FIGURES
SERIES = {"param_diff", "value", "value_diff", "max_delta"}


def tabular(*arguments, cwd=ROOT, script=SCRIPT):
    """Runs the script; returns the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170)


def results(folder):
    with np.load(folder / "trajectories.npz") as data:
        return dict(data)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Both of the paper's figures at full size."""
    folder = tmp_path_factory.mktemp("paper")
    process = tabular("--preset", "paper", "--output_dir", folder)
    assert process.returncode == 0, process.stderr
    return folder


def test_paper_preset_writes_both_figures(paper):
    for name, mode, num_iter in (("paper-exact", "exact", 100), ("paper-empirical", "empirical", 3000)):
        assert names_in(paper / name) == FILES
        data = results(paper / name)
        samplers = presets.PRESETS[name]["samplers"]
        assert set(data) == {"rewards"} | {f"{s}/{mode}/{key}" for s in samplers for key in SERIES}
        assert all(values.dtype == np.float64 for values in data.values())
        assert data.pop("rewards").shape == (1, 20)
        assert all(values.shape == (1, num_iter) for values in data.values())


def test_paper_exact_shows_the_gap_between_the_samplers(paper):
    data = results(paper / "paper-exact")
    updates = {s: np.argmax(data[f"{s}/exact/param_diff"][0] < 1e-8) for s in ("DPO-Unif", "DPO-Mix-R", "DPO-Mix-P")}
    assert 0 < max(updates["DPO-Mix-R"], updates["DPO-Mix-P"]) < updates["DPO-Unif"] / 3
    assert min(data[key].min() for key in data if key.endswith("value_diff")) >= 0


def test_paper_empirical_shows_the_mixtures_ahead_and_one_floor(paper):
    data = {
        key.split("/")[0]: value[0] for key, value in results(paper / "paper-empirical").items() if "param" in key
    }
    floors = [errors[1500:].mean() for errors in data.values()]
    np.testing.assert_allclose(floors, 5.6e-3, rtol=0.2)
    halfway = {name: np.argmax(errors < 0.05) for name, errors in data.items()}
    assert max(halfway["DPO-Mix-R"], halfway["DPO-Mix-P*"]) < halfway["DPO-Unif"]


def test_columns_are_states_and_column_zero_is_the_uniform_policy(paper):
    data = results(paper / "paper-exact")
    r = data["rewards"][0]
    start = np.abs(r[:, None] - r[None, :]).sum() / 400
    for name in presets.PRESETS["paper-exact"]["samplers"]:
        assert data[f"{name}/exact/param_diff"][0, 0] == pytest.approx(start, rel=1e-12)
        assert data[f"{name}/exact/value"][0, 0] == pytest.approx(r.mean(), rel=1e-12)
    d = np.zeros((20, 20))
    wins = 1 / (1 + np.exp(r[None, :] - r[:, None]))
    theta = -10.0 * 2 * 3 * ((1 / (1 + np.exp(-d)) - wins) / 400).sum(axis=1)
    v = r - 3 * theta
    after = np.abs(v[:, None] - v[None, :]).sum() / 400
    assert data["DPO-Unif/exact/param_diff"][0, 1] == pytest.approx(after, rel=1e-12)


def test_theory_preset_reports_that_every_bound_holds(tmp_path):
    process = tabular("--preset", "theory", "--output_dir", tmp_path)
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader((tmp_path / "bounds.csv").open()))
    sizes = presets.PRESETS["theory"]["num_actions"]
    assert {(row["sampler"], int(row["num_actions"])) for row in rows} == {
        (name, size) for name in presets.PRESETS["theory"]["samplers"] for size in sizes
    }
    assert all(row["holds"] == "True" and 0 < float(row["worst_ratio"]) <= 1 for row in rows)
    assert "2|Y|^2" in process.stdout and "worst_ratio" in process.stdout


def test_both_modes_all_samplers_many_environments(tmp_path):
    process = tabular(
        "--mode", "both", "--samplers", *SAMPLERS, "mix_0.2_0.4_0.5", "--num_envs", 3, "--num_actions", 5, "--theory",
        "--reward_dist", "uniform", "--lr", 0.1, "--num_iter", 40, "--num_samples", 64,
        "--output_dir", tmp_path / "a",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    data = results(tmp_path / "a")
    assert len(data) == 1 + 2 * 4 * (len(SAMPLERS) + 1)
    assert data["mix_0.2_0.4_0.5/empirical/value"].shape == (3, 40)
    assert data["rewards"].min() >= 0 and data["rewards"].max() <= 1
    rows = list(csv.DictReader((tmp_path / "a" / "summary.csv").open()))
    assert len(rows) == 2 * (len(SAMPLERS) + 1)


def test_rewards_and_reference_from_files(tmp_path):
    rewards, log_ref = np.array([[0.3, -1.0, 2.0], [0.0, 1.0, 0.5]]), np.log([0.2, 0.3, 0.5])
    np.save(tmp_path / "r.npy", rewards)
    np.save(tmp_path / "ref.npy", log_ref)
    process = tabular(
        "--rewards", tmp_path / "r.npy", "--ref_logprobs", tmp_path / "ref.npy", "--samplers", "DPO-Mix-P", "--lr",
        "matched", "--num_iter", 12, "--beta", 0.7, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    data = results(tmp_path / "out")
    np.testing.assert_array_equal(data["rewards"], rewards)
    np.testing.assert_allclose(data["DPO-Mix-P/exact/value"][:, 0], rewards @ np.exp(log_ref), rtol=1e-12)
    best = 0.7 * np.log((np.exp(log_ref) * np.exp(rewards / 0.7)).sum(axis=1))
    np.testing.assert_allclose(data["DPO-Mix-P/exact/value"][:, -1], best, rtol=1e-12)


def test_same_seed_same_files_and_another_sampler_changes_no_curve(tmp_path):
    common = ["--mode", "empirical", "--num_iter", 30, "--num_samples", 100, "--seed", 4, "--lr", 0.05]
    for folder, samplers in (("a", ["DPO-Unif"]), ("b", ["DPO-Unif"]), ("c", ["DPO-Mix-R", "DPO-Unif"])):
        process = tabular(*common, "--samplers", *samplers, "--output_dir", tmp_path / folder)
        assert process.returncode == 0, process.stderr
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    alone, together = results(tmp_path / "a"), results(tmp_path / "c")
    for key, values in alone.items():
        np.testing.assert_array_equal(values, together[key])


def test_results_of_other_settings_are_kept_unless_told(tmp_path):
    base = ["--num_iter", 3, "--output_dir", tmp_path]
    assert tabular(*base).returncode == 0
    before = (tmp_path / "trajectories.npz").read_bytes()
    refused = tabular(*base, "--beta", 2)
    assert refused.returncode == 2 and "beta 3.0 -> 2.0" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "trajectories.npz").read_bytes() == before
    assert tabular(*base).returncode == 0
    assert tabular(*base, "--beta", 2, "--overwrite").returncode == 0
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["beta"] == 2


def test_an_unstable_step_is_warned_of_and_a_stable_one_is_not(tmp_path):
    for lr, warned in ((100, True), (1, False)):
        process = tabular("--lr", lr, "--num_iter", 3, "--output_dir", tmp_path / str(lr))
        assert process.returncode == 0
        assert ("unstable for DPO-Mix-R in 1 of 1" in process.stderr) is warned


def test_default_folder_is_the_presets_and_moves_when_a_flag_overrides_it():
    preset = presets.PRESETS["paper-exact"]
    assert outputs.default_folder("paper-exact", dict(preset), preset) == ROOT / "bandit" / "results" / "paper-exact"
    other = outputs.default_folder("paper-exact", {**preset, "seed": 5}, preset)
    assert other.parent == ROOT / "bandit" / "results" and other.name.startswith("paper-exact-")


def test_runs_from_the_bandit_folder_too(tmp_path):
    process = tabular("--num_iter", 2, "--output_dir", tmp_path, cwd=ROOT / "bandit", script="examples/tabular.py")
    assert process.returncode == 0 and names_in(tmp_path) == FILES


def test_help_names_every_sampler_and_the_convention():
    text = tabular("--help").stdout
    assert all(name in text for name in SAMPLERS) and "2|Y|^2" in text and "--device" in text


PINS = {line for line in (ROOT / "requirements_cpu.txt").read_text().splitlines() if "==" in line}


def test_the_bandits_packages_have_the_pins_of_the_whole_environment():
    pins = [line for line in (ROOT / "requirements_bandit.txt").read_text().splitlines() if "==" in line]
    assert {"numpy", "numba", "matplotlib"} <= {pin.split("==")[0] for pin in pins}
    assert set(pins) <= PINS


@pytest.mark.parametrize("script", ["tabular", "ablation", "linear"])
def test_a_missing_package_is_named_with_its_remedy(script, tmp_path):
    """Python without site packages: none of the three is there."""
    command = [sys.executable, "-S", str(ROOT / f"bandit/examples/{script}.py"), "--output_dir", tmp_path / "out"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert all(word in process.stderr for word in ("numpy", "numba", "matplotlib", "setup.sh bandit"))
    assert not (tmp_path / "out").exists()


def test_runs_with_its_own_packages_alone(tmp_path):
    """Every package that is neither Python's nor listed in requirements_bandit.txt cannot be imported."""
    code = f"""
import runpy, sys
known = sys.stdlib_module_names | {{"bandit", "numpy", "numba", "llvmlite", "matplotlib", "mpl_toolkits"}}
known |= {{"contourpy", "cycler", "fontTools", "kiwisolver", "packaging", "PIL", "pyparsing", "dateutil", "tzdata"}}
class Refuse:
    def find_spec(name, path=None, target=None):
        if name[0] != "_" and name.split(".")[0] not in known:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse)
sys.argv = ["tabular.py", *"--mode both --num_iter 3 --num_samples 9 --output_dir".split(), {str(tmp_path)!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170)
    assert process.returncode == 0, process.stderr
    assert names_in(tmp_path) == FILES


def test_runs_where_neither_checkout_nor_home_can_be_written(tmp_path):
    """Compiled code is then kept nowhere; the results are the same."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "bandit", checkout / "bandit", ignore=shutil.ignore_patterns("__pycache__", "results"))
    for folder in (checkout / "bandit", checkout / "bandit/examples"):
        (folder / "__pycache__").write_text("a file, so that no folder can be made")
    nowhere = {"HOME": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none"}
    flags = ["--num_iter", "5", "--output_dir"]
    command = [sys.executable, "-B", str(checkout / "bandit/examples/tabular.py"), *flags, str(tmp_path / "a")]
    environment = {**os.environ, **nowhere, "MPLCONFIGDIR": str(tmp_path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert process.returncode == 0, process.stderr
    assert tabular(*flags, tmp_path / "b").returncode == 0
    assert (tmp_path / "a/trajectories.npz").read_bytes() == (tmp_path / "b/trajectories.npz").read_bytes()


BAD = {
    "beta zero": (["--beta", "0"], "--beta"),
    "beta negative": (["--beta", "-1"], "--beta"),
    "beta nan": (["--beta", "nan"], "--beta"),
    "beta text": (["--beta", "big"], "--beta"),
    "lr zero": (["--lr", "0"], "--lr"),
    "lr negative": (["--lr", "-2"], "--lr"),
    "lr infinite": (["--lr", "inf"], "--lr"),
    "lr text": (["--lr", "fast"], "--lr"),
    "sampler unknown": (["--samplers", "DPO-Mix-Q"], "DPO-Mix-Q"),
    "sampler malformed": (["--samplers", "mix:1,2"], "mix:1,2"),
    "sampler probability": (["--samplers", "mix:1,2,3"], "mix:1,2,3"),
    "theory beyond the theorems": (["--samplers", "online", "--lr", "theory"], "online"),
    "actions": (["--num_actions", "1"], "--num_actions"),
    "envs": (["--num_envs", "0"], "--num_envs"),
    "iterations": (["--num_iter", "0"], "--num_iter"),
    "samples": (["--num_samples", "0"], "--num_samples"),
    "seed": (["--seed", "-1"], "--seed"),
    "flag": (["--sampler", "DPO-Unif"], "--sampler"),
    "preset": (["--preset", "mine"], "--preset"),
    "theory preset without an update": (["--preset", "theory", "--num_iter", "1"], "--num_iter"),
    "theory preset with lr": (["--preset", "theory", "--lr", "1"], "--lr"),
    "missing file": (["--rewards", "{missing}"], "missing.npy"),
    "not an array": (["--rewards", "{text}"], "text.npy"),
    "nan rewards": (["--rewards", "{nan}"], "nan.npy"),
    "infinite rewards": (["--rewards", "{inf}"], "inf.npy"),
    "one action": (["--rewards", "{one}"], "one.npy"),
    "three axes": (["--rewards", "{cube}"], "cube.npy"),
    "objects": (["--rewards", "{objects}"], "objects.npy"),
    "size against file": (["--rewards", "{good}", "--num_actions", "7"], "--num_actions"),
    "reference of wrong size": (["--rewards", "{good}", "--ref_logprobs", "{one}"], "--ref_logprobs"),
    "reference not a distribution": (["--rewards", "{good}", "--ref_logprobs", "{good}"], "sum to 1"),
    "reference does not fit": (["--ref_logprobs", "{good}"], "--ref_logprobs"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    arrays = {
        "good": np.arange(3.0), "nan": [0, np.nan], "inf": [0, np.inf], "one": [1.0], "cube": np.zeros((2, 2, 2)),
        "objects": np.array([{}, None]),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    (folder / "text.npy").write_text("not an array")
    return {name: folder / f"{name}.npy" for name in [*arrays, "text", "missing"]}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_ends_with_one_line_and_writes_nothing(case, inputs, tmp_path):
    arguments, culprit = BAD[case]
    process = tabular(*(a.format(**inputs) for a in arguments), "--output_dir", tmp_path / "out")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1 and culprit in process.stderr
    assert "Traceback" not in process.stderr and process.stdout == ""
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        process = tabular("--output_dir", folder)
        assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
        assert "--output_dir" in process.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_foreign_config_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    process = tabular("--output_dir", tmp_path)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert names_in(tmp_path) == {"config.json"}
