"""What is exported: a run, one of its checkpoints, an adapter or a model, as its folder tells."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import find_checkpoint
from ..config import RunConfig, load_config
from ..errors import ConfigError
from ..folder import CONFIG
from ..models import is_adapter, refuse_reward_model
from ..models.hf import adapter_base


@dataclass(frozen=True)
class Source:
    """A trained model on the disk.

    Attributes:
        folder: holds the weights, absolute.
        run: the run folder, whose config and figures count; None for an adapter or model of another origin.
        config: the run's; None without a run.
        command: ``train`` or ``sft``; None without a run.
        base: what it was trained from, a folder or a name; None where nothing says so.
        is_adapter: whether the weights are an adapter.
    """

    folder: Path
    run: Path | None
    config: RunConfig | None
    command: str | None
    base: str | None
    is_adapter: bool

    @property
    def in_4bit(self) -> bool:
        """Whether the adapter was trained over 4-bit weights."""
        return self.is_adapter and self.config is not None and self.config.load_in_4bit

    def as_trained(self, backend: str) -> dict[str, Any]:
        """How the run loaded its model: answers from other weights would not be those that were trained."""
        if self.config is None:
            return {"backend": backend, "load_in_4bit": False, "dtype": "auto"}
        chosen = self.config.backend if backend == "auto" else backend
        whole = self.config.dtype == "auto" and not self.is_adapter  # trained, and saved, in full precision
        dtype = "float32" if whole else self.config.dtype
        return {"load_in_4bit": self.in_4bit, "dtype": dtype, "backend": chosen}

    def train_option(self, name: str) -> Any:
        """An option of the run's ``train`` section, or None."""
        return None if self.config is None else self.config.train.get(name)


def read_source(run: str | Path) -> Source:
    """Find out what a folder holds.

    Raises:
        ConfigError: no such folder, no weights in it, or an adapter whose base model is gone.
    """
    folder = Path(run).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"export: the folder {str(run)!r} does not exist. Give a run folder, or an adapter's.")
    refuse_reward_model(folder, "export")
    adapter = is_adapter(str(folder))
    if not adapter and not (folder / "config.json").is_file():
        checkpoint, _ = find_checkpoint(folder)
        where = f"Give its checkpoint {checkpoint}" if checkpoint else "Give a run folder that was trained to its end"
        raise ConfigError(f"export: {folder} holds neither an adapter nor a model. {where}.")
    home = next((path for path in (folder, folder.parent) if (path / CONFIG).is_file()), None)
    if home is not None and home != folder and not folder.name.startswith("checkpoint-"):
        home = None  # an export of a run lies in its folder and is a model of its own
    config = load_config(home / CONFIG) if home else None
    command = (home / CONFIG).read_text(encoding="utf-8").partition("\n")[0].rpartition(" ")[2] if home else None
    base = adapter_base(str(folder)) if adapter else config.model if config else None
    return Source(folder, home, config, command, base, adapter)
