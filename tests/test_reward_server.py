"""``vlm-grpo reward serve``: the protocol over a real socket, what it refuses, and the reward ``api`` as its client."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from vlm_grpo import load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import RewardError, UnsupportedError
from vlm_grpo.rewards import server as servers
from vlm_grpo.rewards.api import ApiReward
from vlm_grpo.rewards.failed import Failed

SPECS = [RewardSpec(name="accuracy", weight=2.0), RewardSpec(name="format")]
RIGHT, WRONG = "<think>x</think><answer>2</answer>", "<answer>3</answer>"


class Running:
    """A server on a free port, and how to speak to it without httpx."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}{servers.PATH}"

    def ask(self, body, method="POST", path=servers.PATH, **headers) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@contextmanager
def running(functions, weights=None, **options):
    options = {"max_bytes": 1_000_000, "max_items": 64} | options
    application = servers.build_app(functions, weights or [1.0] * len(functions), **options)
    server = servers.make_server(application)
    with servers.bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Running(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server():
    functions, weights = load_rewards(SPECS)
    with running(functions, weights, max_bytes=100_000, max_items=8) as found:
        yield found


def ask(url: str, **options) -> ApiReward:
    return ApiReward(url=url, cache=False, backoff=0.01, backoff_max=0.02, **options)


def test_the_protocol(server):  # covers A6
    body = {"model": "any", "messages": [RIGHT, WRONG], "columns": {"answer": ["2", "2"]}}
    assert server.ask(body) == (200, {"scores": [3.0, 0.3]}), "2 x accuracy + format"
    assert server.ask(body | {"details": True})[1]["rewards"] == {"accuracy": [1.0, 0.0], "format": [1.0, 0.3]}
    assert server.ask({"messages": [], "columns": {"answer": []}}) == (200, {"scores": []})
    assert server.ask(None, "GET", "/health") == (200, {"status": "ok"})


def test_the_reward_api_speaks_it(server):  # covers A4, A6
    prompts = [[{"role": "user", "content": "1 + 1? Answer as <answer>N</answer>."}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in (RIGHT, WRONG, "2")]
    columns = {"answer": ["2", "2", None]}
    api = ask(server.url, send_columns=["prompt", "completion", "answer"], range=[0, 3], batch_size=2)
    assert api.score(completions, prompts=prompts, **columns) == [1.0, pytest.approx(0.1), 0.0]
    assert api.counts.requests == 2 and not api.counts.failed


def test_null_is_not_applicable_and_a_failed_reward_is_no_null():
    def picky(completions, **columns):
        return [None if c == "none" else Failed("judge down") if c == "fail" else 1.0 for c in completions]

    async def half(completions, **columns):
        await asyncio.sleep(0)
        return [None if c == "none" else 0.5 for c in completions]

    with running([picky, half], [1.0, 4.0]) as server:
        assert server.ask({"messages": ["none", "fail", "x"]}) == (
            200,
            {"scores": [None, None, 3.0], "failed": [None, "judge down", None]},
        )
        api = ask(server.url)
        assert api.score(["none", "fail", "x"]) == [None, Failed("server: judge down"), 3.0]
        assert api.counts.failed == {"server: judge down": 1}


def test_media_reach_the_rewards(tmp_path):
    seen = []

    def look(completions, prompts, images=None, videos=None, **columns):
        seen.append((prompts, images, videos))
        return [float(len(pictures)) for pictures in images]

    picture = Image.new("RGB", (8, 8), "red")
    with running([look]) as server:
        api = ask(server.url, send_media=True, send_columns=["prompt"])
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        frames = [[picture, picture], None]
        assert api.score(["a", "b"], prompts=[prompt, prompt], image=[picture, picture], video=frames) == [1.0, 1.0]
    ((prompts, images, videos),) = seen
    assert prompts == ["<video><image>what?", "<image>what?"] or prompts == ["<image>what?"] * 2
    cell = images[0][0]
    assert cell["path"] is None and Image.open(io.BytesIO(cell["bytes"])).getpixel((0, 0)) == (255, 0, 0)
    assert [len(row) for row in videos] == [1, 0] and len(videos[0][0]) == 2, "a video without a file is its frames"


_IMAGE = {"type": "image", "mime": "image/png", "data": base64.b64encode(b"x").decode()}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 422, "JSON"),
        (b"[" * 50_000, 400, "parsing the body"),
        ([], 422, "valid dictionary"),
        ({}, 422, "messages: Field required"),
        ({"messages": "a"}, 422, "messages: Input should be a valid list"),
        ({"messages": ["a", 1]}, 422, "messages.1: Input should be a valid string"),
        ({"messages": ["a"] * 9}, 413, "9 messages are more than 8"),
        ({"messages": ["a" * 100_000]}, 413, "longer than 100000 bytes"),
        ({"messages": ["a"], "columns": {"answer": []}}, 422, '"answer" has 0 entries for 1 messages'),
        ({"messages": ["a"], "columns": {"image": ["/etc/passwd"]}}, 422, 'column "image" is not taken; send media'),
        ({"messages": ["a"], "columns": {"completions": ["b"]}}, 422, '"completions" is no column'),
        ({"messages": ["a"], "columns": {"completion": [1]}}, 422, 'the column "completion" must hold texts'),
        ({"messages": ["a"], "media": []}, 422, '"media" has 0 entries for 1 messages'),
        ({"messages": ["a"], "media": [[{"type": "image", "data": "!"}]]}, 422, "this is not base64"),
        ({"messages": ["a"], "media": [[{"type": "image", "path": "/etc/passwd"}]]}, 422, "path: Extra inputs"),
        ({"messages": ["a"], "media": [[{"type": "film", "data": ""}]]}, 422, "'image', 'video' or 'audio'"),
        ({"messages": ["a"], "media": [[_IMAGE | {"frames": []}]]}, 422, 'give either "data" or "frames"'),
        ({"messages": ["a"]}, 422, 'The reward "accuracy": there is no column "answer"'),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(server, body, status, sentence):
    got, said = server.ask(body)
    assert (got, sentence in said["detail"]) == (status, True), said
    assert "Traceback" not in said["detail"] and len(said["detail"]) < 400


def test_a_body_of_undeclared_length_is_limited_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", servers.PATH, (b"x" * 10_000 for _ in range(12)), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_reward_that_fails_is_named_and_serving_goes_on(tmp_path):
    bodies = {"broken": "[1 / 0]", "short": "[]"}
    source = [f"def {name}(completions, **columns):\n    return {body}\n" for name, body in bodies.items()]
    (tmp_path / "mine.py").write_text("\n".join(source))
    functions, weights = load_rewards([f"{tmp_path}/mine.py:broken"])
    with running(functions, weights) as server:
        for _ in range(2):
            status, said = server.ask({"messages": ["a"]})
            assert status == 500 and "broken" in said["detail"] and "ZeroDivisionError" in said["detail"]
        assert server.ask(None, "GET", "/health")[0] == 200
        api = ask(server.url, retries=1)
        assert api.score(["a"]) == [Failed("HTTP 500")] and api.counts.retries == 1
    functions, weights = load_rewards([f"{tmp_path}/mine.py:short"])
    with running(functions, weights) as server:
        status, said = server.ask({"messages": ["a"]})
        assert status == 500 and "returned 0 values for 1 completions" in said["detail"]


def test_a_token_is_asked_for_before_anything_is_read(monkeypatch):
    monkeypatch.setenv("SCORES_TOKEN", "s3cret")
    with running([lambda completions, **columns: [1.0] * len(completions)], token="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "s3cret"},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Bearer é"},
        ):
            assert server.ask({"messages": ["a"]}, **headers)[0] == 401
        assert server.ask(b"x" * 2_000_000)[0] == 401
        assert server.ask({"messages": ["a"]}, Authorization="Bearer s3cret") == (200, {"scores": [1.0]})
        assert server.ask(None, "GET", "/health")[0] == 200, "a load balancer has no token"
        assert ask(server.url, api_key_env="SCORES_TOKEN").score(["a"]) == [1.0]
        with pytest.raises(RewardError, match="refuses the key"):
            ask(server.url).score(["a"])


