"""PEFT: which adapters a layer computes with, kept and put back; also when a checkpointed layer is computed again."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from .ledger import Patch

# A layer, the adapters it computes with, and whether they are off.
Standing = tuple[Any, Any, bool]

_FUNCTION = "_gradient_checkpointing_func"


def tuners(model: Any) -> list[Any]:
    """The layers with adapters and the wrappers of whole modules, within a model or a part of it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def standings(layers: Iterable[Any]) -> list[Standing]:
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]


def put_back(before: list[Standing]) -> None:
    """By the attributes themselves: PEFT's methods also set which weights require a gradient."""
    for layer, active, off in before:
        layer._active_adapter, layer._disable_adapters = active, off


# ---- computed again --------------------------------------------------------------------------------------------------


class _InItsRole(functools.partial):
    """A module's checkpointing function, whose layers are computed again with the adapters of their forward.

    It is the partial that it stands for: others look at ``func`` and ``keywords``.
    """

    module: Any
    __wrapped__: Any

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        then = standings(tuners(self.module))
        return super().__call__(functools.partial(_standing, function, then) if then else function, *args, **kwargs)


def _standing(function: Callable[..., Any], then: list[Standing], /, *args: Any, **kwargs: Any) -> Any:
    now = standings(layer for layer, *_ in then)
    if now == then:
        return function(*args, **kwargs)
    put_back(then)
    try:
        return function(*args, **kwargs)
    finally:
        put_back(now)


class _Remembering:
    """In the place of an attribute of the modules of a class. What is written stays as it is, reading wraps it.

    So whoever sets another function, at any time, cannot switch it off, and a copy of a model needs nothing of its own.
    """

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        if _FUNCTION not in vars(module):
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {_FUNCTION!r}")
        checkpoint = vars(module)[_FUNCTION]
        if checkpoint is None:
            return None
        # Unsloth asks a function for its module.
        wrapped: Any = functools.update_wrapper(_InItsRole(checkpoint), checkpoint, updated=())
        wrapped.module = module
        return wrapped

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[_FUNCTION] = value.__wrapped__ if isinstance(value, _InItsRole) else value

    def __delete__(self, module: Any) -> None:
        del vars(module)[_FUNCTION]


_OWNERS: list[type] = []  # the classes whose modules remember


def remember(model: Any) -> None:
    """Let every module of a model that checkpoints remember, those too whose classes are not transformers'."""
    REMEMBERED_ROLES.apply()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            _install(type(module))


def _install(owner: type) -> None:
    if not isinstance(getattr(owner, _FUNCTION, None), _Remembering):
        setattr(owner, _FUNCTION, _Remembering())
        _OWNERS.append(owner)


def _apply() -> None:
    from transformers import modeling_layers

    if not hasattr(modeling_layers, "GradientCheckpointingLayer"):
        raise RuntimeError("transformers has no GradientCheckpointingLayer any more: checkpointing changed.")
    _install(modeling_layers.GradientCheckpointingLayer)


def _undo() -> None:
    while _OWNERS:
        delattr(_OWNERS.pop(), _FUNCTION)


def _forgets_roles() -> bool | None:
    """Two adapters on a toy layer: the gradient of the one in a checkpointed forward, the other active in backward."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Layer(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden)

    layer: Any = Layer()
    with torch.random.fork_rng(devices=[]):
        config = LoraConfig(r=1, target_modules=["linear"])
        get_peft_model(layer, config, "one").add_adapter("two", config)
    weight = layer.linear.lora_B["one"].weight.requires_grad_(True)
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    layer.linear._active_adapter = ["one"]
    loss = layer(torch.ones(1, 1, requires_grad=True))
    layer.linear._active_adapter = ["two"]
    loss.sum().backward()
    return weight.grad is None


REMEMBERED_ROLES = Patch(
    name="peft-remembered-roles",
    why="A checkpointed layer is computed again in backward with whichever adapter is active by then: the gradients of "
    "two adapters on one base, as of a policy and its values, are wrong without a word.",
    reference="transformers.modeling_layers.GradientCheckpointingLayer, peft.tuners.tuners_utils.BaseTunerLayer",
    remove_when="PEFT or transformers computes checkpointed layers again with the adapters of their forward.",
    probe=_forgets_roles,
    in_place=lambda: bool(_OWNERS),
    apply=_apply,
    undo=_undo,
)
PATCHES = [REMEMBERED_ROLES]
