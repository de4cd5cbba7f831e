"""More than one engine: the same files as one process, and what dies on the way is done again, once.

Ray runs on this machine: local, as the scripts start it, and as a cluster of two nodes that the test starts and of
which it kills one. The nodes claim GPUs, which nothing here uses.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from commands import ALIGNMENT, ends_in_one_line, python
from driver_runs import journal_rows, wait_until
from mixture_loop import greedy
from tiny import save_tiny_policy, save_tiny_reward_model, tiny_tokenizer
from toy_engine import Devices, Squares

from common import scale_out
from common.cli import UserError
from common.record_stream import read_records

pytestmark = pytest.mark.slow
HEAD, SECOND = {"num_cpus": 4, "num_gpus": 3}, {"num_cpus": 4, "num_gpus": 1}
GENERATE, ANNOTATE = "generation/generate.py", "annotate_data/get_rewards.py"
RESPONSES = 192


@pytest.fixture(scope="module")
def ray_cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in scale_out.OF_A_LOCAL_RAY.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={**HEAD, "include_dashboard": False})
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(ray_cluster, monkeypatch):
    """A cluster of two nodes, to which the scripts are pointed; their engines can import what the tests import."""
    if len(ray_cluster.list_all_nodes()) < 2:
        ray_cluster.add_node(**SECOND)
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    return ray_cluster


@contextlib.contextmanager
def engines(wanted: int, gpus: int = 1):
    """This process as one that has engines in the cluster."""
    import ray

    try:
        yield scale_out.start(wanted, gpus)
    finally:
        ray.shutdown()


def begun(folder: Path) -> Counter:
    """Number → how often an engine began it."""
    return Counter(map(int, (folder / "begun").read_text().split()))


@pytest.mark.parametrize("victim", ["engine", "node"])
def test_what_dies_is_done_again_and_nothing_else(cluster, victim, tmp_path, capsys):
    """SIGKILL in the middle: every answer comes once; only what the dead engine was at is begun twice."""
    numbers = list(range(24))
    found, processes, answered_before = {}, set(), None
    with engines(2) as two:
        for index, (square, process) in scale_out.answers(functools.partial(Squares, tmp_path), numbers, two):
            assert index not in found
            found[index] = square
            processes.add(process)
            if len(processes) == 2 and answered_before is None:
                answered_before = set(found)
                if victim == "engine":
                    os.kill(process, signal.SIGKILL)
                else:
                    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
    assert found == {i: i * i for i in numbers}
    counts = begun(tmp_path)
    assert set(counts) == set(numbers)
    assert not answered_before & {i for i, count in counts.items() if count > 1}
    assert counts.total() - len(numbers) <= 1  # an engine is at one item at a time
    assert len(processes) == 3
    assert "an engine was lost and started again (1 so far)" in capsys.readouterr().out


def test_errors_in_engines(cluster, tmp_path):
    """A wrong input is one line; a broken engine has one more chance; a bug keeps its stack trace."""
    from ray.exceptions import RayTaskError

    squares = functools.partial(Squares, tmp_path)
    with engines(2) as two:
        with pytest.raises(UserError, match="^a wrong number$"):
            list(scale_out.answers(squares, [1, 2, -2], two))
        with pytest.raises(UserError, match="^broken again$"):
            list(scale_out.answers(squares, [-1], two))
        assert begun(tmp_path)[-1] == 2
        with pytest.raises(RayTaskError, match="ZeroDivisionError: a bug"):
            list(scale_out.answers(squares, [-3], two))


def test_an_engine_has_its_gpus_on_one_node(cluster):
    """Nodes of three GPUs and one are room for one engine of two GPUs, not for two."""
    assert scale_out._room({"CPU": 4, "GPU": 3}, gpus=1, cpus=1) == 3
    assert scale_out._room({"CPU": 1, "GPU": 3}, gpus=1, cpus=1) == 1
    assert scale_out._room({"CPU": 1}, gpus=1, cpus=1) == 0
    with engines(scale_out.ALL, 2) as one:
        assert (one.count, one.gpus) == (1, 2)
        [(_, devices)] = scale_out.answers(Devices, ["?"], one)
        assert len(devices.split(",")) == 2
    too_many = r"^--num_engines 2, each with 2 GPU\(s\) of one machine: .* has room for 1$"
    with pytest.raises(UserError, match=too_many), engines(2, 2):
        pass


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:9", "no Ray cluster answers there"),
        ("auto", "RAY_ADDRESS 'auto': not of the form host:port"),
    ],
)
def test_no_cluster_there(monkeypatch, address, part):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=part):
        scale_out.start(2)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Policy and reference of unequal shape, a reward model, prompts."""
    folder = tmp_path_factory.mktemp("scale_out")
    save_tiny_policy(folder / "policy", 0, hidden=128, layers=2, heads=2)
    save_tiny_policy(folder / "reference", 1, hidden=64, layers=3, heads=2, tie_word_embeddings=True)
    save_tiny_reward_model(folder / "reward", 1)
    prompts = [{"prompt": f"prompt {'abcdefgh'[i % 8] * (i % 30)}"} for i in range(RESPONSES // 2)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


def generate_flags(place: Path, output: Path | list[Path], *more: object) -> list[str]:
    """`RESPONSES` responses, 2 at a time."""
    words = (
        f"--model_name_or_path {place}/policy --ref_model_name_or_path {place}/reference --sampler mixp --K 2 "
        f"--dataset_name_or_path {place}/prompts.json --temperature 1 --max_new_tokens 32 --max_input_length 60 "
        "--max_num_seqs 2 --dtype float32"
    )
    outputs = output if isinstance(output, list) else [output]
    return [*words.split(), *map(str, more), "--output_file", *map(str, outputs)]


def generate(place: Path, output: Path | list[Path], *more: object, **variables: str):
    result = python(GENERATE, *generate_flags(place, output, *more), **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def whole(place) -> bytes:
    """What one process writes with the transformers back end."""
    generate(place, place / "whole.json", "--backend", "hf")
    return (place / "whole.json").read_bytes()


def start(place: Path, output: Path, log: Path, *more: object) -> subprocess.Popen:
    """Starts generation with the transformers back end in the background."""
    flags = generate_flags(place, output, "--backend", "hf", *more)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ALIGNMENT / GENERATE), *flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def rows_of(output: Path) -> list[bytes]:
    return journal_rows(output.parent).get(f"{output.name}.journal", [])


def answering(node) -> bool:
    """Whether an engine on this node of the cluster is at work, by the title that Ray gives its process."""
    raylet = node.all_processes["raylet"][0].process.pid
    working = ["ray::MapWorker(Map(_Actor)).submit"]
    of_all = [process.info for process in psutil.process_iter(["ppid", "cmdline"])]
    return any(info["ppid"] == raylet and (info["cmdline"] or [])[:1] == working for info in of_all)


def test_a_node_is_killed_while_two_generate(cluster, place, whole, tmp_path):
    output, log = tmp_path / "out.json", tmp_path / "log"
    process = start(place, output, log, "--num_engines", 2)
    second = cluster.list_all_nodes()[1]
    try:
        assert wait_until(lambda: len(rows_of(output)) >= 12 and answering(second), process), log.read_text()
        os.link(f"{output}.journal", tmp_path / "kept")  # it is removed in the end
        before = (tmp_path / "kept").read_bytes()
        cluster.remove_node(second, allow_graceful=False)
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert output.read_bytes() == whole
    assert "an engine was lost and started again (1 so far)" in log.read_text()
    journal = (tmp_path / "kept").read_bytes()
    assert journal.startswith(before[: before.rindex(b"\n")])
    keys = [json.loads(line)["key"] for line in journal.splitlines()[1:]]
    assert len(keys) == len(set(keys)) == RESPONSES


def test_stopped_and_killed_with_two_engines_continued_with_one(place, whole, tmp_path, monkeypatch):
    """On a local Ray: SIGTERM, then SIGKILL of the script alone. Nothing of its Ray stays, no row is lost."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    output, log = tmp_path / "out.json", tmp_path / "log"
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        had = len(rows_of(output))
        process = start(place, output, log, "--num_engines", 2)
        assert wait_until(lambda had=had: len(rows_of(output)) >= had + 8, process), log.read_text()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 4  # Ray's own and two engines
        names = {child: child.name() for child in started}
        process.send_signal(number)
        assert process.wait(timeout=60) == code, log.read_text()
        # Ray's two agents, which hold nothing, try to report its end for a minute.
        left = psutil.wait_procs([child for child in started if "Agent" not in names[child]], timeout=60)[1]
        assert not left
        assert "Traceback" not in log.read_text()
        assert ("stopped; the same command continues from here" in log.read_text()) == (code == 130)
    kept = len(rows_of(output))
    assert 16 <= kept < RESPONSES and not output.exists()
    generate(place, output, "--backend", "hf")
    assert output.read_bytes() == whole


def test_two_vllm_engines_on_a_local_ray(place, tmp_path, monkeypatch):
    """Two slices with one start of the engines, and a second command line in turn, against one process each."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    more = "--backend", "vllm", "--max_num_seqs", 8, "--start", 0, 10, "--end", 10, 48
    second = "--backend", "vllm", "--max_num_seqs", 8, "--end", 4, "--temperature", 0
    one, two = ([tmp_path / f"{name}{i}.json" for i in range(3)] for name in ("one", "two"))
    generate(place, one[:2], *more)
    generate(place, one[2], *second)
    flags = [
        generate_flags(place, outputs, *options, "--num_engines", 2)
        for outputs, options in ((two[2], second), (two[:2], more))
    ]
    result = python(GENERATE, *flags[0], "--then", *flags[1])
    assert result.returncode == 0, result.stderr
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines() if "response/s" not in line]
    assert not [line for line in errors if "ray" in line.lower()]


def test_tensor_parallel_engine(cluster, place, tmp_path):
    """Two models of unequal shape, each split over two processes, in an actor: greedy, against the definition."""
    more = "--temperature", 0, "--end", 8, "--backend", "vllm", "--max_num_seqs", 8
    flags = "--tensor_parallel_size", 2, "--num_engines", "all"  # which is one: see SECOND
    generate(place, tmp_path / "out.json", *more, *flags)
    tokenizer, models = tiny_tokenizer(), (str(place / "policy"), str(place / "reference"))
    for instance in read_records(tmp_path / "out.json")[0]:
        ids = tokenizer(instance["prompt"])["input_ids"]
        for weights, text in zip([(1.5, -0.5), (0.5, 0.5)], instance["responses"], strict=True):
            expected = greedy(models, ids, weights, 32, [tokenizer.eos_token_id])
            assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_two_scorers(cluster, place, tmp_path):
    """Two files in batches of several lengths; texts that are too long are counted; then a model without a head."""
    inputs = [tmp_path / "a.json", tmp_path / "b.json"]
    for number, path in enumerate(inputs):
        rows = [{"prompt": f"p{i} {number}", "responses": ["a" * (i % 50), "bc" * (i % 17)]} for i in range(60)]
        path.write_text(json.dumps({"type": "text_only", "instances": rows}))
    said = {}
    for name, more in (("one", ()), ("two", ("--num_engines", 2))):
        outputs = [tmp_path / f"{path.stem}_{name}.json" for path in inputs]
        flags = "--token_budget", 256, "--max_length", 40, "--dtype", "float32", *more
        result = annotate(place / "reward", inputs, outputs, *flags)
        assert result.returncode == 0, result.stderr
        said[name] = result.stdout
    for path in inputs:
        one, two = (tmp_path / f"{path.stem}_{name}.json" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert said["one"].count("texts were cut to 40 tokens") == said["two"].count("texts were cut") == 2
    failed = annotate(place / "policy", inputs[:1], [tmp_path / "out.json"], "--num_engines", 2)
    ends_in_one_line(failed, f"reward model {place / 'policy'}: has no weights for score.weight")
    assert not list(tmp_path.glob("out.json*"))


def annotate(model: Path, inputs: list[Path], outputs: list[Path], *more: object):
    flags = "--reward_name_or_path", model, "--dataset_name_or_path", *inputs, "--output_file", *outputs
    return python(ANNOTATE, *flags, *more)
