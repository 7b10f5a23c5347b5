"""What does Unsloth's function do to toy models? Tried, never read off a version number."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .ledger import Patch
from .unsloth_hooks import differentiable

ADAPTERS = "adapters with a gradient under checkpointing"


def probe(function: Callable[..., Any]) -> dict[str, str]:
    """Each thing tried and what came of it: ``fine``, or what was seen instead."""
    results = {name: "fine" if _handles(function, output) else "fails" for name, output in _outputs()}
    trained, adapters = _trained_adapters(function)
    return {**results, ADAPTERS: "fine" if trained == adapters else f"{trained} of {adapters}"}


def faults(results: dict[str, str]) -> list[str]:
    """Clauses naming what goes wrong; none means that the patch is not needed."""
    failing = [name for name, result in results.items() if result == "fails"]
    clauses = [f"a forward that returns {' or '.join(failing)} fails"] if failing else []
    if results[ADAPTERS] != "fine":
        clauses.append(f"{results[ADAPTERS]} adapters under checkpointing get a gradient")
    return clauses


def _outputs() -> list[tuple[str, Any]]:
    def tensor() -> Any:
        return torch.zeros(1, 1, 2)

    return [
        ("a loss", CausalLMOutput(loss=torch.zeros(()), logits=tensor())),  # pyright: ignore[reportArgumentType]
        ("logits without a loss", CausalLMOutput(logits=tensor())),
        ("log-probabilities", SimpleNamespace(loss=None, logits=None, log_probs=tensor())),
        ("a last hidden state", BaseModelOutput(last_hidden_state=tensor())),
        ("a tuple", (tensor(),)),
        ("a dict", {"logits": tensor()}),
    ]


def _handles(function: Callable[..., Any], output: Any) -> bool:
    """Does a module hooked by ``function`` return ``output`` with a gradient?"""

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(1))])

        def forward(self) -> Any:
            return output

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Middle()

        def forward(self) -> Any:
            return self.middle()

    top = Top()
    function(top)
    if not any(module._forward_hooks for module in top.modules()):
        return True  # nothing was hooked, so nothing can fail
    try:
        with torch.enable_grad():
            tensor = differentiable(top())
            return tensor is not None and tensor.requires_grad
    except (RuntimeError, ValueError, AttributeError, TypeError):  # however this version fails
        return False


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2).requires_grad_(False)
        self.adapter = nn.Linear(2, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.adapter(hidden)


class _Tower(nn.Module):
    """Frozen, but for an adapter a block, under reentrant checkpointing."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed.requires_grad_(False)
        self.blocks = nn.ModuleList([_Block(), _Block()])

    def forward(self, inputs: Tensor) -> Any:
        hidden: Any = self.embed(inputs).flatten(1)
        for layer in self.blocks:
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        return hidden


class _Tokens(_Tower):
    def get_input_embeddings(self) -> nn.Module:
        return self.embed


class _Patches(_Tower):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = _Patches(nn.Conv2d(3, 2, 2))
        self.audio = _Tower(nn.Conv1d(1, 2, 2))
        self.language = _Tokens(nn.Embedding(3, 2))

    def forward(self, ids: Tensor, pixels: Tensor, sound: Tensor) -> Tensor:
        return self.vision(pixels) + self.audio(sound) + self.language(ids)


def _trained_adapters(function: Callable[..., Any]) -> tuple[int, int]:
    """``(with a gradient, all)`` of the adapters of a frozen toy with three towers under reentrant checkpointing."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the missing gradient; here it is the question
        model = _Model()
        function(model)
        output = model(torch.tensor([0, 1, 2]), torch.ones(3, 3, 2, 2), torch.ones(3, 1, 2))
        if output.requires_grad:
            output.sum().backward()
    adapters = [weight for name, weight in model.named_parameters() if name.endswith("adapter.weight")]
    return sum(weight.grad is not None for weight in adapters), len(adapters)


PATCHES: list[Patch] = []  # the record that asks is in unsloth.py
