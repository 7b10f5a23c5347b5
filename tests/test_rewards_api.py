"""The reward ``api``: its protocols, every way a server can fail, limits, cache, secrets, and who may call it."""

import asyncio
import base64
import io
import json
import logging
import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from faulty import HANG_UP, SLOW, judged, lengths, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_grpo import load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.api import ApiReward
from vlm_grpo.rewards.api.breaker import Breaker
from vlm_grpo.rewards.api.chat import score_in
from vlm_grpo.rewards.api.limits import Window
from vlm_grpo.rewards.api.options import ApiOptions, fill, slots
from vlm_grpo.rewards.failed import Failed

FAST = {"backoff": 0.01, "backoff_max": 0.02, "timeout": 5, "cache": False}
WORDS = [f"{'x' * n}" for n in range(1, 9)]


def reward(server, **options) -> ApiReward:
    return ApiReward(url=server.url, **(FAST | options))


def judge(server, **options) -> ApiReward:
    return reward(server, protocol="chat", model="judge", **options)


# ---- the scoring protocol ----------------------------------------------------------------------------------------


def test_texts_go_out_and_scores_come_back_in_order():  # covers A4
    with serving(lengths) as server:
        api = reward(server, batch_size=3, model="rm")
        assert api.score(WORDS, prompts=["ab"] * 8) == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert sorted(len(body["messages"]) for _, _, body in server.requests) == [2, 3, 3]
    path, _, body = server.requests[0]
    assert path == "/v1/score/evaluation"
    assert set(body) == {"model", "messages"}, "nothing but the protocol unless it is asked for"
    assert body["model"] == "rm"
    assert "ab\nx" in server.texts
    assert api.counts.requests == 3 and api.counts.completions == 8 and not api.counts.failed
    assert 0 < api.counts.latency <= api.counts.slowest < 5


def test_what_text_is_judged():
    image = {"type": "image", "image": Image.new("RGB", (4, 4))}
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "How many?"}]},
    ]
    completion = [{"role": "assistant", "content": 'two {"score": 1} {answer} {}'}]
    with serving(lengths) as server:
        reward(server).score([completion], prompts=[prompt])
        reward(server).score(["alone"])
        reward(server, template="{{x}} {answer}|{completion}|{tags}|{ id }").score(
            [completion], prompts=[prompt], answer=[2.0], tags=[["a", "b"]]
        )
    assert server.texts == [
        'system: Be brief.\nuser: <image>How many?\ntwo {"score": 1} {answer} {}',
        "alone",
        '{x} 2|two {"score": 1} {answer} {}|["a", "b"]|{ id }',
    ]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.text(), st.text())
def test_no_text_is_a_template_of_its_own(completion, answer):
    filled = fill("<{completion}|{answer}>", {"completion": completion, "answer": answer})
    assert filled == f"<{completion}|{answer}>"
    assert set(slots(completion)) <= {name for name in completion.replace("{", "}").split("}")}


def test_null_and_a_missing_truth_are_not_applicable():  # covers A4, U8
    with serving([(200, {"scores": [0.5, None]})]) as server:
        api = reward(server, template="{completion} {answer}")
        assert api.score(["a", "b", "c"], answer=["1", "2", None]) == [0.5, None, None]
    assert api.counts.not_applicable == 2
    assert server.texts == ["a 1", "b 2"], "a row that cannot be scored is not sent"


def test_columns_go_beside_the_texts_on_request():
    with serving(lengths) as server:
        api = reward(server, send_columns=["prompt", "answer"])
        api.score(["a", "b"], prompts=["p", [{"role": "user", "content": "q"}]], answer=[1, {"k": [2]}], more=[1, 2])
        with pytest.raises(RewardError, match='the column "answer" of send_columns holds a Image.*JSON cannot carry'):
            api.score(["a"], prompts=["p"], answer=[Image.new("RGB", (2, 2))])
    assert server.requests[0][2]["columns"] == {"prompt": ["p", "q"], "answer": [1, {"k": [2]}]}


def test_a_range_is_mapped_to_0_and_1_and_kept():
    with serving([(200, {"scores": [1, 3, 5, 6]})]) as server:
        assert reward(server, range=[1, 5]).score(list("abcd")) == [0.0, 0.5, 1.0, Failed("a score out of range")]


