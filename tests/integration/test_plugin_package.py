"""The plugin is a package of its own: its wheel holds all modules, a version and the entry point that vLLM reads."""

import subprocess
import sys
import zipfile
from pathlib import Path

import vllm_logit_mixture

PLUGIN = Path(__file__).parents[2] / "alignment/generation/logit_mixture"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


def test_wheel_and_installation(tmp_path):
    subprocess.run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(tmp_path), str(PLUGIN)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    assert vllm_logit_mixture.__version__ in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"vllm_logit_mixture/{path.name}" for path in (PLUGIN / "vllm_logit_mixture").glob("*.py")}
    assert modules <= set(names)
    [entry] = [name for name in names if name.endswith("entry_points.txt")]
    assert "logit_mixture = vllm_logit_mixture:register" in zipfile.ZipFile(wheel).read(entry).decode()
    target = tmp_path / "site"
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(target), str(PLUGIN)], check=True)
    code = "import vllm_logit_mixture, sys; assert 'vllm' not in sys.modules; print(vllm_logit_mixture.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip().startswith(str(target))
