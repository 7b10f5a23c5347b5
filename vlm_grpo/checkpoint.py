"""Checkpoints that are whole or absent, and that continue a run as if it had never stopped."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from .errors import CheckpointError
from .models.heads import HEADS, heads_of, load_head, save_heads
from .models.restoring import own_folder, restore_adapters, roles_to_save
from .models.wrappers import is_peft_model
from .patches.transformers import answered_by, own_trainer
from .patches.unsloth_modes import at_step_boundary

if TYPE_CHECKING:
    from transformers import Trainer as OwnTrainer
else:
    OwnTrainer = own_trainer(before_step=at_step_boundary)

MANIFEST = "manifest.json"
_HEADS = f"{HEADS}."
_PARTIAL = ".partial"


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint of a run, and the torn ones that are newer.

    Whole means: every file that its manifest lists is there with its size. A checkpoint gets its final name only
    after everything in it has reached the disk, so a torn one is a damaged copy, or another tool's.
    """
    folders = [
        (int(step), folder)
        for folder in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and (step := folder.name.rsplit("-", 1)[1]).isdigit()
    ]
    torn = []
    for _, folder in sorted(folders, reverse=True):
        if is_whole(folder):
            return folder, torn
        torn.append(folder)
    return None, torn


def is_whole(folder: Path) -> bool:
    """Whether every file of the checkpoint's manifest is present with its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_manifest(folder: Path, step: int) -> None:
    """List the checkpoint's files with their sizes, and flush all of it to the disk."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or folder; folders only where the system lets them be opened."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, whose permutation depends on the epoch and not on how often this process has iterated.

    TRL draws one permutation an epoch from one generator, so a restarted process replays epoch 0's. This one rewinds
    to its seed and draws as many as an uninterrupted run would have.

    Args:
        sampler: TRL's own, already configured.
        epoch: tells the epoch that is about to be iterated, from 0.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        self.__dict__.update(sampler.__dict__)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


class ExactCheckpoints(OwnTrainer):
    """Sits between TRL's trainer and transformers': writes checkpoints atomically, restores all that they hold.

    A subclass adds what must survive in ``_resume_state`` and takes it back in ``_load_resume_state``.
    """

    _saving = False

    def _get_dataloader(self, dataset: Any, *args: Any, sampler_fn: Any = None, **kwargs: Any) -> Any:
        def sampler_of(rows: Any) -> Any:
            sampler = sampler_fn(rows)
            repeats = kwargs.get("is_training") and isinstance(sampler, RepeatSampler)
            return EpochRepeatSampler(sampler, self._epoch) if repeats else sampler

        return super()._get_dataloader(dataset, *args, sampler_fn=sampler_of if sampler_fn else None, **kwargs)

    def _epoch(self) -> int:
        """The epoch that is about to be iterated, from 0."""
        return int(self.state.epoch or 0)

    def _resume_state(self) -> dict[str, Any]:
        """What this process must remember beyond transformers' state: plain containers and tensors."""
        return {}

    def _load_resume_state(self, state: dict[str, Any]) -> None:
        """Take back what ``_resume_state`` gave."""

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, _PARTIAL) if self._saving else run_dir

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run_dir = Path(self._get_output_dir(trial))
        partial, final = run_dir / _PARTIAL / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / _PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # a full disk must not stay full
            shutil.rmtree(run_dir / _PARTIAL, ignore_errors=True)
            raise
        finally:
            self._saving = False
        torch.save(self._resume_state(), partial / self._resume_file())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.state.best_global_step and (best == final or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(partial / "trainer_state.json"))
            write_manifest(partial, self.state.global_step)
            if final.exists():  # a torn or older one of the same step
                shutil.rmtree(final)
            os.rename(partial, final)
            sync(run_dir)
            shutil.rmtree(run_dir / _PARTIAL, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,  # a restored run may hold newer steps with older times
            )
        self.accelerator.wait_for_everyone()

    def _resume_file(self) -> str:
        return f"resume_state_{self.args.process_index}.pt"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        roles = roles_to_save(model, self._saving) if is_peft_model(model) else None
        if heads_of(model) and state_dict is None and roles is None:  # those lie beside, not within
            state_dict = {name: value for name, value in model.state_dict().items() if not name.startswith(_HEADS)}
        chosen: Any = nullcontext()
        if roles is not None:
            chosen = answered_by(model, "save_pretrained", partial(model.save_pretrained, selected_adapters=roles))
        with chosen:
            super()._save(output_dir, state_dict)
        save_heads(model, output_dir or self._run_dir(), roles)

    def _run_dir(self) -> str:
        assert self.args.output_dir is not None, "transformers sets it"
        return self.args.output_dir

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if not self._restore(self.model if model is None else model, checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = checkpoint / self._resume_file()
        if file.is_file():
            self._load_resume_state(torch.load(file, map_location="cpu", weights_only=True))
        elif (checkpoint / MANIFEST).is_file():
            raise CheckpointError(
                f"{checkpoint} has no state for process {self.args.process_index} of {self.args.world_size}: it was "
                "written by fewer. Continue with as many processes as before."
            )

    def _load_best_model(self) -> None:
        if not self._restore(self.model, Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _restore(self, model: Any, checkpoint: Path) -> bool:
        """Restore the model and verify it; False where its kind is left to transformers."""
        if self._is_whole_model(model, checkpoint):
            _restore_whole_model(model, checkpoint)
            return True
        own = is_peft_model(model) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        if own and checkpoint.is_dir() and not (checkpoint / "adapter_model.bin").is_file():
            restore_adapters(self.accelerator.unwrap_model(model), checkpoint)
            return True
        return False

    def _is_whole_model(self, model: Any, checkpoint: Path) -> bool:
        """Whether a checkpoint holds all weights of a model, rather than an adapter or pieces for several processes."""
        apart = is_peft_model(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not apart and isinstance(model, PreTrainedModel) and any(checkpoint.glob("model*.safetensors"))


def _restore_whole_model(model: Any, checkpoint: Path) -> None:
    """Restore a model without adapters.

    transformers writes weights under the names of the model's published checkpoints, and its trainer reads them by the
    names of the modules: where the two differ, it restores nothing and goes on.

    Raises:
        CheckpointError: a weight is not in the checkpoint.
    """
    # float32 holds every other number type; the model's own comes back as the values are copied.
    options: dict[str, Any] = {"config": model.config, "dtype": torch.float32, "output_loading_info": True}
    saved, found = type(model).from_pretrained(checkpoint, **options)
    if found["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint}: the weight {min(found['missing_keys'])} is not in it. Continue from another checkpoint."
        )
    values = {**saved.state_dict(), **{n: v for n, v in model.state_dict().items() if n.startswith(_HEADS)}}
    model.load_state_dict(values)
    for name in heads_of(model):
        load_head(model, name, own_folder(checkpoint, name))