# ---- the chat judge -----------------------------------------------------------------------------------------------


def test_a_judge_is_asked_once_a_completion():
    with serving(lambda body, _: judged(json.dumps({"score": len(body["messages"][1]["content"]) / 10}))) as server:
        api = judge(
            server, template="{completion} vs {answer}", system="You judge {subject}.", body={"temperature": 0.1}
        )
        scores = api.score(["a", "bbb"], prompts=["p", "p"], answer=["x", "x"], subject=["maths", "maths"])
    assert scores == [0.6, 0.8]
    assert api.counts.requests == 2 and api.counts.tokens == 14
    bodies = sorted((body for _, _, body in server.requests), key=lambda body: len(str(body)))
    assert bodies[0] == {
        "temperature": 0.1,
        "model": "judge",
        "messages": [{"role": "system", "content": "You judge maths."}, {"role": "user", "content": "a vs x"}],
    }


def test_without_a_template_the_judge_is_asked_for_0_to_1():
    with serving([judged('{"score": 0.25}'), judged('{"score": 7}')]) as server:
        api = judge(server, concurrency=1)
        assert api.score(["c {prompt}"], prompts=["p"]) == [0.25]
        assert api.score(["c"], prompts=["p"]) == [Failed("a score out of range")]
    (message,) = server.requests[0][2]["messages"]
    assert (
        "<request>\np\n</request>" in message["content"] and "<response>\nc {prompt}\n</response>" in message["content"]
    )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": 0.5}', 0.5),
        ('Fine.\n```json\n{"reason": "a {b}", "score": "7"}\n```', 7.0),
        ('{"score": 1} but then {"score": 3}', 3.0),  # the last word counts
        ('{"score": 0.2, "parts": {"a": 1}}', 0.2),
        ('The answer said {"score": 10}. Mine: {"score": 2}', 2.0),
        ("7", 7.0),
        (" -1.5\n", -1.5),
        ("**Score: 8**", 8.0),
        ("Rating = 4.5.", 4.5),
        ("4 out of 5", None),
        ("4/5", None),
        ("I give it a 7", None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": "high"}', None),
        ('{"score": ', None),
        ("", None),
        ("I cannot judge this.", None),
    ],
)
def test_a_score_is_read_from_a_reply_or_not_at_all(reply, expected):
    assert score_in(reply) == expected


def test_a_score_by_a_pattern():
    assert score_in("Verdict: [[6]] or rather [[8]]", r"\[\[(\d+)\]\]") == 8.0
    assert score_in("8", r"\[\[(\d+)\]\]") is None
    assert score_in("Verdict: [[high]]", r"\[\[(\w+)\]\]") is None


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text() | st.text('{}[]"score:0.1e,-N aI'), st.sampled_from([None, r"(\S+)"]))
def test_no_reply_crashes_the_reader(reply, pattern):
    assert isinstance(score_in(reply, pattern), float | None)


def test_a_hostile_reply_takes_no_time():
    start = time.perf_counter()
    for text in ("{" * 200_000, '{"score": ' * 50_000, "9" * 200_000, "[" * 100_000, " " * 200_000 + "x"):
        assert score_in(text) is None
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("reply", [None, "No.", 7, [], {}])
def test_a_reply_without_a_score_has_failed_and_is_not_0(reply):
    with serving([judged(reply)]) as server:
        api = judge(server)
        (score,) = api.score(["c"], prompts=["p"])
    assert score == Failed("no score in the reply")
    assert len(server.requests) == 1, "the judge answered: asking again would not help"


# ---- failures -----------------------------------------------------------------------------------------------------

