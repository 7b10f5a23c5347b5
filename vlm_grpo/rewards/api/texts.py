"""What a server is shown of a completion: its texts, columns and media."""

import json
from dataclasses import dataclass
from typing import Any

from ...errors import RewardError, nearest
from ...media import KINDS
from ..text import completion_text, written
from .media import Sent
from .options import JUDGE, ApiOptions, fill, slots


@dataclass(frozen=True)
class Item:
    """One completion in a request.

    Attributes:
        text: what is judged.
        system: the judge's system message.
        columns: those of ``send_columns``, as JSON can hold them.
        media: of the prompt.
    """

    text: str
    system: str | None
    columns: dict[str, Any]
    media: list[Sent]


class Texts:
    """Writes the texts of a call.

    Args:
        options: of the reward.
        completions: strings or message lists.
        prompts: alike; or None.
        columns: of the rows, one value a completion.

    Raises:
        RewardError: the template or ``send_columns`` names a column that the rows do not have.
    """

    def __init__(
        self, options: ApiOptions, completions: list[Any], prompts: list[Any] | None, columns: dict[str, Any]
    ) -> None:
        self.options, self.completions, self.prompts = options, completions, prompts
        self.columns = {
            name: values
            for name, values in columns.items()
            if isinstance(values, (list, tuple)) and len(values) == len(completions) and name != "completion_ids"
        }
        templates = [("the template", options.template), ("system", options.system)]
        for what, names in [
            *((what, slots(text or "")) for what, text in templates),
            ("send_columns", options.send_columns),
        ]:
            for name in names:
                self._require(name, what)

    def _require(self, name: str, what: str) -> None:
        known = ["prompt", "completion", *self.columns]
        if name not in known:
            raise RewardError(
                f'{what} names "{name}", which the rows do not have.{nearest(name, known)} They have: '
                f"{', '.join(known)}. Name one of these."
            )

    def item(self, row: int, media: list[Sent]) -> Item | None:
        """What is sent for a completion; None where a column that the texts name is None: it cannot be scored."""
        values = {"prompt": prompt_text(self.prompts[row]) if self.prompts else ""}
        values["completion"] = completion_text(self.completions[row])
        for name in {*slots(self.options.template or ""), *slots(self.options.system or "")} - {"prompt", "completion"}:
            if self.columns[name][row] is None:
                return None
            values[name] = _as_text(self.columns[name][row])
        system = None if self.options.system is None else fill(self.options.system, values)
        sent = {name: values[name] if name in values else self._plain(name, row) for name in self.options.send_columns}
        return Item(self._text(values), system, sent, media)

    def _text(self, values: dict[str, str]) -> str:
        if self.options.template is not None:
            return fill(self.options.template, values)
        if self.options.protocol == "chat":
            return fill(JUDGE, values)
        return "\n".join(text for text in (values["prompt"], values["completion"]) if text)

    def _plain(self, name: str, row: int) -> Any:
        value = self.columns[name][row]
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise RewardError(
                f'the column "{name}" of send_columns holds a {type(value).__name__}, which JSON cannot carry. Leave '
                "it out; media are sent by send_media."
            ) from None


def prompt_text(prompt: Any) -> str:
    """A prompt as text: of several messages, each after its role; ``<image>``, ``<video>``, ``<audio>`` for media."""
    if isinstance(prompt, str):
        return prompt
    texts = [(message.get("role", ""), _content_text(message.get("content"))) for message in prompt or []]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


def _content_text(content: Any) -> str:
    if not isinstance(content, (list, tuple)):
        return content or ""
    return "".join(f"<{part['type']}>" if part.get("type") in KINDS else part.get("text") or "" for part in content)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else written(value)
