"""Several adapters on one base, each in a role: ``default`` (the policy), ``ref``, ``reward`` and ``value``.

PEFT's own ways of switching set which weights require a gradient, of every adapter: whoever scores with a frozen one
thaws it, and leaves the trained ones frozen. Here a role is a place in the code that changes which adapter computes,
and nothing else.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from ..errors import ConfigError, UnsupportedError, nearest
from ..patches.peft import put_back, remember, standings, tuners
from ..randomness import same_random_states
from . import is_adapter, looks_like_path
from .dtypes import floating_dtype, keep_float32
from .heads import heads_of
from .wrappers import is_peft_model

POLICY = "default"
# By model, its frozen adapters that lie in a run folder of their own.
_LOADED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


# ---- which adapter computes ------------------------------------------------------------------------------------------


@contextmanager
def role(model: Any, name: str | None) -> Iterator[None]:
    """Within it the model computes with one adapter; behind it, with those from before, also after an exception.

    Which weights require a gradient changes neither within nor behind it. A module that was trained in full beside
    another adapter is the base's own here.

    Args:
        model: PEFT's.
        name: of the adapter; None for the base alone.

    Raises:
        ConfigError: there is no such adapter.
        UnsupportedError: an adapter is merged into the base.
    """
    if name is not None and name not in model.peft_config:
        known = list(model.peft_config)
        raise ConfigError(f"The model has no adapter {name!r}, it has {', '.join(known)}.{nearest(name, known)}")
    layers = tuners(model)
    if any(getattr(layer, "merged", False) for layer in layers):
        raise UnsupportedError(
            f"role({name!r}): an adapter is merged into the base. Call model.unmerge_adapter() first."
        )
    before, outer = standings(layers), _outer(model)
    try:
        if name is None:
            put_back([(layer, active, True) for layer, active, _ in before])
            model._adapters_disabled = True
        else:
            put_back([(layer, _active(layer, name), False) for layer in layers])
            model.active_adapter = model.base_model.active_adapter = name
            model._adapters_disabled = False
        yield
    finally:
        put_back(before)
        _put_back_outer(model, outer)


def _active(layer: Any, name: str) -> Any:
    """As PEFT writes it on a layer, or on a wrapper of a whole module."""
    if _is_layer(layer):
        return [name]
    return name if name in layer._adapters else []


def _is_layer(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer)


def _is_whole(module: Any) -> bool:
    """Whether it stands for a module of which each adapter may have a copy of its own."""
    return isinstance(module, ModulesToSaveWrapper)


def _outer(model: Any) -> tuple[Any, ...]:
    return model.active_adapter, model.base_model.active_adapter, model._adapters_disabled


def _put_back_outer(model: Any, outer: tuple[Any, ...]) -> None:
    model.active_adapter, model.base_model.active_adapter, model._adapters_disabled = outer


@contextmanager
def kept_flags(model: Any) -> Iterator[None]:
    """Behind it, the same weights require a gradient and the same adapters are active, whatever PEFT or TRL did within.

    Weights that are new keep what they were given.

    Args:
        model: PEFT's; with any other, nothing happens.
    """
    if not is_peft_model(model):
        yield
        return
    flags = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
    before, outer = standings(tuners(model)), _outer(model)
    try:
        yield
    finally:
        put_back(before)
        _put_back_outer(model, outer)
        _stand_alike(model, {id(layer) for layer, *_ in before})
        _put_back_flags(model, flags)


def _stand_alike(model: Any, known: set[int]) -> None:
    """Layers that have come to adapters meanwhile compute with the model's active ones too."""
    active = model.active_adapters
    for layer in tuners(model):
        if id(layer) not in known and _is_layer(layer):
            put_back([(layer, list(active), model._adapters_disabled)])
        elif id(layer) not in known:
            own = [name for name in active if name in layer._adapters]
            put_back([(layer, own[0] if own else [], model._adapters_disabled)])


def _put_back_flags(model: Any, flags: list[tuple[str, nn.Parameter, bool]]) -> None:
    # A weight may have another name by now (its layer has got an adapter), or be another object (it was cast).
    objects = {id(parameter): flag for _, parameter, flag in flags}
    names = {name: flag for name, _, flag in flags}
    for name, parameter in model.named_parameters():
        flag = objects.get(id(parameter), names.get(name, parameter.requires_grad))
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def active_adapters(model: Any) -> set[str]:
    """The adapters that compute now; none where they are off.

    Args:
        model: PEFT's, or what is inside of it.
    """
    return {name for layer in tuners(model) if not layer.disable_adapters for name in layer.active_adapters}


