"""What the reward ``api`` can be told, and what it refuses. No httpx here."""

import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from ...errors import ConfigError, RewardError
from ...options import Options
from ...sentences import as_sentence

Protocol = Literal["scores", "chat"]

JUDGE = """Judge how well the response fulfils the request.

<request>
{prompt}
</request>
<response>
{completion}
</response>

Reply with one line of JSON and nothing else: {"score": x}, where x is a number from 0 (useless or wrong) to 1
(perfect)."""

_SECRET = re.compile(r"key|token|secret|passw|signature|^sig$|^code$", re.IGNORECASE)
_SLOT = re.compile(r"\{\{\w+\}\}|\{(\w+)\}")


class ApiOptions(Options):
    """Options of the reward ``api``."""

    url: str = Field(description="Whole address that is posted to: .../v1/score/evaluation, .../v1/chat/completions.")
    protocol: Protocol = Field(
        default="scores",
        description="scores: a list of texts in, a list of numbers out. chat: an OpenAI-compatible judge, one request "
        "a completion.",
    )
    model: str = Field(default="", description="Model that the server is asked for; chat needs one.")
    template: str | None = Field(
        default=None,
        description="Text that is judged, with {prompt}, {completion} and any column in braces. Unset, scores sends "
        "the prompt, a new line and the completion; chat asks for a score from 0 to 1.",
    )
    system: str | None = Field(default=None, description="System message of a chat judge; takes the same fields.")
    send_columns: list[str] = Field(
        default_factory=list,
        description="Columns, prompt and completion among them, that scores sends beside the texts.",
    )
    send_media: bool = Field(default=False, description="Send the images, videos and sounds of the prompt.")
    max_media_bytes: int = Field(
        default=4_000_000, ge=1, description="Largest medium that is sent, in bytes before base64."
    )
    downscale: bool = Field(
        default=True, description="Make a larger medium smaller; false: a completion that has one counts as failed."
    )
    video_frames: int = Field(default=8, ge=1, description="Frames of a video, where it is sent as pictures.")
    media_root: str | None = Field(default=None, description="Folder that relative media paths start from.")
    batch_size: int = Field(default=16, ge=1, description="Completions in a request (scores).")
    body: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 512},
        description="Further keys of a chat request; given, they replace the defaults.",
    )
    score_pattern: str | None = Field(
        default=None,
        description="Regular expression whose one group is the score in a judge's reply; the last match counts. "
        'Unset: the last JSON object with a "score", or a reply that is a number.',
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="Lowest and highest score that the server gives, mapped to 0 and 1; one outside counts as failed.",
    )
    api_key_env: str | None = Field(
        default=None,
        description="Environment variable that holds the key. Unset: none (scores); OPENAI_API_KEY where it is set "
        "(chat).",
    )
    api_key_header: str = Field(
        default="Authorization", description='Header of the key; Authorization has "Bearer " put before it.'
    )
    api_key: Any = Field(default=None, repr=False, description="Refused: keys come from the environment.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds until the whole answer to a request is there.")
    connect_timeout: float = Field(default=10.0, gt=0, description="Seconds until a connection stands.")
    retries: int = Field(default=4, ge=0, description="Further tries after a lost connection, a timeout, 429 or 5xx.")
    backoff: float = Field(default=1.0, gt=0, description="Seconds before the first retry; doubled each time.")
    backoff_max: float = Field(default=30.0, gt=0, description="Longest wait of that kind, in seconds.")
    retry_after_max: float = Field(
        default=120.0, ge=0, description="Longest wait that a server's Retry-After may ask for, in seconds."
    )
    requests_per_minute: int | None = Field(default=None, ge=1, description="At most so many requests in any minute.")
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="At most so many tokens in any minute: one for 4 characters, 1000 for a picture, a frame or a "
        "sound; corrected by what the server says it used.",
    )
    concurrency: int = Field(default=8, ge=1, description="Requests under way at a time.")
    cache: str | bool = Field(
        default=True,
        description="Database of scores already had: a path, true for api-scores.sqlite in $VLM_GRPO_CACHE or "
        "~/.cache/vlm_grpo, false for none. It does not know when another model answers at the same address.",
    )
    breaker_failures: int = Field(
        default=8, ge=1, description="After so many requests in a row without an answer none is made for a while."
    )
    breaker_seconds: float = Field(
        default=30.0, gt=0, description="That while, in seconds; one request then finds out whether the server is back."
    )
    deadline: float = Field(
        default=600.0,
        gt=0,
        description="Seconds for all completions of a step; those without a score then have failed.",
    )
    name: str = Field(default="api", min_length=1, description="What metrics and messages call this reward.")

    @classmethod
    def of(cls, values: dict[str, Any]) -> "ApiOptions":
        """The options in ``values``.

        Raises:
            RewardError: an unknown option, or a value that cannot be, in one sentence without any key in it.
        """
        if "url" not in values:
            raise RewardError("the reward api needs the url that it posts to. Give url.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            known = [name for name in cls.model_fields if name != "api_key"]
            sentence: ConfigError = as_sentence(error, lambda _: known, dict.fromkeys(values, "api"))
            raise RewardError(str(sentence).removeprefix("api: ")) from None

    @field_validator("api_key", mode="before")
    @classmethod
    def _no_literal_key(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError(
                "a key has no place in a config, which is written down with every run; put it into an environment "
                "variable, and give that variable's name as api_key_env"
            )
        return value

    @field_validator("url")
    @classmethod
    def _url_is_one_without_secrets(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            hostname, _ = parts.hostname, parts.port
        except ValueError:
            hostname = None
        if not hostname or parts.scheme not in ("http", "https"):
            raise ValueError(f'"{_shown(value)}" is no address; write it whole, as in https://host/v1/score/evaluation')
        secret = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(key)]
        if parts.username or parts.password or secret:
            what = f'a "{secret[0]}"' if secret else "a user name or password"
            raise ValueError(f"the address holds {what}; name an environment variable as api_key_env instead")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variables_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("that is no name of an environment variable; give the name, not the key")
        return value

    @field_validator("api_key_header")
    @classmethod
    def _is_a_headers_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9-]+", value):
            raise ValueError("that is no name of a header, such as Authorization or X-Api-Key")
        return value

    @field_validator("score_pattern")
    @classmethod
    def _has_one_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f'"{value}" is no regular expression ({error})') from None
            if groups != 1:
                raise ValueError(f'"{value}" has {groups} groups; put brackets around the score, and only there')
        return value

    @model_validator(mode="after")
    def _agree(self) -> "ApiOptions":
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range={list(self.range)} has no room; give the lowest score first")
        if self.protocol == "chat" and not self.model:
            raise ValueError("protocol=chat needs the name of a model; give model")
        if self.protocol == "chat" and self.send_columns:
            raise ValueError("send_columns belongs to protocol=scores; name columns in the template instead")
        foreign = [name for name in ("system", "score_pattern") if getattr(self, name) is not None]
        if self.protocol == "scores" and foreign:
            raise ValueError(f"{foreign[0]} belongs to protocol=chat; leave it out, or give protocol=chat")
        if self.template is not None and "completion" not in slots(self.template):
            raise ValueError("the template has no {completion}, so that every completion would have the same score")
        return self

    @property
    def scale(self) -> tuple[float, float] | None:
        """Lowest and highest score; those of our own question to a judge where it is the one asked."""
        own = self.protocol == "chat" and self.template is None
        return (0.0, 1.0) if self.range is None and own else self.range

    @property
    def address(self) -> str:
        """The address for messages: without its query."""
        return _shown(self.url)

    def key(self) -> str | None:
        """The key, read when it is used and kept nowhere.

        Raises:
            RewardError: the environment variable is not set.
        """
        name = self.api_key_env or ("OPENAI_API_KEY" if self.protocol == "chat" else "")
        key = os.environ.get(name, "").strip() if name else ""
        if not key and self.api_key_env:
            raise RewardError(
                f"the environment variable {name}, which api_key_env names, is not set. Set it to the key of "
                f"{self.address}, or correct the name."
            )
        if not key.isascii() or not key.isprintable():
            raise RewardError(f"the environment variable {name} holds characters that no header can. Correct it.")
        return key or None

    def cache_path(self) -> Path | None:
        """Where scores are kept, or None."""
        if self.cache is False:
            return None
        if self.cache is not True:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("VLM_GRPO_CACHE") or "~/.cache/vlm_grpo").expanduser() / "api-scores.sqlite"


def slots(template: str) -> list[str]:
    """The names in single braces, in order, each once."""
    return list(dict.fromkeys(match[1] for match in _SLOT.finditer(template) if match[1]))


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its slots filled in one pass: braces in a value, or around anything else, stay as they are.

    ``{{name}}`` is written as ``{name}``.
    """
    return _SLOT.sub(lambda match: values[match[1]] if match[1] else match[0][1:-1], template)


def _shown(url: str) -> str:
    return url.partition("?")[0].partition("#")[0].rpartition("@")[2]
