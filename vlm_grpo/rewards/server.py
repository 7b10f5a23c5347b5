"""The scoring server: the rewards of a config behind ``POST /v1/score/evaluation``.

The protocol is the one of ``rewards/api/scores.py``. Each text is a completion; ``columns`` give what else a reward
needs, ``prompt`` (text) and ``completion`` (text, in place of the message) among them. Media reach rewards as the
columns ``images``, ``videos`` and ``audios``, each a list of ``{"bytes", "path": None}`` a completion. With
``"details": true`` the answer has each reward's own values. No FastAPI is imported before a server is built.
"""

import asyncio
import base64
import binascii
import hmac
import inspect
import ipaddress
import json
import logging
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..data import MEDIA_COLUMNS
from ..errors import RewardError, UnsupportedError
from ..media import KINDS, Kind
from .checked import is_async
from .failed import Failed
from .resolve import named

logger = logging.getLogger(__name__)

PATH = "/v1/score/evaluation"
_BACKLOG = 2048
_THROWN_AWAY = 4  # times max_bytes: of a longer request the answer may be lost
# Keyword arguments that the server makes itself.
_RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def _decoded(text: Any) -> Any:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else text
    except binascii.Error as error:
        raise ValueError(f"this is not base64 ({error})") from None


_File = Annotated[bytes, BeforeValidator(_decoded)]


class ScoredMedium(BaseModel):
    """A medium of one text: ``data``, or the ``frames`` of a video, in base64."""

    model_config = ConfigDict(extra="forbid")

    type: Kind
    mime: str = ""
    data: _File | None = None
    frames: list[_File] | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> "ScoredMedium":
        if (self.data is None) == (self.frames is None):
            raise ValueError('give either "data" or "frames"')
        if self.frames is not None and self.type != "video":
            raise ValueError('only a video has "frames"')
        return self

    def cell(self) -> Any:
        """As a row of a dataset holds it, undecoded."""
        if self.frames is not None:
            return list(self.frames)
        return {"bytes": self.data, "path": None}


