"""Parts of a model made trainable: by adapters, in full, or not at all; the same on every backend.

Where the language model is trained in full, the chosen parts of the model itself require a gradient. Else the base
stays as it is, and a part that is trained in full is a copy of its modules that PEFT keeps beside it
(``modules_to_save``): checkpoints stay small, 4-bit bases work, and saving, resuming, merging and the reference with
adapters off treat the copies as they treat adapters.
"""

import logging
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..parts import PARTS, Parts
from .dtypes import floating_dtype, keep_float32
from .families import Family, family_of, is_target, lora_targets, tower_of

if TYPE_CHECKING:
    from ..config import LoraOptions

_LOG = logging.getLogger("vlm_grpo")


def adapter_config(model: Any, lora: "LoraOptions", parts: Parts) -> LoraConfig:
    """PEFT's configuration for the parts as chosen.

    Raises:
        ConfigError: the model has no such part, or no layer that could be adapted.
        UnsupportedError: a part to train in full has 4-bit weights.
    """
    family = family_of(model.config)
    check_parts(model, family, parts)
    full, strays = whole_modules(model, family, parts.chosen("full"))
    if strays:
        _LOG.warning("%s stay(s) frozen: beside adapters whole modules are trained, not weights between them.", strays)
    shared: dict[str, Any] = {"bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": full or None}
    if not parts.adapted:
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, **shared)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora_alpha(lora),
        lora_dropout=lora.dropout,
        target_modules=adapter_targets(model, family, lora, parts),
        **shared,
    )


def lora_alpha(lora: "LoraOptions") -> Any:
    """The scale of the adapters as PEFT writes it: an integer where it is one."""
    return int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha


def adapter_targets(model: Any, family: Family, lora: "LoraOptions", parts: Parts) -> str | list[str]:
    """What PEFT's ``target_modules`` should be: ``lora.targets``, or one expression for the parts with adapters.

    Raises:
        ConfigError: a part or an entry of ``lora.targets`` has no layer to adapt.
    """
    adapted = parts.chosen("lora")
    towers = [part for part in adapted if part != "projector"]
    found = [lora_targets(family, model, lora, towers)] if lora.targets or towers else []
    if lora.targets:
        return found[0]
    if "projector" in adapted:
        found.append("|".join(re.escape(name) for name in _projector_layers(family, model)))
    return "|".join(map(str, found))


def _projector_layers(family: Family, model: Any) -> list[str]:
    """The linear layers of the projector, as they are named without adapters."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear)
        and tower_of(family, name) == "projector"
        and not name.endswith(".base_layer")
        and ".lora_" not in name
    ]
    if not found:
        raise ConfigError(
            f'projector="lora": model type {family.model_type!r} has no projector with linear layers. Use "full".'
        )
    return found


def check_parts(model: Any, family: Family, parts: Parts) -> None:
    """Refuse parts that the model does not have, and 4-bit weights to be trained in full.

    Raises:
        ConfigError, UnsupportedError: see above.
    """
    towers = {name: tower_of(family, name) for name, _ in model.named_parameters()}
    for part in PARTS:
        value = getattr(parts, part)
        if value != "off" and part in parts.given and part not in towers.values():
            raise ConfigError(
                f'{part}="{value}": model type {family.model_type!r} has no part of that name. Set {part} to off.'
            )
    for name, parameter in model.named_parameters():
        if towers[name] in parts.chosen("full") and parts.given and not parameter.is_floating_point():
            raise UnsupportedError(
                f'{towers[name]}="full": its weights are 4-bit in this checkpoint ({name}), which cannot be trained '
                f'themselves. Use {towers[name]}="lora", or a checkpoint that is not 4-bit.'
            )


def whole_modules(model: nn.Module, family: Family, parts: Collection[str]) -> tuple[list[str], list[str]]:
    """``(paths, strays)``: the largest modules that belong to one of the parts alone, and the weights between them.

    Largest, so that a copy computes as much by itself as it can; never a mere container, and never one that names
    another part, such as the projector within a tower.
    """
    paths: list[str] = []
    strays: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        found = {tower_of(family, name) for name, _ in module.named_parameters(path)}
        if not found & set(parts):
            return
        computes = type(module).forward is not nn.Module.forward
        if path and computes and len(found) == 1 and tower_of(family, path) in found:
            paths.append(path)
            return
        strays.extend(
            name for name, _ in module.named_parameters(path, recurse=False) if tower_of(family, name) in parts
        )
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return paths, strays


def train_in_place(model: Any, parts: Parts) -> None:
    """Let exactly the parts chosen in full require a gradient, of a model without adapters.

    What belongs to no part (of a model that is not in the table) is trained where every part is.

    Raises:
        ConfigError: the model has no such part.
        UnsupportedError: 4-bit weights.
    """
    family, full = family_of(model.config), parts.chosen("full")
    check_parts(model, family, parts)
    towers = {name: tower_of(family, name) for name, _ in model.named_parameters()}
    everything = set(towers.values()) <= {*full, "other"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(towers[name] in full or everything)


def finish_copies(model: Any, folder: str | None = None) -> None:
    """Let the fully trained copies beside a base require a gradient, in float32.

    Args:
        model: PEFT's.
        folder: the adapter they were loaded from, whose values a half-precision copy has rounded.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    rounded = any(floating_dtype(wrapper.modules_to_save["default"]) != torch.float32 for wrapper in wrappers)
    for wrapper in wrappers:
        copy = wrapper.modules_to_save["default"].requires_grad_(True)
        keep_float32(copy, floating_dtype(wrapper.original_module))
    if folder is not None and rounded:
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))