def remember_roles(model: Any) -> None:
    """Let checkpointed layers be computed again with the adapters that were active in their forward.

    Backward computes them with whichever is active by then, so that a loss may be backpropagated behind its ``role``.
    Holds for both kinds of checkpointing and Unsloth's, and through ``gradient_checkpointing_enable`` later on.

    Args:
        model: PEFT's.
    """
    remember(model)


# ---- another adapter -------------------------------------------------------------------------------------------------


def copy_adapter(model: Any, source: str, name: str, trainable: bool = False) -> None:
    """Add an adapter that is exactly another one: values, number types, modules that are trained in full.

    A frozen copy has no dropout: what it says is the same each time. The active adapter and flags stay as they are.

    Args:
        model: PEFT's.
        source: the adapter to copy.
        name: of the new one.
        trainable: whether it requires a gradient.

    Raises:
        ConfigError: no such source, or the name is taken.
        UnsupportedError: a module of the model has the same name, which PEFT would confuse.
    """
    if source not in model.peft_config:
        known = list(model.peft_config)
        raise ConfigError(f"The model has no adapter {source!r} to copy, it has {', '.join(known)}.")
    _check_name(model, name)
    config = copy.deepcopy(model.peft_config[source])
    with _adding(model, name, config, trainable):
        for layer in tuners(model):
            for attribute in layer.adapter_layer_names:
                own = attrgetter(attribute)(layer)
                if source in own and _is_whole(layer):
                    own[name] = copy.deepcopy(own[source])  # with the hooks that a copy in float32 has
                elif source in own:
                    _copy_values(own[source], own[name])
            if source in getattr(layer, "scaling", {}):
                layer.scaling[name] = layer.scaling[source]


def _copy_values(source: Any, target: Any) -> None:
    single = isinstance(source, nn.Parameter)
    ones, others = ([source], [target]) if single else (source.parameters(), target.parameters())
    for one, other in zip(ones, others, strict=True):
        other.data = one.detach().clone()


def load_role(model: Any, folder: str | Path, name: str, trainable: bool = False) -> None:
    """Add the adapter of a run folder under another name; rank and layers may be others than those of ``default``.

    A frozen one has no dropout. The active adapter and flags stay as they are.

    Args:
        model: PEFT's, on the base that the adapter was trained on.
        folder: holds the adapter.
        name: of the adapter here.
        trainable: whether it requires a gradient.

    Raises:
        ConfigError: no adapter there, one that cannot be read, of another base or that does not fit, a name taken.
        UnsupportedError: a module of the model has the same name, which PEFT would confuse.
    """
    from .hf import adapter_base

    path = str(Path(folder).expanduser().resolve())
    if not is_adapter(path):
        raise ConfigError(f"{folder} holds no adapter (adapter_config.json). Give the folder of a finished run.")
    _check_name(model, name)
    theirs, ours = adapter_base(path), base_of(model)
    if theirs != ours:
        raise ConfigError(
            f"{folder}: its adapter was trained on {theirs}, but this model stands on {ours}. "
            "Load it with a model of its own, or give one that was trained on the same base."
        )
    try:
        config = PeftConfig.from_pretrained(path)
        mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
        weights = load_peft_weights(path, device="cpu", key_mapping=mapping)
        with _adding(model, name, config, trainable):
            wide = _widen_copies(model, name)
            found = set_peft_model_state_dict(model, weights, adapter_name=name)
            missing = [key for key in found.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
            if missing or found.unexpected_keys:
                raise ValueError(f"{min([*missing, *found.unexpected_keys])} is in one of the two only")
            assert all(floating_dtype(module) == torch.float32 for module in wide), "copies are in float32"
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")[:200]
        raise ConfigError(
            f"{folder}: its adapter does not fit this model ({reason}). Check that it is whole."
        ) from error
    if not trainable:
        _LOADED.setdefault(model, set()).add(name)


def loaded_roles(model: Any) -> set[str]:
    """The frozen adapters that ``load_role`` put on a model: their own folder says what they are, no checkpoint."""
    return _LOADED.get(model, set()) & model.peft_config.keys()


def _widen_copies(model: Any, name: str) -> list[nn.Module]:
    """Modules in full beside a half-precision base, in float32 before their values come: none is rounded."""
    wide = []
    for layer in tuners(model):
        if _is_whole(layer) and name in layer.modules_to_save:
            keep_float32(layer.modules_to_save[name], floating_dtype(layer.original_module))
            wide.append(layer.modules_to_save[name])
    return wide


@contextmanager
def _adding(model: Any, name: str, config: PeftConfig, trainable: bool) -> Iterator[None]:
    """An adapter that is new within it; gone behind it where that fails, else in its flags and modes."""
    config.inference_mode = not trainable
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # others compute it from the base's weights, or change those
        if not trainable:
            config.lora_dropout = 0.0
    known = {id(module) for module in model.modules()}
    with kept_flags(model), same_random_states():
        try:
            model.add_adapter(name, config)
            yield
        except BaseException:
            if name in model.peft_config:
                model.delete_adapter(name)
            raise
    for layer in tuners(model):
        if _is_layer(layer):
            for module in layer.modules():
                if id(module) not in known:
                    module.training = layer.get_base_layer().training
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)


