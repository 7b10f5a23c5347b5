"""Scalar heads: one number a token from the last layer's hidden states, for reward models and for values.

A head belongs to the adapter of the same name, is registered on the model beside the adapters, and is saved beside them
as ``head.safetensors``: at the folder's root for ``default``, in the folder of the adapter's name for any other.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError

HEAD_FILE = "head.safetensors"
HEADS = "scalar_heads"
_OWN = "default"


class ScalarHead(nn.Module):
    """A linear map to one number, in float32 whatever the model computes in.

    Its bias begins at zero, its weights at a spread of 1 / sqrt(H + 1) (Stiennon et al. 2020, appendix B.1).

    Args:
        hidden_size: H.
        zero: begin with weights of zero too, so that every value is 0.
        device: where it lies.
    """

    def __init__(self, hidden_size: int, zero: bool = False, device: Any = None) -> None:
        super().__init__()
        spread = 0.0 if zero else (hidden_size + 1) ** -0.5
        self.weight = nn.Parameter((torch.randn(1, hidden_size) * spread).to(device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to numbers (...)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)[..., 0]


def add_head(model: Any, role: str = _OWN, zero: bool = False) -> ScalarHead:
    """A new head on the model for an adapter's role; in the place of one that is there.

    Args:
        model: PEFT's, or a plain one; the outermost that is not a wrapper of DDP.
        role: the adapter's name.
        zero: begin at zero.
    """
    if HEADS not in model._modules:
        model.add_module(HEADS, nn.ModuleDict())
    head = ScalarHead(model.config.get_text_config().hidden_size, zero, _device(model))
    model._modules[HEADS][role] = head
    return head


def heads_of(model: Any) -> dict[str, ScalarHead]:
    """The heads on a model by their roles; none on most."""
    return dict(model._modules.get(HEADS) or {})


def head_of(model: Any, role: str = _OWN) -> ScalarHead:
    """The head of a role.

    Raises:
        KeyError: the model has no such head.
    """
    return heads_of(model)[role]


def remove_head(model: Any, role: str) -> None:
    """Take a head off the model, and with the last one every trace of heads."""
    heads = model._modules[HEADS]
    del heads[role]
    if not heads:
        del model._modules[HEADS]


def save_heads(model: Any, folder: str | Path, roles: Collection[str] | None = None) -> None:
    """Write each head beside its adapter, below the folder that the adapters were saved into.

    Args:
        model: as in ``add_head``.
        folder: of the adapters.
        roles: those whose heads are written; None writes all.
    """
    for role, head in heads_of(model).items():
        if roles is not None and role not in roles:
            continue
        own = Path(folder) / ("" if role == _OWN else role)
        own.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, own / HEAD_FILE
        )


def load_head(model: Any, role: str, folder: str | Path) -> ScalarHead:
    """Put a saved head on the model, or its values into the head that is there.

    Args:
        model: as in ``add_head``.
        role: the adapter's name here.
        folder: the adapter's own folder, or the one that holds it under the role's name.

    Raises:
        CheckpointError: there is no head, or not one of this model's size.
    """
    file = next((f for f in (Path(folder) / role / HEAD_FILE, Path(folder) / HEAD_FILE) if f.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder}: {HEAD_FILE} is missing. Give the folder of a reward model, or restore the file."
        )
    try:
        values = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Restore the file.") from error
    size = model.config.get_text_config().hidden_size
    if values.keys() != {"weight", "bias"} or values["weight"].shape != (1, size) or values["bias"].shape != (1,):
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(values.items()))
        raise CheckpointError(
            f"{file} holds {found}, but a head of this model is weight [1, {size}] and bias [1]. It belongs to another "
            "model: give the folder that was trained on this one."
        )
    head = heads_of(model).get(role) or add_head(model, role)
    head.load_state_dict(values)
    return head


def last_hidden_state(model: Any, **inputs: Any) -> Tensor:
    """The last layer's hidden states (B, L, H), behind its norm: what the output head reads. No logits are computed.

    Args:
        model: the plain model, adapters included.
        inputs: as for its forward.
    """
    if model.base_model is not model:
        return model.base_model(**inputs, use_cache=False).last_hidden_state
    # A model that is its own backbone gives logits only: taken at the head's door, and the head is given no row.
    seen: list[Tensor] = []

    def at_the_door(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(arguments[0])
        return (arguments[0][:, :0],)

    handle = model.get_output_embeddings().register_forward_pre_hook(at_the_door)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _device(model: Any) -> Any:
    """Where the hidden states come out: at the output embeddings."""
    return next(model.get_output_embeddings().parameters()).device
