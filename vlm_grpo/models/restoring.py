"""The adapters and heads of a checkpoint: which it holds, and all of them back on the model, bit for bit."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from .adapters import POLICY, adapter_parameters, loaded_roles
from .heads import HEAD_FILE, heads_of, load_head

_LOG = logging.getLogger("vlm_grpo")
_ADAPTER = "adapter_model.safetensors"
_FROZEN = ("ref", "reward")  # also reward2, ...: a run without them has its policy and optimizer all the same


def roles_to_save(model: Any, checkpoint: bool) -> list[str]:
    """The adapters that are written.

    Args:
        model: PEFT's.
        checkpoint: whether a run is to continue from it, which takes a frozen adapter of another run from that run's
            folder; else it is the result, the adapters that were trained.
    """
    if checkpoint:
        return [name for name in model.peft_config if name not in loaded_roles(model)]
    return [name for name in model.peft_config if name == POLICY or _is_trained(model, name)]


def _is_trained(model: Any, name: str) -> bool:
    return any(parameter.requires_grad for parameter in adapter_parameters(model, name))


def restore_adapters(model: Any, checkpoint: Path) -> None:
    """Restore every adapter of a model, and every head, bit for bit: in place, so that flags and modes stay.

    transformers restores the subfolders only, as soon as there is one, and the trained adapter lies at the root. A
    frozen adapter that was loaded from a run folder stays as it is there, also beside another one in the checkpoint. A
    frozen one that the checkpoint lacks stays, and one that it holds beyond is left out.

    Raises:
        CheckpointError: a trained adapter, a head or a weight is not in the checkpoint, has another shape, cannot be
            read, or is not the same afterwards.
    """
    found = _saved_adapters(model, checkpoint)
    state = model.state_dict()
    for name, saved in found.items():
        _check_fits(_own_state(model, state, name), saved, state, own_folder(checkpoint, name))
    _restore_heads(model, checkpoint, found)
    for name, saved in found.items():
        set_peft_model_state_dict(model, saved, adapter_name=name)
    state = model.state_dict()
    for name, saved in found.items():
        live = {**state, **_own_state(model, state, name)}
        for key, value in saved.items():
            if not torch.equal(live[key].detach().cpu(), value.to(live[key].dtype)):
                raise CheckpointError(
                    f"{own_folder(checkpoint, name)}: the adapter weight {key} was not restored. Report this bug."
                )


def own_folder(checkpoint: Path, name: str) -> Path:
    """Where the adapter of a role lies, and its head."""
    return checkpoint if name == POLICY else checkpoint / name


def _saved_adapters(model: Any, checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of the model's adapters in a checkpoint; those that may stay as they are, are left out."""
    found = {}
    for name in roles_to_save(model, checkpoint=True):
        file = own_folder(checkpoint, name) / _ADAPTER
        if file.is_file():
            found[name] = _read(file)
        elif name == POLICY or _is_trained(model, name):
            raise CheckpointError(
                f"{checkpoint}: the trained adapter {name!r} is not in it ({file.relative_to(checkpoint)} is missing). "
                "Continue from another checkpoint, or with the options that this one was written with."
            )
        else:
            _LOG.warning("%s holds no adapter %r: the frozen one stays as this run has loaded it.", checkpoint, name)
    beyond = sorted(
        file.parent.name for file in checkpoint.glob(f"*/{_ADAPTER}") if file.parent.name not in model.peft_config
    )
    for name in beyond:
        if name.rstrip("0123456789") not in _FROZEN:
            raise CheckpointError(
                f"{checkpoint} holds a trained adapter {name!r}, which this run has not. Continue with the command and "
                "options that it was written by."
            )
        _LOG.warning("%s holds an adapter %r, which this run has not: it is left out.", checkpoint, name)
    return found


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Continue from another checkpoint.") from error


def _own_state(model: Any, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """An adapter's weights by the names that they are saved under; they are the model's own."""
    return get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)


def _check_fits(live: dict[str, Tensor], saved: dict[str, Tensor], state: dict[str, Tensor], folder: Path) -> None:
    # Beside its adapter, PEFT saves embeddings that were resized: by the names of the model's own.
    odd = sorted((live.keys() - saved.keys()) | (saved.keys() - live.keys() - state.keys()))
    if odd:
        where = "the model's adapter" if odd[0] in live else "the checkpoint"
        raise CheckpointError(
            f"{folder}: {len(odd)} adapter weight(s), such as {odd[0]}, are in {where} only. "
            "Continue with the lora options that it was written with."
        )
    for key, value in saved.items():
        own = live.get(key, state.get(key))
        if own is not None and own.shape != value.shape:
            raise CheckpointError(
                f"{folder}: the adapter weight {key} is {list(value.shape)}, but {list(own.shape)} in this run. "
                "Continue with the lora options that it was written with."
            )


def _restore_heads(model: Any, checkpoint: Path, found: dict[str, Any]) -> None:
    heads = heads_of(model)
    for name in found:
        folder = own_folder(checkpoint, name)
        if name in heads:
            load_head(model, name, folder)
        elif (folder / HEAD_FILE).is_file():
            raise CheckpointError(
                f"{folder / HEAD_FILE} is the head of the adapter {name!r}, which has none in this run. Continue with "
                "the command that the checkpoint was written by."
            )
