"""Media encoded once: what frozen towers made of a prompt's media, kept as long as the prompt is in use."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ..collate import pad_and_concatenate
from ..encode import EncodedPrompt
from ..models.adapters import active_adapters
from ..models.families import Family, tower_of
from ..models.heads import HEADS
from ..patches.transformers import answered_by

Key = tuple[str, int]  # which encoder, and the how many-th call of it in a forward


class _Reached(BaseException):
    """The first layer of the language model was reached: all media are encoded."""


class Features:
    """Answers for the encoders of a model while their towers are frozen.

    An encoder is a method of the model (``get_image_features``) or of a tower. A trained tower answers for itself, with
    its gradient.

    Args:
        model: the plain model, adapters included, not PEFT's wrapper.
        family: its row of the table.
        autocast: the precision that training runs in; generation then sees the same features.
    """

    def __init__(self, model: Any, family: Family, autocast: Callable[[], AbstractContextManager]) -> None:
        self.model, self.family, self.autocast = model, family, autocast
        self.known: WeakKeyDictionary[EncodedPrompt, dict[Key, Any]] = WeakKeyDictionary()
        self.encodes = 0  # prompts whose media were encoded, an encoder at a time
        self._calls: dict[str, int] = {}
        self._busy = False
        self._places: dict[str, tuple[str, str | None]] = {}  # by parameter, its tower and adapter
        self._settled: tuple[str, ...] | None = None

    def frozen(self) -> tuple[str, ...]:
        """The encoders whose towers are the base's as they are: not trained, and without an adapter or copy that is
        active now. A reward model's, or the policy's, does not count while another role computes."""
        return self._frozen() if self._settled is None else self._settled

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within it, forwards of one role: what is frozen is looked up once, which looks at every parameter."""
        before = self._settled
        self._settled = self.frozen()
        try:
            yield
        finally:
            self._settled = before

    def _frozen(self) -> tuple[str, ...]:
        towers: dict[str, bool] = {}
        active = active_adapters(self.model)
        for name, parameter in self.model.named_parameters():
            if name.startswith(f"{HEADS}."):
                continue  # a head reads hidden states, no medium
            if name not in self._places:
                self._places[name] = tower_of(self.family, name), _adapter_of(name)
            tower, adapter = self._places[name]
            kept = not parameter.requires_grad if adapter is None else adapter not in active
            towers[tower] = towers.get(tower, True) and kept
        return tuple(
            path
            for path in self.family.encoders
            if towers.get("audio" if "audio" in path else "vision", False)
            and towers.get("projector", True)
            and towers.get("other", True)  # of a model that is not in the table, it may be the projector
        )

    def kept(self, encodings: list[EncodedPrompt]) -> list[bool]:
        """Of each prompt, whether any medium is encoded by a frozen tower."""
        senses = {"audio" if "audio" in path else "vision" for path in self.frozen()}
        return [not senses.isdisjoint(encoded.senses) for encoded in encodings]

    @contextmanager
    def of(self, encodings: list[EncodedPrompt]) -> Iterator[None]:
        """Within it, the media of a forward are those of ``encodings``, in this order, each encoded once."""
        with ExitStack() as stack:
            for path in self.frozen():
                owner, name = self._owner(path)
                if owner is not None:
                    answer = self._answer(path, getattr(owner, name), encodings)
                    stack.enter_context(answered_by(owner, name, answer))
            self._calls = {}
            yield

    def _owner(self, path: str) -> tuple[Any, str]:
        """The module that has the method; ``None`` where this model has none of that name."""
        *parts, name = path.split(".")
        for owner in dict.fromkeys((self.model.base_model, self.model)):
            for part in parts:
                owner = getattr(owner, part, None)
            if callable(getattr(owner, name, None)):
                return owner, name
        return None, name

    def _answer(self, path: str, encoder: Callable[..., Any], encodings: list[EncodedPrompt]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            if self._busy:  # an encoder that asks another one, as some do for the frames of a video
                return encoder(*args, **kwargs)
            self._busy = True
            try:
                return self._lookup(path, lambda: encoder(*args, **kwargs), encodings)
            finally:
                self._busy = False

        return answer

    def _lookup(self, path: str, encode: Callable[[], Any], encodings: list[EncodedPrompt]) -> Any:
        number = self._calls.get(path, 0)
        self._calls[path] = number + 1
        key = (path, number)
        if len(encodings) == 1:
            if key not in self.known.get(encodings[0], {}):
                with torch.inference_mode(False), torch.no_grad(), self.autocast():
                    output = _kept(encode())
                self.known.setdefault(encodings[0], {})[key] = output
                self.encodes += 1
            return _copied(self.known[encodings[0]][key])
        return joined([self.known[e][key] for e in encodings if key in self.known.get(e, {})])

    def encode(self, encodings: list[EncodedPrompt], inputs_of: Callable[[int], dict[str, Any]]) -> None:
        """Encode the media of prompts that are about to share a forward, each prompt by itself.

        Args:
            encodings: the prompts.
            inputs_of: the model's arguments for the prompt of this number.
        """
        if len(encodings) < 2:
            return
        for number, (encoded, kept) in enumerate(zip(encodings, self.kept(encodings), strict=True)):
            if encoded not in self.known and kept:
                with torch.no_grad(), self.of([encoded]), self.up_to_first_layer():
                    self.model(**inputs_of(number), use_cache=False)
                self.known.setdefault(encoded, {})

    @contextmanager
    def up_to_first_layer(self) -> Iterator[None]:
        """Within it, a forward ends where media are encoded and masks are made, and so does the ``with``."""
        handle = self.model.get_decoder().layers[0].register_forward_pre_hook(_stop)
        try:
            yield
        except _Reached:
            pass
        finally:
            handle.remove()


def _adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, a copy of a whole module included; None of the base's own."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part == "modules_to_save" or part.startswith("lora_")]
    return parts[places[0] + 1] if places else None


def _stop(module: Any, args: Any) -> None:
    raise _Reached


def joined(outputs: list[Any]) -> Any:
    """What an encoder returns for several prompts together, from what it returned for each.

    Tensors are concatenated on dimension 0, lists of one entry a medium are put behind each other, and of lists of one
    entry a layer (``deepstack``) each entry is concatenated.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return pad_and_concatenate(outputs)
    if isinstance(first, ModelOutput):
        values = [vars(output) for output in outputs]
        return _output(type(first), {name: _field(name, [value[name] for value in values]) for name in values[0]})
    if isinstance(first, (list, tuple)):
        return type(first)(item for output in outputs for item in output)
    raise TypeError(f"an encoder returned a {type(first).__name__}")


def _field(name: str, values: list[Any]) -> Any:
    if values[0] is None:
        return None
    if "deepstack" in name:
        return type(values[0])(torch.cat(layer) for layer in zip(*values, strict=True))
    return joined(values)


# What lies before the projector: nobody reads it behind one, and it is larger than all the rest.
_BEFORE_PROJECTOR = {"last_hidden_state", "hidden_states", "attentions"}


def _kept(output: Any) -> Any:
    """What is kept of an encoder's output."""
    if getattr(output, "pooler_output", None) is None:
        return output
    values = vars(output)
    return _output(type(output), {**values, **dict.fromkeys(_BEFORE_PROJECTOR & values.keys())})


def _copied(output: Any) -> Any:
    """For a model to write on."""
    return _output(type(output), vars(output)) if isinstance(output, ModelOutput) else copy.copy(output)


def _output(kind: type, values: dict[str, Any]) -> Any:
    """An output of this class: some encoders write on theirs what it has no field for."""
    declared = {field.name for field in fields(kind)}
    output = kind(**{name: value for name, value in values.items() if name in declared})
    for name in values.keys() - declared:
        setattr(output, name, values[name])
    return output
