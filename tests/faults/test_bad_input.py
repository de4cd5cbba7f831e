"""Wrong input to the real scripts: exit code 2, one line that names what and where, nothing made or overwritten.

The table of cases is bad_input_table.py. All run in one process that calls the scripts' real mains
(call_scripts.py); some of each script run as processes of their own too.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from bad_input_table import SCRIPTS
from call_scripts import snapshot
from commands import ALIGNMENT
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tiny import CHARACTERS, save_tiny_policy, save_tiny_reward_model, tiny_tokenizer

from common.journal import Journal
from common.models import load_config, tokenizer_fingerprint

CASES = [
    pytest.param(script, f"{script} {right} {wrong}", parts, id=f"{Path(script).stem}: {name}")
    for script, right, table in SCRIPTS
    for name, (wrong, parts) in table.items()
]
RULES = """def good(prompt, responses, fields):
    return [1] * len(responses)

def fails(prompt, responses, fields):
    return fields["absent"]

def one(prompt, responses, fields):
    return [1]

def infinite(prompt, responses, fields):
    return [1, float("inf")]
"""
ROW = {
    "prompt": "a cat",
    "responses": ["ab", "cd"],
    "rewards": [0.5, 1.5],
    "stop_reasons": ["stop", "length"],
}
ROW |= {"pairs": [0, 0], "num_tokens": [2, 2]}
MADE_WITH = {"generate": {"tokenizer": tokenizer_fingerprint(tiny_tokenizer())}}
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def data(*changes: dict, settings: object = None, **common) -> str:
    """A data file of two rows or more; the changes are to its rows from the second on."""
    rows = [{**ROW, **common}, *({**ROW, **common, **change} for change in changes or [{}])]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return json.dumps({"instances": rows} | ({} if settings is None else {"settings": settings}))


def pairs(*changes: dict) -> str:
    """Preference pairs as JSONL."""
    pair = {"prompt": "a?", "chosen": "b", "rejected": "c"}
    return "".join(json.dumps({**pair, **change}) + "\n" for change in changes)


def begun_journal(settings: dict) -> bytes:
    """What a stage of these settings leaves when it is killed after its first row."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "out.json", settings)
        journal.add("0.0", {})
        return journal.path.read_bytes()


