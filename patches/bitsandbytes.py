"""bitsandbytes: keep a 4-bit layer trainable on a CPU after it was used in eval mode."""

import importlib
import importlib.util
import threading
import warnings
from typing import Any

from .ledger import Patch

_LOCK = threading.RLock()
_FLAG = "support_avx512bf16_for_cpu"


class _NeverPack:
    """A data descriptor in the place of the instance flag: reads False, whatever a layer's constructor writes."""

    def __get__(self, layer: Any, owner: type | None = None) -> bool:
        return False

    def __set__(self, layer: Any, value: bool) -> None:
        layer.__dict__[_FLAG] = value  # kept, so that undo restores what the layer would have done


def _linear4bit() -> Any:
    return importlib.import_module("bitsandbytes.nn").Linear4bit


def _works() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    try:
        _linear4bit()
    except (ImportError, OSError, RuntimeError, AttributeError):  # installed, and without a library for this machine
        return False
    return True


def _loses_gradients() -> bool | None:
    """A train forward of a `Linear4bit` on a CPU, after one in eval mode, leaves its input without a gradient."""
    if not _works():
        return None
    import torch

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the missing gradient; here it is the question
        # 64 is the block size: the smallest layer that is packed.
        layer = _linear4bit()(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        layer.eval()(torch.ones(1, 64))
        inputs = torch.ones(1, 64, requires_grad=True)
        outputs = layer.train()(inputs)
        if outputs.requires_grad:
            outputs.sum().backward()
        return inputs.grad is None


def _forbid_packing() -> None:
    linear = _linear4bit()
    with _LOCK:
        if _FLAG not in vars(linear(1, 1)):
            raise RuntimeError(
                f"bitsandbytes.nn.Linear4bit has no {_FLAG} any more: its CPU packing changed. "
                "Install bitsandbytes 0.50, or load without 4-bit on this machine."
            )
        setattr(linear, _FLAG, _NeverPack())


def _never_packs() -> bool:
    return _works() and isinstance(vars(_linear4bit()).get(_FLAG), _NeverPack)


def _allow_packing() -> None:
    with _LOCK:
        if _never_packs():
            delattr(_linear4bit(), _FLAG)


CPU_PACKING = Patch(
    name="bitsandbytes-cpu-packing",
    why="On a CPU with AVX512-BF16 an eval forward (every rollout) repacks 4-bit weights for inference: from then on "
    "the layer computes in bfloat16 and passes no gradient to what is below it, silently.",
    reference="bitsandbytes.nn.Linear4bit.forward, bitsandbytes.autograd.matmul_4bit (0.49-0.50)",
    remove_when="matmul_4bit computes gradients for packed weights, or a train forward unpacks them.",
    probe=_loses_gradients,
    in_place=_never_packs,
    apply=_forbid_packing,
    undo=_allow_packing,
)
PATCHES = [CPU_PACKING]
