"""How a model stands: ready to answer for a while, then exactly as it was, also after an exception."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..patches.unsloth_modes import MODULE_FLAGS, infer, pinned, same_environment, tokenizers_of
from .wrappers import plain_model

_FLAGS = ("training", "gradient_checkpointing", "_gradient_checkpointing_func", *MODULE_FLAGS)
_ABSENT: Any = object()


@contextmanager
def inference_mode(model: Any, *generation_configs: Any, keep_dropout: bool = False) -> Iterator[None]:
    """Within it, the model generates: with a cache, without checkpointing, in Unsloth's inference mode if it has one.

    Args:
        model: with or without adapters and wrappers.
        generation_configs: others than the model's own that are given to ``generate``, which may write on them.
        keep_dropout: leave a model of transformers in the mode it has, so that a trainer's rollout draws what it would
            otherwise draw. Its checkpointing is then the caller's to switch off.
    """
    with restored(model, *generation_configs), pinned_forward(model):
        if not infer(model) and not keep_dropout:
            model.eval()
            _no_checkpointing(model)
        yield


def pinned_forward(model: Any) -> AbstractContextManager[None]:
    """Within it, forwards do what their arguments say, whatever Unsloth's environment variables ask for.

    Raises:
        UnsupportedError: from a forward whose logits are not over the vocabulary.
    """
    return pinned(plain_model(model))


@contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Within it, forwards keep what they compute: where nothing is recorded, checkpointing is work for nothing."""
    with restored(model):
        _no_checkpointing(model)
        yield


@contextmanager
def restored(model: Any, *generation_configs: Any) -> Iterator[None]:
    """After it, every module's mode and checkpointing, caches, padding sides and Unsloth's switches are as before.

    Libraries switch them by methods of the whole model, which cannot know what a module had: what Unsloth's
    checkpointing was set to, or that a tower was in evaluation.
    """
    modules = [(module, {name: vars(module).get(name, _ABSENT) for name in _FLAGS}) for module in model.modules()]
    caches = [(config, vars(config).get("use_cache", _ABSENT)) for config in _configs(model)]
    own = [vars(module).get("generation_config") for module, _ in modules]
    generation = [(config, dict(vars(config))) for config in (*own, *generation_configs) if config is not None]
    sides = [(tokenizer, tokenizer.padding_side) for tokenizer in tokenizers_of(model)]
    with same_environment():
        try:
            yield
        finally:
            for module, flags in modules:
                for name, value in flags.items():
                    _put_back(module, name, value)
            for config, value in caches:
                _put_back(config, "use_cache", value)
            for config, values in generation:
                vars(config).clear()
                vars(config).update(values)
            for tokenizer, side in sides:
                tokenizer.padding_side = side


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(owner).pop(name, None)
    elif vars(owner).get(name, _ABSENT) is not value:
        setattr(owner, name, value)


def _no_checkpointing(model: Any) -> None:
    for module in model.modules():
        if vars(module).get("gradient_checkpointing"):
            module.gradient_checkpointing = False


def _configs(model: Any) -> list[Any]:
    """The configurations of the model's parts, and those in them, once each."""
    found: dict[int, Any] = {}
    waiting = [config for module in model.modules() if hasattr(config := vars(module).get("config"), "to_dict")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            inner = [vars(config).get(name) for name in getattr(config, "sub_configs", {})]
            waiting += [part for part in inner if hasattr(part, "to_dict")]
    return list(found.values())