def texts() -> dict[str, str | bytes]:
    """Name → content of the files that are written as they stand here."""
    stored = {"generate": {"policy": "x", "temperature": 9}, "annotate": {"a": 1}, "kl": {"temperature": 9}}
    online, mixed = [[1, [1, 0], [1, 0]]], [[1, [1.5, -0.5], [0.5, 0.5]]]
    return {
        "prompts.jsonl": "".join(json.dumps({"prompt": p}) + "\n" for p in ("hello there", "a cat", "no")),
        "pairs.jsonl": pairs({}, {"prompt": "d?"}, {"prompt": "e?"}),
        "data.json": data({"prompt": "a dog"}),
        "empty.json": "",
        "no_rows.json": "[]",
        "no_instances.json": '{"instances": []}',
        "torn.jsonl": '{"prompt": "a"}\n{"prompt": "b\n',
        "rules.py": RULES,
        "torn.py": "def good(:",
        "latin.jsonl": b'{"prompt": "\xe9"}\n',
        "deep.json": "[" * 100_000,
        "digits.json": "[" + "9" * 5000 + "]",
        "texts.json": '["a"]',
        "questions.jsonl": '{"prompt": "a"}\n{"question": "b"}\n',
        "number.json": '[{"prompt": "a"}, {"prompt": 3}]',
        "blank.json": '[{"prompt": " "}]',
        "half.json": '[{"prompt": "a"}, {"prompt": "\\ud800"}]',
        "chat.jsonl": json.dumps({"messages": [USER, ANSWER, USER]}) + "\n",
        "answered.jsonl": "".join(json.dumps({"messages": m}) + "\n" for m in ([USER], [USER, ANSWER])),
        "system.jsonl": json.dumps({"messages": [{"role": "system", "content": "be kind"}]}) + "\n",
        "torn.parquet": b"PAR1 and no more",
        "torn.jsonl.gz": b"\x1f\x8b and no more",
        "bare/README": "",
        "beyond.json": data({"response_ids": [[4], [999]]}, response_ids=[[4], [5]], settings=MADE_WITH),
        "text_ids.json": data({"response_ids": [[4], ["5"]]}, response_ids=[[4], [5]]),
        "few_ids.json": data({"response_ids": [[4]]}, response_ids=[[4], [5]]),
        "role.jsonl": json.dumps({"messages": [{**USER, "role": 3}]}) + "\n",
        "foreign.json": '{"instances": []}',
        "odd.json": data(settings=[1]),
        "made.json": data(settings=stored),
        "begun.json.journal": begun_journal({"K": 5}),
        "odd_row.json.journal": '{"K": 5}\n{"row": {}}\n',
        "broken.json.journal": '{"K": 5\n',
        "uneven.json": data({"responses": list("abc"), "rewards": [1, 2, 3], "stop_reasons": None, "pairs": None,
                             "num_tokens": None}),
        "response.json": data({"responses": ["a", 3]}),
        "extra.json": data({"score": float("nan")}),
        "templated.json": data(settings={"generate": {"template": "safe_rlhf"}}),
        "unscored.json": data(rewards=None),
        "reward_text.json": data({"rewards": [1, "2"]}),
        "infinite.json": data({"rewards": [1, float("inf")]}),
        "few.json": data({"rewards": [1]}),
        "single.json": data(responses=["a"], rewards=[1], stop_reasons=["stop"], pairs=[0], num_tokens=[1]),
        "equal.json": data(rewards=[1, 1]),
        "pairless.json": data(pairs=None),
        "long.json": data({"responses": ["a" * 390, "b"]}),
        "unstopped.json": data(stop_reasons=None),
        "warm.json": data(settings={"generate": {"policy": "policy", "temperature": 9, "sampler": online}}),
        "mixture.json": data(settings={"generate": {"policy": "policy", "sampler": mixed}}),
        "bad_sampler.json": data(settings={"generate": {"policy": "policy", "sampler": [1, 2]}}),
        "pair_type.jsonl": pairs({}, {"rejected": 3}),
        "one_prompt.jsonl": pairs({}, {}),
        "alike.jsonl": pairs({"rejected": "b"}, {"prompt": "d?", "rejected": "b"}),
        "trained/settings.json": '{"train": {"beta": 7}}',
        "run_file/eval/test_prompts/base_iter0_rewards.json": data(),
        "run_file/results": "",
        "run_kl/eval/test_prompts/base_iter0_rewards.json": data(),
        "run_kl/results/kl_shared_iter1.json": '{"kl": "much", "kl_of_prompts": [1, 2]}',
        "run_mixed/eval/test_prompts/base_iter0_rewards.json": data(settings={"generate": {"K": 1}}),
        "run_mixed/eval/test_prompts/shared_iter1_rewards.json": data(settings={"generate": {"K": 2}}),
        "run_prompts/eval/test_prompts/base_iter0_rewards.json": data(),
        "run_prompts/eval/test_prompts/shared_iter1_rewards.json": data({"prompt": "else"}),
    }  # fmt: skip


