"""How a run's model is loaded and asked again: as it was trained, since other weights would give other answers."""

from pathlib import Path
from typing import Any

from .config import RunConfig, load_config
from .folder import CONFIG
from .models import is_adapter


def run_home(run: str | Path) -> Path | None:
    """The run folder that ``run`` is, or whose checkpoint it is; None for any other model."""
    folder = Path(run).expanduser()
    places = [folder, folder.absolute().parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((place for place in places if (place / CONFIG).is_file()), None)


def config_of(run: str | Path) -> RunConfig | None:
    """The config of a run folder, or of the run that a checkpoint belongs to; None for any other model."""
    home = run_home(run)
    return load_config(home / CONFIG) if home is not None else None


def command_of(run: str | Path) -> str | None:
    """``train`` or ``sft``, as the run began; None for any other model."""
    home = run_home(run)
    return (home / CONFIG).read_text(encoding="utf-8").partition("\n")[0].rpartition(" ")[2] if home else None


def as_trained(run: str | Path, config: RunConfig | None) -> dict[str, Any]:
    """Arguments of ``load_model`` by which a run's model comes back as it was trained."""
    if config is None:
        return {}
    adapter = is_adapter(str(Path(run).expanduser()))
    whole = config.dtype == "auto" and not adapter  # trained, and saved, in full precision
    dtype = "float32" if whole else config.dtype
    return {"load_in_4bit": config.load_in_4bit and adapter, "dtype": dtype, "backend": config.backend}


def template_of(config: RunConfig | None) -> dict[str, Any]:
    """Keyword arguments of the chat template, as in training."""
    return dict(config.train.get("chat_template_kwargs") or {}) if config is not None else {}