def _check_name(model: Any, name: str) -> None:
    if name in model.peft_config:
        raise ConfigError(f"The model has an adapter {name!r} already. Give another name, or delete_adapter({name!r}).")
    for path, _ in model.get_base_model().named_modules():
        parts = path.split(".")
        # Within a layer's own containers it is the name of an adapter, such as one that was deleted.
        if name in parts and not any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            raise UnsupportedError(
                f"An adapter {name!r} cannot stand on {type(model.get_base_model()).__name__}, whose module {path} has "
                "the same name: PEFT would take one for the other. Use a model of its own for that role."
            )


# ---- what a model holds ----------------------------------------------------------------------------------------------


def adapter_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """The weights of one adapter, modules trained in full included; its head is not."""
    found: list[nn.Parameter] = []
    for layer in tuners(model):
        for attribute in layer.adapter_layer_names:
            own = attrgetter(attribute)(layer)
            if name in own:
                found += [own[name]] if isinstance(own[name], nn.Parameter) else list(own[name].parameters())
    return found


def parameters_by_role(model: Any) -> dict[str, int]:
    """How many parameters the base has, and each role with its head; a tensor is counted once. 4-bit ones are unpacked.

    Args:
        model: PEFT's.
    """
    heads = heads_of(model)
    owners: dict[int, str] = {}
    for name in model.peft_config:
        own = [*adapter_parameters(model, name), *(heads[name].parameters() if name in heads else ())]
        owners |= {id(parameter): name for parameter in own}
    counts = dict.fromkeys(["base", *model.peft_config], 0)
    for parameter in model.parameters():  # gives a shared one once
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        counts[owners.get(id(parameter), "base")] += torch.Size(shape).numel()
    return counts


def base_of(model: Any) -> str | None:
    """What a PEFT model stands on: an absolute folder, or a name on the Hub; None where nothing says so.

    Of a run that started from another run's merged adapter it is that run's folder, as its own adapter says.
    """
    config = model.peft_config.get(POLICY) or next(iter(model.peft_config.values()))
    written = config.base_model_name_or_path or ""
    loaded = getattr(model.get_base_model(), "name_or_path", "") or ""
    path, own = Path(written).expanduser(), Path(loaded)
    if written and path.is_absolute() and path.is_dir():
        return str(path.resolve())
    relative = not written or looks_like_path(written) or "/" not in written  # to a folder that is not known here
    if relative and loaded and own.is_dir():
        return str(own.resolve())
    return None if not written or looks_like_path(written) else written


def check_policy_adapter(model: Any) -> None:
    """Refuse a PEFT model whose policy is not the adapter ``default``: TRL copies that one alone for its reference.

    Any other model is fine.

    Raises:
        ConfigError: there is no adapter of that name, or another one is active.
    """
    if not is_peft_model(model):
        return
    known = list(model.peft_config)
    if POLICY not in known:
        raise ConfigError(
            f"The model's adapter is called {', '.join(map(repr, known))}, but the policy's must be called {POLICY!r}. "
            f'Make it by get_peft_model(..., adapter_name="{POLICY}"), or load it by load_model(FOLDER).'
        )
    active = model.active_adapters
    if list(active) != [POLICY]:
        raise ConfigError(
            f"The model's active adapter is {', '.join(map(repr, active))}, but the policy's is {POLICY!r}, which "
            f'alone is the reference and the result. Call model.set_adapter("{POLICY}").'
        )
