"""What a judge is asked about the last response of a conversation: a Jinja template, and how its own turn begins."""

import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment

from ..data import Sample
from ..errors import CheckpointError, ConfigError, nearest
from .suffix import suffix_ids

VARIABLES = ("captions", "question", "response")
TEMPLATE_FILE, STEM_FILE = "judge_prompt.jinja", "judge_prompt.json"
_ENDINGS = (".jinja", ".j2", ".txt")
_NAME = "The judge's prompt"

# The four criteria and the captions are those of factually augmented RLHF (LLaVA-RLHF, arXiv 2309.14525); the wording
# is our own.
TEMPLATE = """\
Evaluate the assistant's last response in this conversation by four criteria.

1. Accurate: what the response says is true of the given media and of the world, and nothing in it is made up.\
{% if captions %}
 The response should be supported by these captions:
{% for caption in captions %}
- {{ caption.split() | join(" ") }}
{% endfor %}
{% else %}

{% endif %}
2. Helpful: the response does what the user asked for.
3. Natural language: the response is fluent, and reads as if a careful person had written it.
4. Concise: the response says no more than it needs to, and repeats nothing.

Sum up in one score how good the response is by all four criteria together.\
"""
STEM = "The score of the last response is"


@dataclass(frozen=True)
class JudgePrompt:
    """The request to evaluate a response, and the beginning of the judge's own turn.

    Attributes:
        template: a Jinja template of ``captions`` (a list of texts, perhaps empty), ``question`` (the text of the last
            user turn) and ``response``.
        stem: the beginning of the judge's turn, behind whose last token the score is read.

    Raises:
        ConfigError: a template that cannot be rendered; the message names the line.
    """

    template: str = TEMPLATE
    stem: str = STEM

    def __post_init__(self) -> None:
        _check(self.template, _NAME)

    @classmethod
    def of(cls, prompt: str | Path | None = None, stem: str | None = None) -> "JudgePrompt":
        """The judge's prompt of a config.

        Args:
            prompt: a file ending in .jinja, .j2 or .txt, or the text of a template; None: the built-in one.
            stem: None: the built-in one.

        Raises:
            ConfigError: a file that cannot be read, or a template that cannot be rendered.
        """
        stem = STEM if stem is None else stem
        if prompt is None:
            return cls(stem=stem)
        if not names_file(prompt):
            _refuse_file(str(prompt))
            return cls(str(prompt), stem)
        path = Path(prompt).expanduser()
        try:
            template = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
            raise ConfigError(
                f"{_NAME} {path} cannot be read ({reason}). Give a template file, or the template itself."
            ) from error
        _check(template, f"{_NAME} {path}")
        return cls(template, stem)

    @property
    def takes_captions(self) -> bool:
        """Whether the template has a place for captions: one without lets them go unseen."""
        return any(name.name == "captions" for name in _names(self.template))

    def request(self, captions: Sequence[str] = (), *, response: str, question: str = "") -> str:
        """The text of the request, without white space around it.

        Raises:
            ConfigError: the template fails on these values.
        """
        return _rendered(self.template, _NAME, list(captions), question, response)

    def suffix(
        self, processor: Any, sample: Sample, response: str, captions: Sequence[str] = (), **template_kwargs: Any
    ) -> list[int]:
        """The tokens behind the policy's own encoded prompt (``EncodedPrompt.input_ids``).

        They are the response, the end of its turn, the request as a user's turn, the generation prompt and the stem,
        as the chat template would write them. Neither prompt nor media change; captions stand in the request only.

        Args:
            processor: or, for text-only rows, a tokenizer.
            sample: the row whose prompt was encoded.
            response: what is judged, perhaps empty. Special tokens that it or a caption holds are read as plain text.
            captions: what the judge may know of the media.
            template_kwargs: those the prompt was encoded with, such as ``chat_template``.

        Raises:
            EncodingError: the stem holds a media token.
        """
        request = self.request(captions, response=response, question=question_of(sample))
        return suffix_ids(processor, sample, response, request, self.stem, template_kwargs)

    def save(self, folder: str | Path) -> None:
        """Write the template and the stem into a folder, as ``load`` reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, TEMPLATE_FILE).write_bytes(self.template.encode())
        stem = json.dumps({"stem": self.stem}, ensure_ascii=False)
        Path(folder, STEM_FILE).write_text(stem + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "JudgePrompt":
        """What ``save`` wrote.

        Raises:
            CheckpointError: a file that is not there, or not what ``save`` writes.
            ConfigError: a template that cannot be rendered.
        """
        try:
            template = Path(folder, TEMPLATE_FILE).read_bytes().decode()
            stem = json.loads(Path(folder, STEM_FILE).read_bytes().decode())["stem"]
            assert isinstance(stem, str)
        except OSError as error:
            raise CheckpointError(
                f"{folder} has no readable {Path(str(error.filename)).name}. Give the folder of a reward model."
            ) from error
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise CheckpointError(
                f"{folder}: {TEMPLATE_FILE} and {STEM_FILE} are not as they were saved ({error}). Copy the folder anew."
            ) from error
        _check(template, f"{_NAME} {Path(folder, TEMPLATE_FILE)}")
        return cls(template, stem)


def names_file(prompt: str | Path) -> bool:
    """Whether a config's prompt is the name of a file, rather than the template itself."""
    return isinstance(prompt, Path) or ("\n" not in prompt and prompt.strip().lower().endswith(_ENDINGS))


def _refuse_file(text: str) -> None:
    """Raise ``ConfigError`` for a file's name, which would be what the judge is asked."""
    if text.strip() and (len(text.split()) == 1 and "{" not in text or _is_file(text)):
        raise ConfigError(
            f'{_NAME} "{text}" is neither a file ending in {", ".join(_ENDINGS)} nor a request. Give such a file, or '
            "the request itself."
        )


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def question_of(sample: Sample) -> str:
    """The text of the last user turn; of a templated prompt, all of it."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    asked = next((message for message in reversed(sample.prompt) if message["role"] == "user"), None)
    return "".join(part.get("text", "") for part in asked["content"]) if asked else ""


def _environment() -> SandboxedEnvironment:
    return SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=32)
def _names(template: str) -> tuple[nodes.Name, ...]:
    return tuple(_environment().parse(template).find_all(nodes.Name))


def _check(template: str, name: str) -> None:
    """Raise ``ConfigError`` where the template cannot be rendered."""
    if not template.strip():
        raise ConfigError(f"{name} is empty. Ask for an evaluation, or leave the option out.")
    try:
        _compiled(template)
        unknown = find_undeclared_variables(_environment().parse(template)) - set(VARIABLES)
    except TemplateSyntaxError as error:
        reason = (error.message or "syntax error").rstrip(".")
        raise ConfigError(f"{name} line {error.lineno} is no Jinja template ({reason}). Correct it.") from error
    if unknown:
        first = min((found for found in _names(template) if found.name in unknown), key=lambda found: found.lineno)
        hint = nearest(first.name, list(VARIABLES)) or f" Known are {', '.join(VARIABLES)}."
        raise ConfigError(f'{name} line {first.lineno} has the unknown variable "{first.name}".{hint}')
    for captions in ([], ["A caption."]):
        _rendered(template, name, captions, "A question?", "A response.")


def _rendered(template: str, name: str, captions: list[str], question: str, response: str) -> str:
    try:
        return _compiled(template).render(captions=captions, question=question, response=response).strip()
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        place = f" line {lines[-1]}" if lines else ""
        reason = (str(error) or type(error).__name__).rstrip(".")
        raise ConfigError(f"{name}{place} cannot be rendered ({reason}). Correct it.") from error
