"""``ApiReward``: completions in, scores of a server out, a failure for each that could not be had."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ..failed import Failed
from . import chat, scores
from .cache import ScoreCache, key_of
from .client import Client, Counts, Problem
from .media import MediaReader
from .options import ApiOptions
from .texts import Item, Texts

Score = float | None | Failed

_CHARACTERS_A_TOKEN, _TOKENS_A_MEDIUM = 4, 1000  # an estimate, until the server says it
_CACHE_FORM = 1  # changes with what a key is made of


def _takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """Its ``**options`` by name: whoever checks the ``kwargs`` of a config reads the signature."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [own, *inspect.signature(ApiOptions).parameters.values()]
    function.__dict__["__signature__"] = inspect.Signature(parameters)
    return function


class ApiReward:
    """Scores completions by a server; an async callable with TRL's contract.

    ``__call__`` is what a trainer awaits; ``score`` is the same from plain Python. For each completion it gives the
    server's number, None where the server says null ("not applicable") or a column that the template names is None,
    or ``Failed`` where no score could be had: a lost connection, a timeout, 429 and 5xx after all retries, an answer
    that is no JSON, has the wrong number of scores or one that is no finite number.

    A refused key and a wrong address (401, 403, 404, 405, a redirect) stop the run instead: they do not mend
    themselves. Once the server has answered they count as failed too, since then the completion caused them.

    Args:
        options: see ``ApiOptions``; ``url`` is needed.

    Attributes:
        counts: requests, retries, failures by reason, latency.

    Raises:
        RewardError: options that cannot be.
    """

    @_takes_options
    def __init__(self, **options: Any) -> None:
        self.options = ApiOptions.of(options)
        self.__name__ = self.options.name
        self.counts = Counts()
        self._client = Client(self.options, self.counts)
        self._cache = ScoreCache(self.options.cache_path())
        self._free: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._protocol = chat if self.options.protocol == "chat" else scores
        httpx_log = logging.getLogger("httpx")
        if httpx_log.level == logging.NOTSET:  # it has a line for every request
            httpx_log.setLevel(logging.WARNING)
        self.options.key()  # a missing variable is said before the run, not in its first step

    def __repr__(self) -> str:
        options = self.options
        return f"ApiReward(url={options.address!r}, protocol={options.protocol!r}, model={options.model!r})"

    def score(self, completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[Score]:
        """``__call__`` from plain Python, also where an event loop runs already, as in a notebook."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self(completions, prompts, **columns))
        out: list[Any] = []

        def run() -> None:
            try:
                out.append(asyncio.run(self(completions, prompts, **columns)))
            except BaseException as error:  # raised again below, in the caller's thread
                out.append(error)

        thread = threading.Thread(target=run, name="api-reward")
        thread.start()
        thread.join()
        if isinstance(out[0], BaseException):
            raise out[0]
        return out[0]

    async def __call__(self, completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[Score]:
        """One score a completion.

        Args:
            completions: strings or message lists.
            prompts: alike.
            columns: of the rows, one value a completion.

        Raises:
            RewardError: a refused key or address, or a column that is missing.
        """
        texts = Texts(self.options, completions, prompts, columns)
        media = MediaReader(self.options, prompts, columns)
        found: dict[int, Score] = {}
        async with self._client.connect() as connection:
            call = _Call(self, connection, texts, media, found)
            work = asyncio.ensure_future(call.run(len(completions)))
            try:
                await asyncio.wait([work], timeout=self.options.deadline)
                if work.done():
                    work.result()
            finally:
                if not work.done():
                    work.cancel()
                    await asyncio.wait([work])
                    _ = work.cancelled() or work.exception()  # taken out, or asyncio complains
        out = [found.get(row, _LATE) for row in range(len(completions))]
        self._count(out)
        return out

    def _slots(self) -> asyncio.Semaphore:
        """Of the running event loop: its calls share what may be under way."""
        loop = asyncio.get_running_loop()
        self._free = {known: free for known, free in self._free.items() if not known.is_closed()}
        if loop not in self._free:
            self._free[loop] = asyncio.Semaphore(self.options.concurrency)
        return self._free[loop]

    def _count(self, out: list[Score]) -> None:
        counts = self.counts
        counts.completions += len(out)
        counts.not_applicable += sum(score is None for score in out)
        counts.failed.update(score.reason for score in out if isinstance(score, Failed))


_LATE = Failed("deadline")


class _Call:
    """The work of one call: rows to items, items to requests, answers to scores."""

    def __init__(
        self, reward: ApiReward, connection: Any, texts: Texts, media: MediaReader, found: dict[int, Score]
    ) -> None:
        self.reward, self.connection, self.texts, self.media, self.found = reward, connection, texts, media, found
        self.options, self.protocol = reward.options, reward._protocol
        self.counts, self.cache, self.free = reward.counts, reward._cache, reward._slots()

    async def run(self, count: int) -> None:
        """Fill ``found``. What fails stays within its request; an error that stops the run stops the others too."""
        items: dict[int, Item] = {}
        await _together([self._read(row, items) for row in range(count)])
        groups: dict[str, list[int]] = {}  # equal completions are sent once, unless nothing is to be kept
        for row in sorted(items):
            groups.setdefault(self._key(items[row]) if self.cache.path else str(row), []).append(row)
        if self.cache.path:
            known = await asyncio.to_thread(self.cache.get, list(groups))
            for key, score in known.items():
                rows = groups.pop(key)
                self.counts.cached += len(rows)
                self.found.update(dict.fromkeys(rows, score))
        size = self.options.batch_size if self.options.protocol == "scores" else 1
        left = list(groups.items())
        parts = [dict(left[start : start + size]) for start in range(0, len(left), size)]
        await _together([self._ask(part, items) for part in parts])

    async def _read(self, row: int, items: dict[int, Item]) -> None:
        try:
            item = self.texts.item(row, await self.media.of(row))
        except Problem as problem:
            self.reward._client.say(problem, asked=False)
            self.found[row] = Failed(problem.reason)
            return
        if item is None:
            self.found[row] = None
        else:
            items[row] = item

    async def _ask(self, groups: dict[str, list[int]], items: dict[int, Item]) -> None:
        asked = [items[rows[0]] for rows in groups.values()]
        answers: list[Score]
        try:
            answer = await self.reward._client.post(
                self.connection,
                self.free,
                lambda: self.protocol.request(self.options, asked),
                sum(map(self._tokens, asked)),
            )
            answers = self.protocol.read(self.options, answer, len(asked))
        except Problem as problem:
            self.reward._client.say(problem)
            answers = [Failed(problem.reason)] * len(asked)
        got: dict[str, float | None] = {}
        for (key, rows), score in zip(groups.items(), answers, strict=True):
            self.found.update(dict.fromkeys(rows, score))
            if isinstance(score, Failed):
                self.reward._client.say(Problem(score.reason))
            else:
                got[key] = score
                self.counts.cached += len(rows) - 1
        if self.cache.path:
            await asyncio.to_thread(self.cache.add, got)

    def _tokens(self, item: Item) -> float:
        characters, media = len(item.text) + len(item.system or ""), sum(len(sent.files) for sent in item.media)
        reply = self.options.body.get("max_tokens") if self.options.protocol == "chat" else None
        return characters / _CHARACTERS_A_TOKEN + media * _TOKENS_A_MEDIUM + (reply if isinstance(reply, int) else 0)

    def _key(self, item: Item) -> str:
        options = self.options
        how = [options.url, options.protocol, options.model, options.score_pattern, options.scale]
        how += [options.body if options.protocol == "chat" else None]
        return key_of(_CACHE_FORM, how, item.system, item.text, item.columns, [sent.hashed for sent in item.media])


async def _together(work: list[Awaitable[None]]) -> None:
    """All of them at once; the first error stops the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for awaitable in work:
                group.create_task(awaitable)  # type: ignore[arg-type]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