def test_many_requests_at_a_time_and_a_function_one_at_a_time():
    busy, most = [], []

    def slow(completions, **columns):
        busy.append(1)
        most.append(len(busy))
        threading.Event().wait(0.01)
        busy.pop()
        return [float(len(text)) for text in completions]

    with running([slow]) as server:
        texts = ["x" * n for n in range(1, 13)]
        assert ask(server.url, batch_size=1, concurrency=12).score(texts) == [float(n) for n in range(1, 13)]
    assert max(most) == 1


def test_where_it_can_listen():
    with servers.bound("127.0.0.1", 0) as first:
        taken = servers.bound("127.0.0.1", first.getsockname()[1])
        with pytest.raises(RewardError, match="cannot listen at 127.0.0.1:.*Give another --port"), taken:
            pass
    assert [servers.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "host")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_without_fastapi_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(UnsupportedError, match=r'needs fastapi.*pip install "vlm-grpo\[serve\]"'):
        servers.build_app([], [], max_bytes=1, max_items=1)


def command(tmp_path, config: str, *arguments: str, **environment: str) -> subprocess.Popen:
    (tmp_path / "serve.yaml").write_text(config)
    line = [sys.executable, "-m", "vlm_grpo", "reward", "serve", str(tmp_path / "serve.yaml"), *arguments]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def test_the_command_serves_a_config(tmp_path):  # covers A6
    config = "rewards:\n  - {name: accuracy, weight: 2}\n  - format\n"
    process = command(tmp_path, config, "--port", "0", "--token-env", "SCORES_TOKEN", SCORES_TOKEN="t")
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"Serving 2 x accuracy, 1 x format at (http://127.0.0.1:(\d+)/\S+) \(Ctrl\+C stops it\)\n", line
        )
        assert found, (line, process.poll())
        body = {"messages": [RIGHT], "columns": {"answer": ["2"]}}
        assert Running(int(found[2])).ask(body, Authorization="Bearer t") == (200, {"scores": [3.0]})
    finally:
        process.terminate()
        out, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors


def test_the_command_refuses_what_cannot_be_served(tmp_path):
    from typer.testing import CliRunner

    from vlm_grpo.cli import app

    path = tmp_path / "serve.yaml"
    cases = [
        ("model: x\n", [], "there are no rewards to serve. Add rewards: [accuracy]."),
        (
            "rewards: [accuracy]\n",
            ["--token-env", "NOT_SET"],
            "--token-env NOT_SET: that environment variable is not set",
        ),
        ("rewards: [acuracy]\n", [], 'There is no reward "acuracy". Did you mean "accuracy"?'),
        ("rewards: [accuracy]\n", ["--host", "203.0.113.9"], "cannot listen at 203.0.113.9:8000"),
    ]
    for config, arguments, sentence in cases:
        path.write_text(config)
        result = CliRunner().invoke(app, ["reward", "serve", str(path), *arguments])
        assert result.exit_code == 2 and sentence in result.stderr, result.stderr
    assert CliRunner().invoke(app, ["reward", "--help"]).exit_code == 0
