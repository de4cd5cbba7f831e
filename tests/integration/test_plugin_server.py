"""The server in one command, by the `openai` client: weights per request, together and alone, wrong ones, streams."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from mixture_loop import WORDS, greedy, next_logits
from tiny import save_tiny_policy, tiny_tokenizer

pytestmark = pytest.mark.slow
PLUGIN = Path(__file__).parents[2] / "alignment/generation/logit_mixture"
KINDS = ("logits", "log_probabilities", "probabilities")
LENGTH = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    shapes = [{"hidden": 64}, {"hidden": 96, "layers": 3, "heads": 3}, {"hidden": 64, "layers": 1}]
    return [str(save_tiny_policy(folder / f"m{i}", i, **shape)) for i, shape in enumerate(shapes)]


def serve(*words: object, **popen) -> subprocess.Popen:
    """`python -m vllm_logit_mixture.serve WORDS` of this worktree."""
    path = os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vllm_logit_mixture.serve", *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, **popen)


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    """The running server's address; its output is kept in a file that a failure shows."""
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second, third = models
    flags = "--dtype", "float32", "--max-num-seqs", 16, "--host", "127.0.0.1", "--port", port
    with open(log, "wb") as file:
        server = serve(first, "--with", second, "--with", third, *flags, stdout=file, stderr=subprocess.STDOUT)
    try:
        found = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 240
        while server.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{found}/health").status_code == 200:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield found
        assert server.poll() is None, log.read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def client(address):
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]


def by_hand(models, text: str, weights, kind: str = "logits") -> str:
    tokenizer = tiny_tokenizer()
    ids = greedy(models, tokenizer(text)["input_ids"], weights, LENGTH, kind=kind)
    return tokenizer.decode(ids, skip_special_tokens=True)


def complete(client, models, text: str, xargs: dict | None, **options):
    extra = {"vllm_xargs": xargs} if xargs is not None else {}
    return client.completions.create(
        model=models[0], prompt=text, temperature=0, max_tokens=LENGTH, extra_body=extra, **options
    )


def test_64_requests_of_other_weights_at_a_time_are_what_each_is_alone(client, models):
    rng, wanted = random.Random(1), []
    for i, text in enumerate(texts(64)):
        kind = KINDS[i % 3]
        low = 0 if kind == "probabilities" else -1
        weights = [round(rng.uniform(low, 2), 2) if rng.random() < 0.7 else 0.0 for _ in models]
        wanted.append((text, {"mixture": weights if any(weights) else [1, 0, 0], "mixture_of": kind}))

    def ask(one) -> str:
        return complete(client, models, *one).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, wanted))
    assert len(set(together)) > 32
    assert together == [ask(one) for one in wanted]
    assert together == [by_hand(models, text, x["mixture"], x["mixture_of"]) for text, x in wanted]


def test_without_weights_the_first_model_answers(client, models):
    for text in texts(4):
        expected = by_hand(models[:1], text, [1.0])
        for xargs in (None, {}, {"session_id": "x"}, {"mixture": [1, 0, 0]}):
            assert complete(client, models, text, xargs).choices[0].text == expected


def test_chat_and_streams(client, models):
    """The chat template is the first model's; a stream's pieces are the whole."""
    weights = [1.5, -0.5, 0.25]
    messages = [{"role": "user", "content": "who sat on the mat?"}]
    text = tiny_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer = tiny_tokenizer(adds_bos=False)
    ids = greedy(models, tokenizer(text)["input_ids"], weights, LENGTH)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    options = {
        "model": models[0],
        "messages": messages,
        "temperature": 0,
        "max_tokens": LENGTH,
        "extra_body": {"vllm_xargs": {"mixture": weights}},
    }
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected
    pieces = complete(client, models, "a mat", {"mixture": weights}, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == by_hand(models, "a mat", weights)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities(client, models, kind):
    weights, text = [0.6, 0.3, 0.1], "did it not? yes"
    found = complete(client, models, text, {"mixture": weights, "mixture_of": kind}, logprobs=3).choices[0].logprobs
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        exact = next_logits(models, ids, weights, kind).log_softmax(-1)
        ids.append(tokenizer.convert_tokens_to_ids(token))
        assert value == pytest.approx(float(exact[ids[-1]]), abs=2e-4)
        for other, own in top.items():
            assert own == pytest.approx(float(exact[tokenizer.convert_tokens_to_ids(other)]), abs=2e-4)


@pytest.mark.parametrize(
    "body",
    [
        '{"mixture": [1, 2]}',
        '{"mixture": [1, 2, 3, 4]}',
        '{"mixture": []}',
        '{"mixture": [1, NaN, 0]}',
        '{"mixture": [1, Infinity, 0]}',
        '{"mixture": [1, 1e400, 0]}',
        '{"mixture": ["a", "b", "c"]}',
        '{"mixture": ["1", "2", "3"]}',
        '{"mixture": "1,2,3"}',
        '{"mixture": 1}',
        '{"mixture": [1, 0, 0], "mixture_of": "sums"}',
        '{"mixture": [1, -1, 0], "mixture_of": "probabilities"}',
        '{"mixture": [0, 0, 0], "mixture_of": "probabilities"}',
    ],
)
@pytest.mark.parametrize("where", ["completions", "chat/completions"])
def test_wrong_weights_are_http_400_and_the_server_stays(client, models, address, body, where):
    asked = {"prompt": "x"} if where == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    head = json.dumps({"model": models[0], "max_tokens": 2, **asked})
    raw = f'{head[:-1]}, "vllm_xargs": {body}}}'
    answer = httpx.post(f"{address}/v1/{where}", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert "mixture" in answer.json()["error"]["message"]
    assert complete(client, models, "a cat", {"mixture": [1, 0, 0]}).choices[0].text


def test_what_the_mixture_has_not_is_http_400(client, models, address):
    import openai

    weights = {"vllm_xargs": {"mixture": [1, 0, 0]}}
    for options in (
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 1},
        {"use_beam_search": True, "n": 2},
    ):
        body = {"model": models[0], "prompt": "a cat", "max_tokens": 2, **weights, **options}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, (options, answer.text)
    with pytest.raises(openai.NotFoundError):  # an adapter is asked for as a model of its own
        client.completions.create(model="an-adapter", prompt="x", max_tokens=1)
    assert complete(client, models, "a cat", None).choices[0].text


def test_a_wrong_command_line_is_one_line(models):
    """All others: tests/unit/test_plugin_weights.py."""
    server = serve(models[0], "--with", "/nowhere", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, error = server.communicate(timeout=120)
    lines = error.decode().strip().splitlines()
    assert server.returncode == 2
    assert "/nowhere" in lines[-1] and not any("Traceback" in line for line in lines)