def finish_reference_copies(model: Any, adapter: str = "ref") -> None:
    """Give a reference that was copied from the trained adapter the copies of modules as they are trained, in float32.

    PEFT copies the base's modules, in the base's number type: in half precision the reference would be rounded, and
    differ from the policy before the first update.

    Args:
        model: PEFT's, before anything was trained; any other is left alone.
        adapter: the reference's name.
    """
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        copies = wrapper.modules_to_save
        if adapter in copies and floating_dtype(copies[adapter]) != floating_dtype(copies["default"]):
            keep_float32(copies[adapter], floating_dtype(wrapper.original_module))
            copies[adapter].load_state_dict(copies["default"].state_dict())


def adapted_parts(model: Any) -> dict[str, str]:
    """How PEFT's model trains each part: ``off``, ``lora`` or ``full``."""
    family = family_of(model.config)
    found: dict[str, str] = {part: "off" for part in PARTS}
    for name, _ in model.named_parameters():
        way = "full" if ".modules_to_save." in name else "lora" if ".lora_" in name else ""
        tower = tower_of(family, name)
        if way and found.get(tower) in ("off", "lora"):
            found[tower] = way
    return found


def check_same_adapter(folder: str, model: Any, lora: "LoraOptions | None", parts: Parts) -> None:
    """Raise ``ConfigError`` when the options would train otherwise than the adapter that was loaded."""
    found, differ = adapted_parts(model), []
    if lora is not None:
        saved = model.peft_config["default"]
        for name, attribute in (("r", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
            here, there = getattr(lora, name), getattr(saved, attribute, None)
            if here != there:
                differ.append(f"lora.{name} is {here} but {there} in the adapter")
    for part in PARTS if lora is not None else sorted(parts.given):
        here, there = getattr(parts, part), found[part]
        if here != there and not (parts.by_name and {here, there} == {"off", "lora"}):
            differ.append(f"{part} is {here} but {there} in the adapter")
    if lora is not None and parts.adapted:
        differ += _other_modules(model, lora, parts)
    if differ:
        raise ConfigError(
            f"{folder}: {'; '.join(differ)}. Leave that out to continue this adapter, or start from its base model."
        )


def _other_modules(model: Any, lora: "LoraOptions", parts: Parts) -> list[str]:
    base = model.get_base_model()
    targets = adapter_targets(base, family_of(model.config), lora, parts)
    if targets == "all-linear":
        return []
    # Within what is trained in full, PEFT puts no adapter.
    names = {n: m for n, m in base.named_modules() if ".modules_to_save." not in n and ".original_module" not in n}
    chosen = {name for name in names if is_target(name, targets)}
    adapted = {name for name, module in names.items() if hasattr(module, "lora_A")}
    if chosen == adapted:
        return []
    example = min(chosen ^ adapted)
    where = "chosen here only" if example in chosen else "in the adapter only"
    return [f"the options choose {len(chosen)} modules but the adapter has {len(adapted)} ({example}: {where})"]
