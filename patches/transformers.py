"""transformers: its own trainer, and answering in the place of one method of one model, for a while or from now on."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .ledger import Patch
from .own import forget_copy, is_copied, is_replaced, own_methods

_MODULE = "transformers.trainer"
# The methods that compute a step, an evaluation, or what is logged of them. Unsloth puts its own in their place when it
# loads a model. In the releases tried, none changed a figure of a trainer of ours; but which is active depends on the
# order of imports, they are rewritten with each release, and ``training_step`` asks only the outermost module whether
# the model is in training, so that a part in evaluation stays there without checkpointing. What Unsloth wraps around
# the other methods looks after where its models lie (offloaded embeddings, several GPUs, old optimizer states): it
# computes nothing, is needed with its models, and stays.
_COMPUTING = (
    "_inner_training_loop",
    "training_step",
    "compute_loss",
    "get_batch_samples",
    "prediction_step",
    "floating_point_ops",
)


def own_trainer(before_step: Callable[[], None]) -> type:
    """A ``Trainer`` that computes by transformers' own methods, whatever was put in their place before or will be.

    Args:
        before_step: called before each micro-batch: what a replaced ``training_step`` would have done beside.
    """
    from transformers import Trainer  # here: whoever only reads this file's records may still import Unsloth first

    namespace = own_methods(_MODULE, "Trainer", _COMPUTING)
    step = namespace["training_step"]

    @functools.wraps(step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_step()
        return step(self, *args, **kwargs)

    doc = "``transformers.Trainer``, whose steps are computed by the methods that transformers' own file defines."
    return type("OwnTrainer", (Trainer,), {**namespace, "training_step": training_step, "__doc__": doc})


@contextmanager
def answered_by(owner: Any, name: str, answer: Callable[..., Any]) -> Iterator[None]:
    """Within it, ``owner.name(...)`` is ``answer(...)``: of this instance only, nothing of its class changes.

    Raises:
        AttributeError: ``owner`` has no such method.
    """
    getattr(owner, name)
    before = owner.__dict__.get(name)
    owner.__dict__[name] = answer
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


def quiet_layerdrop(model: Any) -> None:
    """Encoders of the Whisper kind draw a number for each layer, also where none is ever dropped: now they do not.

    The tokens sampled afterwards would depend on how often media are encoded.
    """
    for module in model.modules():
        # Its layers stay in training, as checkpointing asks.
        if getattr(module, "layerdrop", None) == 0.0 and not getattr(module, "dropout", 0.0):
            wrap_method(module, "train", _in_evaluation)


def _in_evaluation(train: Callable[..., Any], module: Any, mode: bool = True) -> Any:
    train(mode)
    module.training = False
    return module


class _Wrapped:
    """A method of one instance within a wrapper. A deep copy of the instance has one of its own, bound to the copy."""

    __wrapped__: Callable[..., Any]

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(owner, name))  # the bound method is __wrapped__, and is copied as such
        self.owner, self.wrapper, self.of_class = owner, wrapper, name not in owner.__dict__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.__wrapped__, self.owner, *args, **kwargs)


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """From now on, ``owner.name(...)`` is ``wrapper(method, owner, ...)``: of this instance and of its deep copies.

    Args:
        owner: an instance, such as a module of a model.
        name: of the method.
        wrapper: gets the bound method as it was. A function of a module: a second call with the same does nothing.

    Returns:
        what undoes it. It does nothing where the wrapper is gone already, or lies within another.

    Raises:
        AttributeError: ``owner`` has no such method.
    """
    wrapped = owner.__dict__.get(name)
    if not (isinstance(wrapped, _Wrapped) and wrapped.wrapper is wrapper):
        wrapped = owner.__dict__[name] = _Wrapped(owner, name, wrapper)

    def undo() -> None:
        if owner.__dict__.get(name) is not wrapped:
            return
        if wrapped.of_class:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = wrapped.__wrapped__

    return undo


def _steps_replaced() -> bool | None:
    """Looks in which file the methods of ``transformers.Trainer`` that compute a step were written."""
    return is_replaced(_MODULE, "Trainer", _COMPUTING)


OWN_STEPS = Patch(
    name="transformers-own-steps",
    why="When it loads a model, Unsloth puts its own in the place of six methods of transformers.Trainer that compute "
    "a step or an evaluation: what a trainer computes would depend on the order of imports, and on Unsloth's release.",
    reference="unsloth.models._utils, unsloth_zoo.compiler, transformers.Trainer",
    remove_when="Unsloth leaves these methods of the class alone, or changes them for its own models only.",
    probe=_steps_replaced,
    in_place=lambda: is_copied(_MODULE),
    apply=lambda: own_methods(_MODULE, "Trainer", _COMPUTING),
    undo=lambda: forget_copy(_MODULE),
)
PATCHES = [OWN_STEPS]  # what else lies here lasts for one call, or belongs to one model