_NAN = b'{"scores": [NaN]}'


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        (SLOW, "timeout", 3),
        (HANG_UP, "connection", 3),
        ((500, {"error": "boom"}), "HTTP 500", 3),
        ((503, b"<html>"), "HTTP 503", 3),
        ((429, {}), "HTTP 429", 3),
        ((200, b"<html>login</html>"), "no JSON", 3),
        ((200, b"[" * 100_000), "no JSON", 3),
        ((200, b""), "no JSON", 3),
        ((200, {"scores": [1.0, 2.0]}), "wrong number of scores", 1),
        ((200, {"scores": []}), "wrong number of scores", 1),
        ((200, {"scores": 1.0}), 'no "scores" in the answer', 1),
        ((200, [1.0]), 'no "scores" in the answer', 1),
        ((200, _NAN), "a score that is not finite", 1),
        ((200, b'{"scores": [1e999]}'), "a score that is not finite", 1),
        ((200, b'{"scores": [' + b"9" * 400 + b"]}"), "a score that is not finite", 1),
        ((200, {"scores": ["0.5"]}), "a score that is no number", 1),
        ((200, {"scores": [True]}), "a score that is no number", 1),
        ((200, {"scores": [{}]}), "a score that is no number", 1),
        ((400, {"error": "too long"}), "HTTP 400", 1),
        ((422, {}), "HTTP 422", 1),
    ],
)
def test_every_failure_is_a_failed_completion_and_counted(answer, reason, requests, caplog):  # covers A4
    with serving([answer]) as server:
        api = reward(server, retries=2, timeout=0.2 if answer == SLOW else 5)
        with caplog.at_level(logging.WARNING, "vlm_grpo"):
            assert api.score(["a"]) == [Failed(reason)]
            assert api.score(["a"]) == [Failed(reason)]
    assert len(server.requests) == 2 * requests == api.counts.requests
    assert api.counts.retries == 2 * (requests - 1)
    assert api.counts.failed == {reason: 2}
    assert len(caplog.records) == 1, "said once, then counted"
    assert reason in caplog.text and f"127.0.0.1:{server.server.server_port}" in caplog.text


def test_a_server_that_is_not_there():
    with serving(lengths) as server:
        pass
    assert reward(server, retries=1).score(["a"]) == [Failed("connection")]


def test_a_slow_drip_is_a_timeout_too():
    """A server that sends a byte now and then never times out by the gap between two bytes."""

    with serving([(200, b"x")]) as server:
        handler = server.server.RequestHandlerClass

        def drip(self):
            self.send_response(200)
            self.send_header("Content-Length", "50")
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b" ")
                time.sleep(0.02)

        handler.do_POST = drip
        start = time.perf_counter()
        assert reward(server, retries=0, timeout=0.25).score(["a"]) == [Failed("timeout")]
        assert time.perf_counter() - start < 0.9


def test_one_bad_score_costs_one_completion():
    with serving([(200, b'{"scores": [1, NaN, null, "x", 2]}')]) as server:
        scores = reward(server).score(list("abcde"))
    assert scores == [1.0, Failed("a score that is not finite"), None, Failed("a score that is no number"), 2.0]


def test_retries_recover_what_passes():
    script = [(500, {}), HANG_UP, (429, {}, {"Retry-After": "0.05"}), SLOW, (200, {"scores": [0.75]})]
    with serving(script) as server:
        api = reward(server, timeout=0.3)
        assert api.score(["a"]) == [0.75]
    assert (api.counts.requests, api.counts.retries, api.counts.retry_after) == (5, 4, 1)
    assert not api.counts.failed


