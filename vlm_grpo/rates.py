"""A learning rate for each part of the model: a connector or a vision tower rarely wants the language model's."""

from typing import Any

from transformers import Trainer

from .errors import ConfigError
from .models.families import family_of, tower_of

RATED = ("vision", "audio", "projector")


def part_rates(args: Any) -> dict[str, float]:
    """The parts with a rate of their own, and the rate: the options ``{part}_learning_rate``."""
    rates = {part: getattr(args, f"{part}_learning_rate", None) for part in RATED}
    return {part: rate for part, rate in rates.items() if rate is not None}


class PartRates(Trainer):
    """Sits between a trainer and transformers': gives parts their own learning rate, and logs it.

    The schedule is the same for all; a rate is its peak. Weight decay stays as transformers chooses it by name.

    Raises:
        ConfigError: a rate for a part of which nothing is trained, or beside an optimizer that is given ready-made.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_of: dict[str, int] = {}
        self._rate_of: dict[str, float] = {}
        rates = part_rates(self.args)
        trained = set(self._parts(self.model).values()) if rates else set()
        for part in rates:
            if part not in trained:
                raise ConfigError(
                    f"{part}_learning_rate={rates[part]:g}: nothing of the {part} part is trained. Leave it out, or "
                    f'train the part ({part}="lora" or "full").'
                )
        if rates and self.optimizer is not None:
            raise ConfigError(
                f"{next(iter(rates))}_learning_rate beside an optimizer of your own: give that its rates yourself, in "
                "its parameter groups."
            )

    def create_optimizer(self, model: Any = None) -> Any:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and part_rates(self.args):
            self._group_of = split_groups(
                optimizer, self._parts(self.model if model is None else model), part_rates(self.args)
            )
        return optimizer

    def _parts(self, model: Any) -> dict[Any, str]:
        """Each trained parameter's part."""
        family = family_of(getattr(self.model, "config", None))
        return {p: tower_of(family, name) for name, p in model.named_parameters() if p.requires_grad}

    def _get_learning_rate(self) -> Any:
        """As transformers asks for it: before the schedule moves on, for the step that is about to be logged."""
        groups: Any = getattr(self.optimizer, "param_groups", [])
        self._rate_of = {part: float(groups[index]["lr"]) for part, index in self._group_of.items()}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{part}": rate for part, rate in self._rate_of.items()}
        super().log(logs, *args, **kwargs)


def split_groups(optimizer: Any, parts: dict[Any, str], rates: dict[str, float]) -> dict[str, int]:
    """Move the parameters of parts with a rate of their own into groups behind the optimizer's, before its first step.

    The order is that of ``rates`` within that of the groups, so that a saved optimizer's state fits again.

    Args:
        optimizer: as transformers makes it; its own groups keep their place, and what is left in them.
        parts: parameter to part.
        rates: part to learning rate.

    Returns:
        part to the number of its first group.
    """
    first: dict[str, int] = {}
    for group in list(optimizer.param_groups):
        shared = {name: value for name, value in group.items() if name != "params"}
        every = group["params"]
        group["params"] = [p for p in every if parts.get(p) not in rates]
        for part, rate in rates.items():
            own = [p for p in every if parts.get(p) == part]
            if own:
                first.setdefault(part, len(optimizer.param_groups))
                optimizer.add_param_group({**shared, "params": own, "lr": rate})
    return first
