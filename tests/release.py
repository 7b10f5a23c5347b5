"""Run in a process of its own: one release's hook function, as it is and patched. ``python release.py WHEEL``.

Old releases do not import on today's libraries, so the package's ``__init__`` is not run: an empty ``unsloth_zoo``
whose path is inside the wheel lets ``peft_utils`` be imported as published, its relative imports from the same wheel.
"""

import json
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import tiny
import torch
from peft import LoraConfig, get_peft_model

from vlm_grpo import LoraOptions, apply_unsloth_patch, undo_unsloth_patch
from vlm_grpo.models.families import family_of, lora_targets

KINDS = ("loss", "logits", "log_probs", "last_hidden_state", "tuple", "dict")


def install(wheel: str) -> tuple[ModuleType, ModuleType]:
    """The release's ``peft_utils``, and a module that holds a reference to its function, as Unsloth's does."""
    package = ModuleType("unsloth_zoo")
    package.__path__ = [f"{wheel}/unsloth_zoo"]
    sys.modules["unsloth_zoo"] = package
    import unsloth_zoo.peft_utils as zoo

    vision = ModuleType("unsloth.models.vision")
    vision.requires_grad_for_gradient_checkpointing = zoo.requires_grad_for_gradient_checkpointing
    sys.modules["unsloth.models.vision"] = vision
    return zoo, vision


def answer(model: Any, kind: str, inputs: dict) -> torch.Tensor:
    """What a loss is made from, of a forward that returns this kind; hooks at the model's door see that too."""
    inner = model.get_base_model()
    forward = inner.forward

    def returns(*args: Any, **named: Any) -> Any:
        if kind == "last_hidden_state":
            return inner.model(**inputs)
        out = forward(*args, **named)
        return {
            "loss": lambda: SimpleNamespace(loss=out.logits.float().logsumexp(-1).mean()),
            "logits": lambda: out,
            "log_probs": lambda: SimpleNamespace(loss=None, logits=None, log_probs=out.logits.log_softmax(-1)),
            "tuple": lambda: (out.logits,),
            "dict": lambda: {"logits": out.logits},
        }[kind]()

    inner.forward = returns
    try:
        out = inner(**inputs)
    finally:
        del inner.forward
    if kind in ("tuple", "dict"):
        return next(iter(out.values() if kind == "dict" else out))
    return getattr(out, kind)


def trained(function: Any, kind: str) -> str:
    """``with a gradient/all`` of the adapters of both towers of a tiny model under reentrant checkpointing."""
    model, processor = tiny.build("qwen2_5_vl")
    targets = lora_targets(family_of(model.config), model, LoraOptions(vision=True))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    row = tiny.prompt()
    row[0]["content"][0]["image"] = tiny.image()
    inputs = processor.apply_chat_template([row], tokenize=True, return_dict=True, return_tensors="pt")
    function(model.train())
    try:
        tensor = answer(model, kind, inputs)
        if tensor.requires_grad:
            (tensor * torch.arange(1, tensor.numel() + 1).reshape(tensor.shape)).sum().backward()
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        return f"fails ({type(error).__name__})"
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    return f"{sum(p.grad is not None and bool(p.grad.any()) for p in adapters)}/{len(adapters)}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    zoo, vision = install(sys.argv[1])
    own = zoo.requires_grad_for_gradient_checkpointing
    without = {kind: trained(own, kind) for kind in KINDS}
    report = apply_unsloth_patch()
    assert vision.requires_grad_for_gradient_checkpointing is zoo.requires_grad_for_gradient_checkpointing
    patched = {kind: trained(zoo.requires_grad_for_gradient_checkpointing, kind) for kind in KINDS}
    from vlm_grpo.patches.unsloth_probe import probe

    towers = probe(zoo.requires_grad_for_gradient_checkpointing)
    undo_unsloth_patch()
    restored = zoo.requires_grad_for_gradient_checkpointing is own is vision.requires_grad_for_gradient_checkpointing
    seen = {"applied": report.applied, "probed": report.probed, "reason": report.reason, "towers": towers}
    print(json.dumps({**seen, "without": without, "patched": patched, "restored": restored}))