class ScoreRequest(BaseModel):
    """What is posted."""

    model: str = ""
    messages: list[str]
    columns: dict[str, list[Any]] = Field(default_factory=dict)
    media: list[list[ScoredMedium]] | None = None
    details: bool = False

    @field_validator("columns")
    @classmethod
    def _columns_are_the_rewards_own(cls, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in columns.items():
            if name in _RESERVED:
                raise ValueError(f'"{name}" is no column; a prompt and a completion go under "prompt", "completion"')
            if name in MEDIA_COLUMNS:  # a reward would open a path of this machine
                raise ValueError(f'the column "{name}" is not taken; send media in base64, as "media"')
            if name in ("prompt", "completion") and not all(isinstance(value, str) for value in values):
                raise ValueError(f'the column "{name}" must hold texts')
        return columns

    @model_validator(mode="after")
    def _one_of_each_a_message(self) -> "ScoreRequest":
        count = len(self.messages)
        for name, values in [*self.columns.items(), *([("media", self.media)] if self.media is not None else [])]:
            if len(values) != count:
                raise ValueError(f'"{name}" has {len(values)} entries for {count} messages; give one a message')
        return self

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of a reward function."""
        columns = {name: values for name, values in self.columns.items() if name not in ("prompt", "completion")}
        for kind in KINDS if self.media is not None else ():
            cells = [[medium.cell() for medium in row if medium.type == kind] for row in self.media or []]
            if any(cells):
                columns[f"{kind}s"] = cells
        return {
            "completions": self.columns.get("completion", self.messages),
            "prompts": self.columns.get("prompt", [""] * len(self.messages)),
            "trainer_state": None,
            "log_extra": _nowhere,
            "log_metric": _nowhere,
            **columns,
        }


class Scorer:
    """Several rewards and their weights as one score; safe to call from several requests at a time.

    Args:
        functions: as ``load_rewards`` gives them.
        weights: one a function.

    Raises:
        RewardError: a reward that needs more than texts.
    """

    def __init__(self, functions: list[Callable[..., Any]], weights: list[float]) -> None:
        for function in functions:
            if hasattr(inspect.unwrap(function), "use_model"):
                raise RewardError(
                    f'The reward "{function.__name__}" is a reward model, which sees prompts as messages with their '
                    "media, and requests bring texts. Leave it out, or use it in the run itself: rewards: "
                    "[{model: RUN}]."
                )
        self.functions, self.weights = functions, weights
        self.names = [getattr(function, "__name__", type(function).__name__) for function in functions]
        # Most reward functions were written for one caller at a time.
        self._turn = [asyncio.Lock() for _ in functions]

    async def __call__(self, request: ScoreRequest) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            RewardError: a reward that fails.
        """
        arguments = request.arguments() if request.messages else {}
        calls = range(len(self.functions) if request.messages else 0)
        values = await asyncio.gather(*(self._run(number, arguments) for number in calls))
        totals = [self._total(row) for row in zip(*values, strict=True)]
        answer: dict[str, Any] = {"scores": [None if isinstance(total, Failed) else total for total in totals]}
        if any(isinstance(total, Failed) for total in totals):
            answer["failed"] = [total.reason if isinstance(total, Failed) else None for total in totals]
        if request.details:
            answer["rewards"] = {
                name: [None if isinstance(value, Failed) else value for value in row]
                for name, row in zip(self.names, values, strict=False)
            }
        return answer

    async def _run(self, number: int, arguments: dict[str, Any]) -> list[Any]:
        function = self.functions[number]
        try:
            if is_async(function):
                return await function(**arguments)
            async with self._turn[number]:
                return await asyncio.to_thread(function, **arguments)
        except RewardError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise RewardError(f'The reward "{self.names[number]}" failed with {named(error)}. Fix it there.') from error

    def _total(self, values: tuple[Any, ...]) -> float | None | Failed:
        """As the trainer adds rewards up: one that is not applicable adds nothing, a failed one spoils the total."""
        failed = next((value for value in values if isinstance(value, Failed)), None)
        if failed is not None or all(value is None for value in values):
            return failed
        total = math.fsum(w * float(v) for w, v in zip(self.weights, values, strict=True) if v is not None)
        return total if math.isfinite(total) else Failed("a score that is not finite")


def build_app(
    functions: list[Callable[..., Any]],
    weights: list[float],
    *,
    max_bytes: int,
    max_items: int,
    token: str | None = None,
) -> Any:
    """The FastAPI application.

    Args:
        functions: as ``load_rewards`` gives them, with their ``weights``.
        max_bytes: longest request.
        max_items: most texts of a request.
        token: that requests must bear; None asks for none.

    Raises:
        UnsupportedError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise _missing(error) from error

    scorer = Scorer(functions, weights)
    app = FastAPI(title="vlm-grpo rewards", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post(PATH)
    async def score(request: ScoreRequest) -> Any:
        if len(request.messages) > max_items:
            return _refusal(JSONResponse, 413, f"{len(request.messages)} messages are more than {max_items}.")
        try:
            return await scorer(request)
        except RewardError as error:
            # What a reward says of its columns is about the request; anything else is a fault of the reward.
            status = 422 if isinstance(error.__cause__, RewardError) else 500
            if status == 500:
                logger.warning("%s", error)
            return _refusal(JSONResponse, status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Any:
        problem = error.errors()[0]  # without the input, which may be a video
        where = ".".join(str(part) for part in problem["loc"] if part != "body")
        message = problem["msg"].removeprefix("Value error, ")
        return _refusal(JSONResponse, 422, f"{where}: {message}" if where else message)

    app.add_middleware(_Guard, token=token, max_bytes=max_bytes)
    return app


def _refusal(response: Any, status: int, sentence: str) -> Any:
    return response({"detail": sentence}, status_code=status)


class _Guard:
    """Stands before the application: without the token nothing is kept of a body, and never more than allowed."""

    def __init__(self, app: Any, token: str | None, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.expected is not None and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            await self._refuse(receive, send, 401, "A token is needed: Authorization: Bearer TOKEN.")
            return
        declared = headers.get(b"content-length", b"")
        too_long = declared.isdigit() and int(declared) > self.max_bytes
        pieces, length, more = [], 0, True
        while more and not too_long:
            message = await receive()
            pieces.append(message.get("body", b""))
            length += len(pieces[-1])
            more = message.get("more_body", False)
            too_long = length > self.max_bytes  # whatever was declared
        if too_long:
            await self._refuse(receive, send, 413, f"The request is longer than {self.max_bytes} bytes.", more)
            return
        await self.app(scope, _replay(b"".join(pieces), receive), send)

    async def _refuse(self, receive: Any, send: Any, status: int, sentence: str, more: bool = True) -> None:
        """Answer, after throwing away what is still being sent: closing on it would destroy the answer on its way."""
        length = 0
        while more and length <= _THROWN_AWAY * self.max_bytes:
            message = await receive()
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"detail": sentence}).encode()})


def _replay(body: bytes, receive: Any) -> Any:
    """What was read of a request, to be read again."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return left.pop() if left else await receive()

    return again


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; port 0 takes a free one.

    Raises:
        RewardError: the address is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(_BACKLOG)  # who comes before the server runs waits for it
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RewardError(
                f"The scoring server cannot listen at {host}:{port} ({reason}). Give another --port, or --host."
            ) from error
        yield listening


def make_server(app: Any) -> Any:
    """A uvicorn server; ``run(sockets=[...])`` serves until ``should_exit`` is set.

    Raises:
        UnsupportedError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _missing(error) from error
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))


def _missing(error: ImportError) -> UnsupportedError:
    return UnsupportedError(
        f'The scoring server needs {error.name}, which is not installed. Install it: pip install "vlm-grpo[serve]".'
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _nowhere(*_: Any, **__: Any) -> None:
    """TRL's ``log_extra`` and ``log_metric``, where there is no log."""
