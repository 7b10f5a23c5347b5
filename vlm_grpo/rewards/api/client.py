"""One request after another to one server: limits, retries, and what each failure is called."""

import asyncio
import functools
import json
import logging
import math
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from ...errors import RewardError
from .breaker import Breaker, Entry
from .limits import Window
from .options import ApiOptions

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

_LONGEST_REPLY = 16_000_000  # bytes; a reply of scores is a few thousand
_SHOWN = 200  # characters of a server's own words
_KINDS_SAID = 20  # a server may give its own reasons


@dataclass
class Counts:
    """What a reward ``api`` has done so far.

    Attributes:
        completions: scored or failed, those from the cache included.
        cached: scores that needed no request of their own: from the cache, or of an equal completion.
        requests: sent, retries included.
        retries: of them.
        retry_after: waits that the server asked for; ``retry_after_capped``: longer than it was given.
        not_applicable: completions to which the server gave null.
        failed: completions without a score, by reason.
        tokens: that the server says it used.
        seconds: that all answered requests took together; ``slowest``: the longest of them.
    """

    completions: int = 0
    cached: int = 0
    requests: int = 0
    retries: int = 0
    retry_after: int = 0
    retry_after_capped: int = 0
    not_applicable: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    answered: int = 0

    @property
    def latency(self) -> float:
        """Mean seconds of an answered request; NaN before the first."""
        return self.seconds / self.answered if self.answered else math.nan


