"""Which parts of a model are trained, and how: the rules for what may be asked together. No torch here.

The parts: ``language`` (with embeddings and output head), ``vision`` and ``audio`` (the towers that encode media), and
``projector`` (what maps their features into the language model).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError
from .options import LoraOptions

Part = Literal["off", "lora", "full"]
PARTS: tuple[str, ...] = ("language", "vision", "audio", "projector")
_VALUES = ("off", "lora", "full")


@dataclass(frozen=True)
class Parts:
    """How each part is trained: not at all, by adapters, or all of its weights.

    Attributes:
        given: the parts that the user named; the others follow ``lora``.
        by_name: adapters are on the modules of ``lora.targets``, wherever these are.
    """

    language: Part
    vision: Part
    audio: Part
    projector: Part
    given: frozenset[str] = frozenset()
    by_name: bool = False

    def chosen(self, value: Part) -> tuple[str, ...]:
        """The parts that are trained in this way."""
        return tuple(part for part in PARTS if getattr(self, part) == value)

    @property
    def adapted(self) -> bool:
        """Whether any adapter is trained."""
        return self.by_name or bool(self.chosen("lora"))

    @property
    def apart(self) -> bool:
        """Whether what is trained is kept apart from a base model that stays as it is: adapters, copies of modules."""
        return self.adapted or self.language != "full"

    def __str__(self) -> str:
        named = ["lora.targets by LoRA"] if self.by_name else []
        ways: tuple[tuple[Part, str], ...] = (("lora", "by LoRA"), ("full", "in full"))
        said = [f"{', '.join(self.chosen(way))} {how}" for way, how in ways if self.chosen(way)]
        return "; ".join([*named, *said])


def parts_of(lora: LoraOptions | None, load_in_4bit: bool, given: Mapping[str, Part | None]) -> Parts:
    """The parts as asked for; those left out follow.

    With ``lora``, vision and language follow its switches, audio and projector are off. Without, the rest is off beside
    a part that is trained in full, and trained in full beside parts that are only switched off.

    Args:
        lora: the options of the adapters, or None.
        load_in_4bit: whether the base has 4-bit weights, which cannot be trained themselves.
        given: part to ``"off"``, ``"lora"``, ``"full"`` or None (left out).

    Raises:
        ConfigError: an unknown value, or parts that cannot be trained together.
    """
    named: dict[str, Part] = {part: value for part, value in given.items() if value is not None}
    for part, value in named.items():
        if value not in _VALUES:
            raise ConfigError(f"{part}={value!r} is not known. Choose one of {', '.join(_VALUES)}.")
    if lora is None and "lora" in named.values():
        lora = LoraOptions()
    by_name = lora is not None and bool(lora.targets)
    if lora is not None:
        _check_switches(lora, named)
        followed: dict[str, Part] = {"audio": "off", "projector": "off"}
        followed |= {part: "lora" if _switched_on(lora, part) else "off" for part in ("language", "vision")}
    else:
        rest: Part = "full" if set(named.values()) <= {"off"} else "off"
        followed = dict.fromkeys(PARTS, rest)
    parts = Parts(**{**followed, **named}, given=frozenset(named), by_name=by_name)  # type: ignore[arg-type]
    _check_together(parts, lora, load_in_4bit)
    return parts


def _switched_on(lora: LoraOptions, part: str) -> bool:
    return not lora.targets and getattr(lora, part)


def _check_switches(lora: LoraOptions, named: Mapping[str, Part]) -> None:
    for part, value in named.items():
        if lora.targets and value == "lora":
            raise ConfigError(
                f'{part}="lora" and lora.targets both choose adapters. Drop lora.targets, or drop {part} and name its '
                "layers in lora.targets."
            )
        asked = part in lora.model_fields_set and not lora.targets
        if asked and (value == "lora") != getattr(lora, part):
            raise ConfigError(
                f'{part}="{value}" and lora.{part}={str(getattr(lora, part)).lower()} are both given. Keep one of them.'
            )


def _check_together(parts: Parts, lora: LoraOptions | None, load_in_4bit: bool) -> None:
    if lora is not None and not parts.adapted and not parts.chosen("full"):
        raise ConfigError(
            f"lora: nothing would be trained with vision={lora.vision}, language={lora.language}; switch on a tower, "
            "or give targets."
        )
    if not parts.adapted and not parts.chosen("full"):
        raise ConfigError("Nothing would be trained: every part is off. Set one to lora or full.")
    if parts.language == "full" and lora is not None:
        named = ", ".join(f'{part}="lora"' for part in parts.chosen("lora"))
        others = named or ("lora.targets" if parts.by_name else "lora")
        raise ConfigError(
            f'language="full" beside {others}: an adapter is kept apart from a base model that stays as it is. Train '
            "all of the parts in full, or the language model by LoRA."
        )
    if parts.language == "full" and load_in_4bit and parts.given:
        raise ConfigError(
            'language="full" with load_in_4bit: 4-bit weights cannot be trained themselves. Use language="lora", or '
            "load without 4-bit."
        )
