"""Prompts as a model's processor expands them: its tokens counted, no weights loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MediaOptions
from ..encode import as_texts, without_media
from ..errors import EncodingError, MediaError
from ..intake import Intake
from .figures import Spread
from .problems import in_two

if TYPE_CHECKING:
    from ..data import Sample
    from .rows import Row

_LONG = "Raise max_prompt_length, or give media fewer pixels or frames; a run leaves such rows out (on_overlong: drop)."


def processor_and_config(name: str) -> tuple[Any, Any]:
    """(processor or tokenizer, config) of whatever ``load_model`` takes, without its weights.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import AutoConfig

    from ..models import is_adapter, load_processor
    from ..models.hf import adapter_base

    processor = load_processor(name)
    place = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name
    return processor, AutoConfig.from_pretrained(adapter_base(place) if is_adapter(place) else place)


class TokenTally:
    """Tokens of the prompts of one file for one model.

    Args:
        name: of the model, as ``load_model`` takes it.
        media: how media are opened.
        limit: ``max_prompt_length``; longer prompts are problems.
    """

    def __init__(self, name: str, media: MediaOptions, limit: int | None) -> None:
        from ..models.families import placeholder_ids_by_kind

        self.name, self.limit = name, limit
        self.processor, config = processor_and_config(name)
        placeholders = placeholder_ids_by_kind(config, self.processor)
        self._media_ids = {token for ids in placeholders.values() for token in ids}
        self._intake = Intake(self.processor, placeholders, media)
        self.prompt, self.media = Spread(), Spread()
        self.over = 0

    def add(self, row: "Row") -> None:
        """Count the tokens of a row, all and those that stand for media; what the processor refuses is a problem."""
        assert row.sample is not None, "only rows in order are counted"
        try:
            ids = self._intake.encode(row.sample).input_ids
        except (EncodingError, MediaError) as error:
            row.problems.append(in_two(str(error), row.sample.where))
            return
        row.tokens = len(ids), sum(token in self._media_ids for token in ids)
        self.prompt.add(row.tokens[0])
        self.media.add(row.tokens[1])
        if self.limit is not None and len(ids) > self.limit:
            self.over += 1
            row.problems.append((f"The prompt has {len(ids)} tokens, more than max_prompt_length={self.limit}", _LONG))

    def text(self, sample: "Sample") -> str:
        """The prompt after the chat template, each medium one token still."""
        if isinstance(sample.prompt, str):
            return sample.prompt
        plain = without_media if hasattr(self.processor, "tokenizer") else as_texts
        return self.processor.apply_chat_template(plain(sample.prompt), tokenize=False, add_generation_prompt=True)

    def as_dict(self) -> dict[str, Any]:
        figures = {"prompt": self.prompt.as_dict(), "of_media": self.media.as_dict()}
        return {"model": self.name, **figures, "max_prompt_length": self.limit, "rows_over": self.over}