@pytest.mark.parametrize("form", ["seconds", "date", "past", "nonsense"])
def test_retry_after_in_each_form(form):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3 if form == "date" else -60), usegmt=True)
    value = {"seconds": "0.7", "nonsense": "soon"}.get(form, date)
    with serving([(429, {}, {"Retry-After": value}), (200, {"scores": [1.0]})]) as server:
        api = reward(server, retry_after_max=0.5)
        start = time.perf_counter()
        assert api.score(["a"]) == [1.0]
    waited = time.perf_counter() - start
    asked = form in ("seconds", "date")
    assert waited >= 0.5 if asked else waited < 0.5
    assert api.counts.retry_after == (form != "nonsense")
    assert api.counts.retry_after_capped == asked


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, r"refuses the key \(HTTP 401\). Correct the key in the environment variable JUDGE_KEY"),
        (403, r"refuses the key \(HTTP 403\)"),
        (
            404,
            r'nothing to post to \(HTTP 404\), or that there is no model "judge". Correct url: .*/v1/chat',
        ),
        (405, r"nothing to post to \(HTTP 405\)"),
        (307, r"nothing to post to \(HTTP 307, moved to https://elsewhere/x\)"),
    ],
)
def test_what_never_mends_itself_stops_the_run(status, sentence, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    headers = {"Location": "https://elsewhere/x?token=1"} if status == 307 else {}
    with serving([(status, {"error": "key sk-very-secret is wrong"}, headers)]) as server:
        api = judge(server, api_key_env="JUDGE_KEY", concurrency=1)
        with pytest.raises(RewardError, match=sentence) as error:
            api.score(["a", "b"], prompts=["p", "p"])
    assert "sk-very" not in str(error.value) and "token=1" not in str(error.value)
    assert len(server.requests) == 1, "no retry, and no further completion"


def test_a_refusal_of_one_completion_by_a_server_that_works_is_a_failure():
    """A firewall that dislikes a completion answers 403 as well; hours of training must not end with it."""
    with serving([(200, {"scores": [1.0]}), (403, {}), (200, {"scores": [2.0]})]) as server:
        api = reward(server, batch_size=1, concurrency=1)
        assert api.score(["a", "b", "c"]) == [1.0, Failed("HTTP 403"), 2.0]


def test_a_step_cannot_hang():
    with serving([SLOW]) as server:
        api = reward(server, timeout=30, deadline=0.15)
        start = time.perf_counter()
        assert api.score(["a", "b"]) == [Failed("deadline")] * 2
        assert time.perf_counter() - start < 0.35
    with serving(lambda body, _: SLOW if body["messages"] == ["b"] else lengths(body)) as server:
        api = reward(server, timeout=30, deadline=0.2, batch_size=1)
        assert api.score(["a", "b", "ccc"]) == [1.0, Failed("deadline"), 3.0], "what is there by then counts"


# What a server does with each of 48 texts: always, or the first time only.
_PASSING = {0: (500, {}), 1: (429, {}, {"Retry-After": "0.02"}), 2: SLOW, 3: HANG_UP, 4: (200, b"<html>")}
_LASTING = {5: (503, {}), 6: (200, {"scores": [1.0, 2.0]}), 7: (200, _NAN), 8: HANG_UP, 9: (429, {})}


def test_all_faults_together_and_what_the_second_run_costs(tmp_path):  # covers A4
    """Of 48 completions 8 are answered, 20 after a retry, and 20 have no score, for five reasons that are counted.

    The next run asks for those 20 again, and for nothing else; the one after it asks nothing.
    """
    seen: dict[str, int] = {}
    healthy = threading.Event()

    def moody(body, _):
        (text,) = body["messages"]
        seen[text] = seen.get(text, 0) + 1
        kind = int(text) % 12
        if healthy.is_set() or kind > 9 or (kind in _PASSING and seen[text] > 1):
            return 200, {"scores": [float(text)]}
        return (_PASSING | _LASTING)[kind]

    texts = [str(number) for number in range(48)]
    options = {"batch_size": 1, "retries": 2, "timeout": 0.3, "breaker_failures": 100, "cache": str(tmp_path / "s")}
    with serving(moody) as server:
        first = reward(server, **options)
        scores = first.score(texts)
        for number, score in enumerate(scores):
            assert isinstance(score, Failed) if number % 12 in _LASTING else score == float(number)
        assert first.counts.failed == {
            "HTTP 503": 4,
            "wrong number of scores": 4,
            "a score that is not finite": 4,
            "connection": 4,
            "HTTP 429": 4,
        }
        # 8 at once; 20 with one retry; 8 without one; 12 with two, in vain
        assert (first.counts.requests, first.counts.retries, first.counts.cached) == (92, 44, 0)
        healthy.set()
        second = reward(server, **options)
        assert second.score(texts) == [float(text) for text in texts]
        assert (second.counts.requests, second.counts.cached) == (20, 28)
        third = reward(server, **options)
        assert third.score(texts) == [float(text) for text in texts]
        assert (third.counts.requests, third.counts.cached) == (0, 48)
        assert len(server.requests) == 112


# ---- limits --------------------------------------------------------------------------------------------------------


def test_no_more_requests_at_a_time_than_allowed():
    def slowly(body, _):
        time.sleep(0.03)
        return lengths(body)

    with serving(slowly) as server:
        reward(server, batch_size=1, concurrency=3).score(WORDS)
        assert server.busiest == 3


def test_a_window_lets_no_more_through_than_its_limit():
    times = []

    async def run():
        window = Window(3, seconds=0.2)

        async def one():
            await window.take()
            times.append(time.monotonic())

        await asyncio.gather(*(one() for _ in range(8)))
        return window

    window = asyncio.run(run())
    times.sort()
    for first, fourth in zip(times, times[3:], strict=False):
        assert fourth - first >= 0.19, "never four within a window"
    assert times[-1] - times[0] < 0.7, "and no slower than that"
    assert window.waited > 0


def test_a_window_takes_what_exceeds_it_alone_and_is_corrected():
    async def run():
        window = Window(100, seconds=0.15)
        start = time.monotonic()
        entry = await window.take(90)
        window.correct(entry, 10)  # it used less than was thought
        await window.take(90)
        assert time.monotonic() - start < 0.1
        await window.take(500)
        assert 0.14 < time.monotonic() - start < 0.4

    asyncio.run(run())


def test_limits_a_minute_reach_the_requests(monkeypatch):
    monkeypatch.setattr("vlm_grpo.rewards.api.client.Window", lambda limit: Window(limit, seconds=0.15))
    for option in ({"requests_per_minute": 2}, {"tokens_per_minute": 20}):  # 40 characters are 10 tokens
        with serving(lengths) as server:
            start = time.perf_counter()
            reward(server, batch_size=1, **option).score(["x" * 40] * 5)
            assert 0.29 < time.perf_counter() - start < 0.8, option


def test_the_breaker_opens_lets_one_probe_through_and_closes():
    down = threading.Event()
    down.set()
    with serving(lambda body, _: (500, {}) if down.is_set() else lengths(body)) as server:
        api = reward(server, batch_size=1, concurrency=1, retries=0, breaker_failures=3, breaker_seconds=0.2)
        scores = api.score(WORDS)
        broken = Failed("the server does not answer (circuit breaker)")
        assert scores == [Failed("HTTP 500")] * 3 + [broken] * 5
        assert len(server.requests) == 3, "a server that is down is left alone"
        time.sleep(0.25)
        assert api.score(WORDS) == [Failed("HTTP 500")] + [broken] * 7
        assert len(server.requests) == 4, "one probe"
        down.clear()
        time.sleep(0.25)
        assert api.score(WORDS) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "the probe loses none of the others"
        assert len(server.requests) == 12
    assert api.counts.failed == {"HTTP 500": 4, broken.reason: 12}


def test_the_breaker_also_counts_what_a_deadline_cut_short():
    """Else a dead server would cost every step its whole deadline."""
    with serving([(500, {})]) as server:
        api = reward(server, batch_size=1, concurrency=4, retries=50, deadline=0.3, breaker_failures=4)
        assert api.score(WORDS) == [Failed("deadline")] * 8
        assert api.score(WORDS) == [Failed("the server does not answer (circuit breaker)")] * 8


def test_answers_that_are_merely_useless_do_not_open_the_breaker():
    with serving([judged("no idea")]) as server:
        api = judge(server, concurrency=1, breaker_failures=2)
        api.score(WORDS, prompts=WORDS)
        assert len(server.requests) == 8 and not api._client.breaker.open


def test_a_probe_that_is_given_up_leaves_the_way_free():
    async def run():
        breaker = Breaker(1, 0.01)
        breaker.leave("usual", False)
        await asyncio.sleep(0.02)
        assert await breaker.enter() == "probe"
        breaker.leave("probe", None)
        assert await breaker.enter() == "probe"
        waiting = asyncio.create_task(breaker.enter())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        breaker.leave("probe", True)
        assert await waiting == "usual"

    asyncio.run(run())


# ---- cache ---------------------------------------------------------------------------------------------------------


def test_the_second_run_asks_nothing_and_failures_are_asked_again(tmp_path):  # covers A4
    path = tmp_path / "deep" / "scores.sqlite"
    with serving([(200, {"scores": [0.5, None, "bad"]}), (200, {"scores": [0.25]})]) as server:
        first = reward(server, cache=str(path))
        assert first.score(["a", "b", "c"], prompts=["p"] * 3) == [0.5, None, Failed("a score that is no number")]
        assert first.score(["a", "b", "c"], prompts=["p"] * 3) == [0.5, None, 0.25]
        second = reward(server, cache=str(path))
        assert second.score(["c", "b", "a", "a"], prompts=["p"] * 4) == [0.25, None, 0.5, 0.5]
        assert len(server.requests) == 2 and server.requests[1][2]["messages"] == ["p\nc"]
    assert (second.counts.requests, second.counts.cached) == (0, 4)
    kept = path.read_bytes()
    assert sqlite3.connect(path).execute("select count(*) from scores").fetchone() == (3,)
    assert b"p\nc" not in kept and b"127.0.0.1" not in kept


def test_whatever_changes_the_score_changes_the_key(tmp_path):
    cache = str(tmp_path / "scores.sqlite")
    picture = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    with serving(lengths) as server:
        calls = [
            ({}, {"prompts": ["p"]}),
            ({"model": "other"}, {"prompts": ["p"]}),
            ({"template": "{completion}!{answer}"}, {"answer": ["1"]}),
            ({"template": "{completion}!{answer}"}, {"answer": ["2"]}),
            ({"send_columns": ["answer"]}, {"answer": ["2"]}),
            ({"send_media": True}, {"image": [picture[0]]}),
            ({"send_media": True}, {"image": [picture[1]]}),
            ({"range": [0, 100]}, {"prompts": ["p"]}),
        ]
        for _ in range(2):
            for options, arguments in calls:
                reward(server, cache=cache, **options).score(["c"], **arguments)
        assert len(server.requests) == len(calls)


def test_equal_completions_are_asked_once_unless_nothing_is_kept(tmp_path):
    with serving(lengths) as server:
        assert reward(server, cache=str(tmp_path / "c")).score(["a", "a", "bb"]) == [1.0, 1.0, 2.0]
        assert sorted(server.texts) == ["a", "bb"]
        reward(server).score(["a", "a"])
        assert len(server.texts) == 4


def test_a_broken_cache_is_said_and_done_without(tmp_path, caplog):
    (tmp_path / "scores").write_text("this is no database, and long enough to be seen as none")
    with serving(lengths) as server:
        api = reward(server, cache=str(tmp_path / "scores"))
        assert api.score(["a"]) == [1.0] and api.score(["a"]) == [1.0]
        assert len(server.requests) == 2
    assert len(caplog.records) == 1 and "cannot be used (file is not a database)" in caplog.text


def test_the_cache_of_all_runs_lies_beside_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_GRPO_CACHE", str(tmp_path))
    with serving(lengths) as server:
        reward(server, cache=True).score(["a"])
    assert (tmp_path / "api-scores.sqlite").is_file()


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_keys_come_from_the_environment_and_go_nowhere_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    said = {"error": "the key sk-very-secret has no credit"}
    with serving([(200, {"scores": [1.0]}), (400, said), (200, {"scores": [1.0]})]) as server:
        api = reward(server, api_key_env="JUDGE_KEY", cache=str(tmp_path / "scores"))
        with caplog.at_level(logging.DEBUG):
            api.score(["a"])
            api.score(["b"])
        reward(server).score(["a"])
        reward(server, api_key_env="JUDGE_KEY", api_key_header="api-key").score(["a"])
        judge(server).score(["a"])
    sent = [{name.lower(): value for name, value in headers.items()} for _, headers, _ in server.requests]
    assert [headers.get("authorization") for headers in sent] == [
        *["Bearer sk-very-secret"] * 2,
        None,
        None,
        "Bearer sk-openai",
    ]
    assert sent[3]["api-key"] == "sk-very-secret"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("vlm_grpo", "httpx"))]
    assert any("the key *** has no credit" in line for line in ours)
    for text in (
        *ours,
        repr(api),
        repr(vars(api)),
        repr(api.options),
        (tmp_path / "scores").read_bytes().decode("latin1"),
    ):
        assert "sk-very" not in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs the url"),
        ({"url": "judge.example/v1"}, r'url: "judge.example/v1" is no address; write it whole, as in https://'),
        ({"api_key": "sk-1"}, "put it into an environment variable, and give that variable's name as api_key_env"),
        ({"api_key_env": "sk-proj-1"}, "no name of an environment variable; give the name, not the key"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "the environment variable NOT_SET_ANYWHERE.*is not set. Set it"),
        ({"url": "http://me:sk-1@h/x"}, "holds a user name or password; name an environment variable"),
        ({"url": "http://h/x?api-key=sk-1"}, 'holds a "api-key"; name an environment variable'),
        ({"protocol": "chat"}, "needs the name of a model"),
        ({"protocol": "chat", "model": "m", "send_columns": ["a"]}, "belongs to protocol=scores"),
        ({"system": "x"}, "system belongs to protocol=chat"),
        ({"template": "{prompt}"}, r"has no \{completion\}"),
        ({"score_pattern": "("}, "is no regular expression"),
        ({"score_pattern": "1"}, "has 0 groups; put brackets around the score"),
        ({"range": [1, 1]}, "has no room"),
        ({"requests_per_minut": 3}, 'unknown key "requests_per_minut". Did you mean "requests_per_minute"'),
        ({"timeout": 0}, "timeout: .*greater than 0"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options, sentence):
    with pytest.raises(RewardError, match=sentence) as error:
        ApiReward(**({"url": "http://h/x"} | options if options else {}))
    assert "sk-1" not in str(error.value) and "\n" not in str(error.value)