def make_models(folder: Path) -> None:
    """Good models, and some that are wrong in one thing each."""
    save_tiny_policy(folder / "policy", 0)
    save_tiny_policy(folder / "reference", 1, hidden=64, layers=1)
    save_tiny_policy(folder / "short", 1, context=32)
    save_tiny_reward_model(folder / "reward", 2)
    save_tiny_reward_model(folder / "two_labels", 2, labels=2)
    save_tiny_policy(folder / "other", 2, tokenizer=tiny_tokenizer(characters=CHARACTERS[::-1]))
    strict = tiny_tokenizer()
    strict.chat_template = "{% if messages|length > 1 %}{{ raise_exception('user turns only') }}{% endif %}"
    save_tiny_policy(folder / "strict", 0, tokenizer=strict)
    for name in (
        "torn_weights",
        "torn_tokenizer",
        "torn_config",
        "list_config",
        "unknown_kind",
        "half_model",
    ):
        shutil.copytree(folder / "policy", folder / name)
    for name in ("pickled", "pickled_code", "with_code"):
        shutil.copytree(folder / "policy", folder / name, ignore=shutil.ignore_patterns("model.safetensors"))
    weights = load_file(folder / "policy" / "model.safetensors")
    torch.save(weights, folder / "pickled" / "pytorch_model.bin")
    torch.save(Toucher(folder / "code_was_run"), folder / "pickled_code" / "pytorch_model.bin")
    (folder / "torn_weights" / "model.safetensors").write_bytes(
        (folder / "policy" / "model.safetensors").read_bytes()[:-100]
    )
    (folder / "torn_tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    (folder / "torn_config" / "config.json").write_text('{"model_type": "llama", ')
    (folder / "list_config" / "config.json").write_text("[]")
    (folder / "unknown_kind" / "config.json").write_text('{"model_type": "mamba9"}')
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "half_model" / "model.safetensors", metadata={"format": "pt"})
    add_code(folder / "with_code", folder / "policy" / "model.safetensors", folder / "code_was_run")


class Toucher:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def add_code(folder: Path, weights: Path, touched: Path) -> None:
    """Makes `folder` a model that brings Python code, which would make the file `touched`."""
    classes = {"AutoConfig": "code_of_mine.Config", "AutoModelForCausalLM": "code_of_mine.Model"}
    classes["AutoModelForSequenceClassification"] = "code_of_mine.Model"
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": classes}))
    (folder / "code_of_mine.py").write_text(
        f"from pathlib import Path\nPath({str(touched)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\nclass Model(LlamaForCausalLM):\n    pass\n"
    )
    shutil.copy(weights, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    make_models(folder)
    DatasetDict(train=Dataset.from_list([{"prompt": "a"}])).save_to_disk(folder / "saved")
    for name, content in texts().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def words(command: str) -> list[str]:
    script, *flags = shlex.split(command)
    return [str(ALIGNMENT / script), *flags]


@pytest.fixture(scope="module")
def outcomes(place):
    """Command → its outcome; every command has run in one process."""
    commands = [case.values[1] for case in CASES]
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "support/call_scripts.py", place],
        input=json.dumps([words(command) for command in commands]),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


def check_refusal(script: str, code: int, errors: str, parts: list[str]) -> None:
    assert code == 2, errors
    [line] = errors.splitlines()
    assert line.startswith(f"{Path(script).name}: error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(("script", "command", "parts"), CASES)
def test_refused_in_one_line(outcomes, script, command, parts):
    outcome = outcomes[command]
    check_refusal(script, outcome["code"], outcome["stderr"], parts)
    assert outcome["changed"] == []


# One that argparse finds, one that a reader finds, one that a loader finds, one that stands in the output's place.
OWN_PROCESS = (
    "generate: K is text",
    "generate: prompts not UTF-8",
    "generate: torn tokenizer",
    "get_rewards: K differs between rows",
    "get_rewards: no head",
    "run_dpo: output of other settings",
    "train_reward_model: field of the wrong type",
    "get_kl: of a mixture",
    "to_safetensors: pickle with code",
)


@pytest.mark.parametrize(("script", "command", "parts"), [case for case in CASES if case.id in OWN_PROCESS])
def test_so_are_processes_of_their_own(place, script, command, parts):
    before = snapshot(place)
    done = subprocess.run([sys.executable, *words(command)], cwd=place, capture_output=True, text=True, timeout=120)
    check_refusal(script, done.returncode, done.stderr, parts)
    assert snapshot(place) == before


def test_all_named_cases_are_there():
    assert {case.id for case in CASES} >= set(OWN_PROCESS) and len(CASES) > 100


def test_the_code_of_models_was_not_run_but_would_have_been(place, outcomes, tmp_path, monkeypatch):
    """What the refusals are worth: asked for it, the same files do run their code."""
    touched = place / "code_was_run"
    assert not touched.exists()
    torch.load(place / "pickled_code" / "pytorch_model.bin", weights_only=False)
    assert touched.exists()
    touched.unlink()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    load_config(str(place / "with_code"), "policy", trust_remote_code=True)
    assert touched.exists()
    touched.unlink()