class Problem(Exception):
    """A request without a usable answer.

    Args:
        reason: short, and the same for all of its kind: failures are counted by it.
        detail: what this one said.
        again: whether another try may help.
        down: whether it says that the server does not work, rather than that it did not like this request.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        again: bool = False,
        down: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.again, self.down, self.retry_after = reason, detail, again, down, retry_after


class Client:
    """Posts to ``options.url``; the limits and the breaker hold over all calls, connections for one call.

    A connection belongs to the event loop that opened it, and a trainer, a notebook and a script each have their own.
    """

    def __init__(self, options: ApiOptions, counts: Counts) -> None:
        self.options, self.counts = options, counts
        self.requests = Window(options.requests_per_minute)
        self.tokens = Window(options.tokens_per_minute)
        self.breaker = Breaker(options.breaker_failures, options.breaker_seconds)
        self.answered = False  # once: then address and key are right
        self._said: set[str] = set()

    def connect(self) -> "httpx.AsyncClient":
        """The connections of one call; an async context manager.

        Raises:
            RewardError: the key's environment variable is not set, or the address cannot be.
        """
        import httpx

        options = self.options
        try:
            httpx.URL(options.url)
        except httpx.InvalidURL as error:
            raise RewardError(f"the url {options.address} is no address ({error}). Correct it.") from error
        key, header = options.key(), options.api_key_header
        bearer = "Bearer " if header.lower() == "authorization" else ""
        return httpx.AsyncClient(
            verify=_certificates(),
            headers={header: bearer + key} if key else {},
            timeout=httpx.Timeout(options.timeout, connect=options.connect_timeout),
            limits=httpx.Limits(max_connections=options.concurrency),
        )

    async def post(
        self, connection: "httpx.AsyncClient", free: asyncio.Semaphore, body: Callable[[], dict], tokens: float
    ) -> Any:
        """The answer to a request, as the JSON it holds.

        Args:
            connection: from ``connect``.
            free: how many more requests may be under way.
            body: makes the body, once its turn has come: media in base64 are large.
            tokens: an estimate of what it costs.

        Raises:
            Problem: no answer, after all retries.
            RewardError: the server refuses the key or the address, and has not answered anything yet.
        """
        async with free:  # kept between retries: a server in trouble is not given the next completion to fail
            entry = await self.breaker.enter()
            if entry is None:
                raise Problem("the server does not answer (circuit breaker)")
            answered: bool | None = None  # unknown, if the call is given up

            def count_retry(_: "RetryCallState") -> None:
                nonlocal answered
                answered = False
                self.counts.retries += 1

            try:
                answer = await self._tries(connection, body, tokens, entry, count_retry)
                answered = True
                return answer
            except Problem as problem:
                answered = not problem.down
                raise
            finally:
                self.breaker.leave(entry, answered)

    async def _tries(
        self,
        connection: "httpx.AsyncClient",
        body: Callable[[], dict],
        tokens: float,
        entry: Entry,
        count_retry: Callable[["RetryCallState"], None],
    ) -> Any:
        import tenacity

        def again(error: BaseException) -> bool:
            return isinstance(error, Problem) and error.again and not self.breaker.open

        content = await asyncio.to_thread(lambda: json.dumps(body()).encode())
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(1 if entry == "probe" else self.options.retries + 1),
            wait=self._wait,
            retry=tenacity.retry_if_exception(again),
            before_sleep=count_retry,
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                return await self._once(connection, content, tokens)

    async def _once(self, connection: "httpx.AsyncClient", content: bytes, tokens: float) -> Any:
        import httpx

        await self.requests.take()
        taken = await self.tokens.take(tokens)
        self.counts.requests += 1
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.options.timeout):
                answer, text = await self._send(connection, content)
        except (TimeoutError, httpx.TimeoutException) as error:
            detail = f"none after {self.options.timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise Problem("timeout", detail, again=True, down=True) from error
        except httpx.TransportError as error:
            raise Problem("connection", f"{type(error).__name__}: {error}", again=True, down=True) from error
        except httpx.HTTPError as error:
            raise Problem("unreadable answer", f"{type(error).__name__}: {error}", again=True, down=True) from error
        self._refuse_status(answer, text)
        took = time.monotonic() - start
        self.counts.answered += 1
        self.counts.seconds += took
        self.counts.slowest = max(self.counts.slowest, took)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Problem("no JSON", self._quoted(text), again=True, down=True) from error
        self.answered = True
        usage = found.get("usage") if isinstance(found, dict) else None
        used = usage.get("total_tokens") if isinstance(usage, dict) else None
        if isinstance(used, int) and not isinstance(used, bool) and used >= 0:
            self.tokens.correct(taken, used)
            self.counts.tokens += used
        return found

    async def _send(self, connection: "httpx.AsyncClient", content: bytes) -> tuple["httpx.Response", str]:
        """The answer and its text."""
        headers = {"Content-Type": "application/json"}
        pieces, length = [], 0
        async with connection.stream("POST", self.options.url, content=content, headers=headers) as answer:
            async for piece in answer.aiter_bytes():
                pieces.append(piece)
                length += len(piece)
                if length > _LONGEST_REPLY:
                    raise Problem("answer too long", f"more than {_LONGEST_REPLY} bytes")
        return answer, b"".join(pieces).decode("utf-8", "replace")

    def _refuse_status(self, answer: "httpx.Response", text: str) -> None:
        status = answer.status_code
        if answer.is_success:
            return
        if not self.answered and (status in _HOPELESS or answer.is_redirect):
            raise RewardError(self._hopeless(status, answer.headers.get("location", "")))
        again = status in (408, 425, 429) or status >= 500
        wait = _retry_after(answer.headers.get("retry-after")) if again else None
        detail = "" if status in (401, 403) else self._quoted(text)  # some quote a part of the key
        raise Problem(f"HTTP {status}", detail, again=again, down=again, retry_after=wait)

    def _hopeless(self, status: int, location: str) -> str:
        options = self.options
        if status in (401, 403):
            variable = options.api_key_env or ("OPENAI_API_KEY" if options.protocol == "chat" else None)
            held = (
                f"Correct the key in the environment variable {variable}"
                if variable and options.key()
                else (
                    f"Put the key into the environment variable {variable}" if variable else "Name the key's variable"
                )
            )
            return (
                f"{options.address} refuses the key (HTTP {status}). {held}; api_key_env and api_key_header say where "
                "it is taken from and how it is sent."
            )
        usual = "/v1/chat/completions" if options.protocol == "chat" else "/v1/score/evaluation"
        moved = f", moved to {location.partition('?')[0]}" if location else ""
        named = f', or that there is no model "{options.model}"' if status == 404 and options.model else ""
        return (
            f"{options.address} says that there is nothing to post to (HTTP {status}{moved}){named}. Correct url: it "
            f"is the whole address, which often ends in {usual}."
        )

    def _wait(self, state: "RetryCallState") -> float:
        problem = state.outcome.exception() if state.outcome else None
        asked = problem.retry_after if isinstance(problem, Problem) else None
        options = self.options
        if asked is None:
            # Between half and the whole of it, so that requests which failed together do not come back together.
            longest = min(options.backoff_max, options.backoff * 2 ** (state.attempt_number - 1))
            return longest * random.uniform(0.5, 1.0)
        self.counts.retry_after += 1
        self.counts.retry_after_capped += asked > options.retry_after_max
        return min(asked, options.retry_after_max)

    def say(self, problem: Problem, asked: bool = True) -> None:
        """The first failure of a kind, once: a server that is down must not fill the log.

        Args:
            problem: what failed.
            asked: whether the server had a part in it.
        """
        if problem.reason in self._said or len(self._said) >= _KINDS_SAID:
            return
        self._said.add(problem.reason)
        logger.warning(
            'The reward "%s": %s%s%s. Its completions count as failed; further ones are counted, not said.',
            self.options.name,
            problem.reason,
            f" from {self.options.address}" if asked else "",
            f" ({problem.detail})" if problem.detail else "",
        )

    def _quoted(self, text: str) -> str:
        key = self.options.key()
        text = " ".join(text.split())
        text = text.replace(key, "***") if key else text
        return f'"{text[:_SHOWN]}"' if text else ""


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context()


# Statuses that no retry changes and no completion causes: key, right, address, method.
_HOPELESS = (401, 403, 404, 405)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date; None where it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