def test_a_column_that_is_not_there_is_named():
    with serving(lengths) as server:
        with pytest.raises(
            RewardError, match='the template names "anser".*Did you mean "answer".*prompt, completion, answer'
        ):
            reward(server, template="{completion} {anser}").score(["a"], answer=["1"])
        with pytest.raises(RewardError, match='send_columns names "label"'):
            reward(server, send_columns=["label"]).score(["a"])


# ---- media ---------------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def noise(size: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))


def test_media_go_beside_the_texts_on_request(tmp_path):  # covers A4
    from mediafiles import sine, write_video, write_wav

    image, sound, clip = Image.new("RGB", (8, 8), "red"), tmp_path / "a.wav", tmp_path / "v.mp4"
    image.save(tmp_path / "i.png")
    write_wav(sound, sine(16000))
    write_video(clip)
    prompt = [{"role": "user", "content": [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    with serving(lengths) as server:
        reward(server).score(["a"], prompts=[prompt], image=[image], audio=[str(sound)])
        api = reward(server, send_media=True, media_root=str(tmp_path))
        api.score(["a"], prompts=[prompt], image=["i.png"], audio=[{"bytes": None, "path": "a.wav"}])
        api.score(["b", "c"], images=[[image, png(image)], None], videos=[None, [str(clip)]])
    assert "media" not in server.requests[0][2]
    sent = server.requests[1][2]["media"]
    assert [(medium["type"], medium["mime"]) for medium in sent[0]] == [("audio", "audio/wav"), ("image", "image/png")]
    assert base64.b64decode(sent[0][0]["data"]) == sound.read_bytes(), "a file goes as it is"
    later = server.requests[2][2]["media"]
    assert [[medium["type"] for medium in row] for row in later] == [["image", "image"], ["video"]]
    assert base64.b64decode(later[1][0]["data"]) == clip.read_bytes()
    shown = Image.open(io.BytesIO(base64.b64decode(later[0][0]["data"])))
    assert (shown.size, shown.getpixel((0, 0))) == ((8, 8), (255, 0, 0))


def test_media_in_a_chat(tmp_path):
    from mediafiles import sine, write_video, write_wav

    write_wav(tmp_path / "a.wav", sine(16000))
    write_video(tmp_path / "v.mp4")
    with serving([judged("1")]) as server:
        api = judge(server, send_media=True, video_frames=3)
        arguments = {"image": [noise(16)], "audio": [tmp_path / "a.wav"], "video": [tmp_path / "v.mp4"]}
        assert api.score(["c"], prompts=[[{"role": "user", "content": "p"}]], **arguments) == [1.0]
    content = server.requests[0][2]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 4 + ["input_audio", "text"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert content[4]["input_audio"]["format"] == "wav"


def test_a_large_medium_is_made_smaller_or_fails():
    with serving(lengths) as server:
        small = reward(server, send_media=True, max_media_bytes=3000)
        assert small.score(["a"], image=[noise(64)]) == [1.0]
        assert small.score(["a"], image=[png(noise(64))]) == [1.0]
        large = reward(server, send_media=True, max_media_bytes=3000, downscale=False)
        assert large.score(["a", "bb"], image=[noise(64), None]) == [Failed("media too large"), 2.0]
    for _, _, body in server.requests[:2]:
        data = base64.b64decode(body["media"][0][0]["data"])
        assert len(data) <= 3000 and body["media"][0][0]["mime"] == "image/jpeg"


def test_a_medium_that_cannot_be_opened_costs_its_completion_only():
    with serving(lengths) as server:
        api = reward(server, send_media=True)
        assert api.score(["a", "bb"], image=["/no/such.png", None]) == [Failed("media that cannot be sent"), 2.0]
    assert api.counts.failed == {"media that cannot be sent": 1}


def test_a_groups_medium_is_read_once(tmp_path, monkeypatch):
    from vlm_grpo.rewards.api import media

    noise(8).save(tmp_path / "i.png")
    row, opened = str(tmp_path / "i.png"), []
    monkeypatch.setattr(
        media, "_image", lambda medium, options, real=media._image: opened.append(1) or real(medium, options)
    )
    with serving(lengths) as server:
        reward(server, send_media=True).score(list("abcd"), image=[row] * 4)
    assert len(opened) == 1


def test_a_column_that_makes_its_pictures_anew_keeps_them_apart():
    import datasets

    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(40)]
    rows = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    with serving(lengths) as server:
        reward(server, send_media=True, batch_size=40).score([f"{n:02}" for n in range(40)], image=rows["image"])
    (body,) = [body for _, _, body in server.requests]
    sent = [Image.open(io.BytesIO(base64.b64decode(media[0]["data"]))) for media in body["media"]]
    assert [picture.getpixel((0, 0))[0] for picture in sent] == [int(text) for text in body["messages"]]


# ---- who may call it -----------------------------------------------------------------------------------------------


def test_as_a_trainer_calls_it():
    """TRL keeps one event loop in a thread, and awaits all async rewards together, step after step."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        with serving(lengths) as server:
            (one, two), _ = load_rewards(
                [
                    RewardSpec(name="vlm_grpo.rewards.api:ApiReward", kwargs={"url": server.url, "name": n, **FAST})
                    for n in "ab"
                ]
            )
            columns = {"completion_ids": [[1], [2]], "trainer_state": None, "log_extra": print, "log_metric": print}

            async def together():
                arguments = {"prompts": ["", ""], "completions": ["a", "bb"], **columns}
                return await asyncio.gather(one(**arguments), two(**arguments))

            for _ in range(3):
                assert asyncio.run_coroutine_threadsafe(together(), loop).result(5) == [[1.0, 2.0]] * 2
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_from_a_script_a_notebook_and_several_loops(recwarn):
    with serving(lengths) as server:
        api = reward(server, batch_size=1, concurrency=1)

        async def notebook():
            return api.score(["a", "bb"]), await api(["ccc"])

        assert asyncio.run(notebook()) == ([1.0, 2.0], [3.0])
        assert api.score(["a", "bb"]) == [1.0, 2.0]
        assert api.score([]) == []
        assert len(api._free) <= 1, "a loop that has ended is not kept"
    assert not [w for w in recwarn if issubclass(w.category, (ResourceWarning, RuntimeWarning))]


def test_a_call_that_is_given_up_leaves_nothing_behind():
    async def run(api):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(api(["a", "b"]), 0.1)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    with serving([SLOW]) as server:
        assert asyncio.run(run(reward(server, timeout=5))) == []


def test_by_name_and_its_options_are_checked_by_name():
    with serving(lengths) as server:
        (function,), _ = load_rewards(
            [RewardSpec(name="api", kwargs={"url": server.url, **FAST}, scale=0.5, clip=(0, 1))]
        )
        assert function.__name__ == "api"
        assert asyncio.run(function(completions=["a", "xxxx"], prompts=["", ""])) == [0.5, 1.0]
    with pytest.raises(RewardError, match='no option "urls". Did you mean "url"'):
        load_rewards([RewardSpec(name="api", kwargs={"urls": "http://h"})])
    with pytest.raises(RewardError, match='The reward "api": url: "h" is no address'):
        load_rewards([RewardSpec(name="api", kwargs={"url": "h"})])


def test_every_option_is_described():
    assert all(field.description for field in ApiOptions.model_fields.values())
