"""The way of one export: probe the run, write, reload, compare. One model is in memory at a time."""

import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..config import MediaOptions
from ..encode import EncodedPrompt
from ..errors import ConfigError, ExportError
from ..media.hearing import extractor_of
from ..models import load_model
from ..models.hf import resolve_dtype
from .gguf import RUNNER, Converter
from .merge import load_for_merge, merge, stored_dtypes, write_4bit, write_adapter, write_model
from .probe import BITS, Probe, equal_answers, largest, probe, sensitivity
from .report import ExportReport, check_effect, check_export
from .rows import encode_rows, sample_rows
from .source import Source

_LOG = logging.getLogger("vlm_grpo")
_FACTOR = 3  # weights are not all that is rounded
_BITS_OF_NF4 = 2.5  # its rounding error is a tenth of the weights' size, as this random one's is
_MERGED = ".merged"  # the 16-bit model on the way to another form


class Export:
    """One export on its way.

    Args:
        source: what is exported.
        report: filled in.
        backend, dtype: as for ``export_run``.
        converter: makes GGUF files.
    """

    def __init__(
        self, source: Source, report: ExportReport, backend: str, dtype: str, converter: Converter | None
    ) -> None:
        self.source, self.report, self.dtype, self.converter = source, report, dtype, converter
        self.to, self.how = report.to, source.as_trained(backend)
        # Merged in the precision of the run where that is the higher one: the weights are then rounded once.
        full = resolve_dtype(self.how["dtype"]) == torch.float32
        self.merge_dtype = "float32" if full else dtype
        self._loaded: tuple[Any, Any] | None = None
        # Of a run over 4-bit weights: it and its base over 16-bit ones.
        self.in_16bit: tuple[Probe, Probe | None] | None = None

    def go(self, folder: Path, rows: int, data: str | None, max_new_tokens: int) -> None:
        """Write the export into an empty folder, and check it."""
        self.length = max_new_tokens
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("")
            self.say = lambda text: progress.update(task, description=text)
            self._probe_run(rows, data)
            if self.to == "lora":
                assert self._loaded is not None
                write_adapter(self.source, self._loaded[1], folder)
                self.report.saved_by, self.report.dtype = "a copy", stored_dtypes(folder)
                self._compare(folder)
            else:
                self._merge(folder)

    def _probe_run(self, rows: int, data: str | None) -> None:
        self.say("asking the run")
        model, processor = self._loaded = load_model(self.source.folder, **self.how)
        self.rows, self.report.rows_from = sample_rows(self.source, model, processor, rows, data)
        self.report.rows = len(self.rows)
        self.encodings = encode_rows(self.source, model, processor, self.rows)
        self.run, self.base = self._probe_both(model, processor)
        self.has_media = extractor_of(processor) is not None or hasattr(processor, "image_processor")
        if self.base is not None:
            check_effect(self.run, self.base, self.report)

    def _probe_both(self, model: Any, processor: Any) -> tuple[Probe, Probe | None]:
        """The run and its base, which is the same model with the adapter switched off."""
        run = probe(model, processor, self.encodings, self.length)
        if not self.source.is_adapter:
            return run, None
        return run, probe(model, processor, self.encodings, self.length, like=run, adapter=False)

    # ---- write ---------------------------------------------------------------------------------------------------

    def _merge(self, folder: Path) -> None:
        merged = folder if self.to == "merged_16bit" else folder / _MERGED
        assert self._loaded is not None
        by_unsloth = self.source.is_adapter and hasattr(self._loaded[0], "save_pretrained_merged")
        for write in [self._write_by_unsloth, self._write_by_peft] if by_unsloth else [self._write_by_peft]:
            merged.mkdir(exist_ok=True)
            try:
                self.say("merging")
                write(merged)
                self._drop()
                if self.to == "merged_4bit":
                    self._measure_rounding(*load_model(merged, backend="hf", dtype=self.how["dtype"]), _BITS_OF_NF4)
                    self.say("quantizing")
                    write_4bit(merged, folder, self.dtype)
                    _free()
                self._compare(folder if self.to == "merged_4bit" else merged)
                break
            except ExportError as error:
                if write == self._write_by_peft:
                    raise
                _LOG.warning("Unsloth's merge was not kept (%s) PEFT merges instead.", error)
                self._drop()
                _empty(folder)
        if self.to == "gguf":
            self._convert(merged, folder)
        if merged != folder:
            shutil.rmtree(merged)

    def _write_by_unsloth(self, folder: Path) -> None:
        from ..models.unsloth import save_merged

        assert self._loaded is not None, "the run is asked first"
        save_merged(*self._loaded, str(folder))
        self.report.saved_by, self.report.dtype = "Unsloth's merge", stored_dtypes(folder)
        if self.report.dtype != self.dtype:
            raise ExportError(f"Unsloth wrote {self.report.dtype} weights, and {self.dtype} was asked for.")

    def _write_by_peft(self, folder: Path) -> None:
        model, processor = self._mergeable()
        if self.source.in_4bit and self.to != "merged_4bit":
            self.in_16bit = self._probe_both(model, processor)
        write_model(merge(model), processor, folder, self.dtype)
        self.report.saved_by = "PEFT's merge" if self.source.is_adapter else "transformers"
        self.report.dtype = stored_dtypes(folder)

    def _mergeable(self) -> tuple[Any, Any]:
        """The run over unquantized weights: the model that was asked, where it is such a one."""
        if self._loaded is not None:
            model, processor = self._loaded
            plain = not hasattr(model, "save_pretrained_merged") and getattr(model, "hf_quantizer", None) is None
            if plain and not self.source.in_4bit and model.dtype == getattr(torch, self.merge_dtype):
                return model, processor
            del model, processor
        self._drop()
        return load_for_merge(self.source, self.merge_dtype)

    def _convert(self, merged: Path, folder: Path) -> None:
        assert self.converter is not None, "it was looked for first"
        self.say("converting to GGUF")
        self.converter.convert(merged, folder, self.dtype, self.has_media)
        media = self.source.config.media if self.source.config else MediaOptions()
        answers = self.converter.answers(folder, self.rows, media, self.length)
        if answers is None:
            self.report.notes.append(
                f"the figures are of the merged model before its conversion: {RUNNER}, which would answer from the "
                "GGUF files, is not there"
            )
            return
        self.report.gguf_answers_equal = sum(a == b for a, b in zip(answers, self.run.answers, strict=True))

    # ---- compare -------------------------------------------------------------------------------------------------

    def _compare(self, folder: Path) -> None:
        self._drop()
        if self.base is None and self.source.base is not None:
            self.base = self._probe_start(load_in_4bit=False)
            if self.base is not None:
                check_effect(self.run, self.base, self.report)
        run, base, export_base = self.run, self.base, self.base
        if self.source.in_4bit and self.to in ("merged_16bit", "gguf") and self.in_16bit is None:
            self.in_16bit = self._probe_both(*load_for_merge(self.source, self.merge_dtype))
            _free()
        if self.to == "merged_4bit":
            export_base = None if base is None else self._base_in_4bit(base)
        elif self.in_16bit is not None:
            # Merging adds the adapter to other weights than it was trained over: what is compared is the merge.
            run, base = self.in_16bit
            export_base = base
        self.say("loading the export again, and asking it")
        export = self._probe_export(folder, like=run)
        if run is not self.run:
            self.report.trained_difference = largest(export, self.run)
            self.report.trained_answers_equal = equal_answers(export, self.run)
        bases = None if base is None or export_base is None else (base, export_base)
        check_export(export, run, self.report, bases)

    def _probe_export(self, folder: Path, like: Probe) -> Probe:
        how = self.how
        if self.to == "merged_4bit":
            # In its own number type: with another one, transformers leaves a part of the weights in this.
            how = {"load_in_4bit": True, "backend": "hf", "dtype": self.dtype}
        elif self.to != "lora":
            in_16bit = {"load_in_4bit": False, "dtype": self.merge_dtype} if self.source.in_4bit else {}
            how = {**how, "backend": "hf", **in_16bit}
        model, processor = load_model(folder, **how)
        _check_prompts(encode_rows(self.source, model, processor, self.rows), self.encodings)
        export = probe(model, processor, self.encodings, self.length, like=like)
        if self.to != "merged_4bit":
            stored = [BITS[name] for name in self.report.dtype.split(" and ")]
            self._measure_rounding(model, processor, min(export.bits, like.bits, *stored))
        del model, processor
        _free()
        return export

    def _measure_rounding(self, model: Any, processor: Any, bits: float) -> None:
        """Put down how far rounding may move the logits. The model is of no more use afterwards."""
        del processor
        moved = sensitivity(model, self.encodings, self.run, bits)
        self.report.tolerance = _FACTOR * moved
        self.report.tolerance_is = (
            f"{_FACTOR} x what moving each weight at random by 2^-{bits:g} of it does to the logits ({moved:.3g})"
        )
        del model
        _free()

    def _probe_start(self, load_in_4bit: bool) -> Probe | None:
        """The model that the run started from, fed with the run's answers; None where it is not to be had."""
        self.say("asking the base model")
        assert self.source.base is not None
        try:
            loaded = load_model(self.source.base, **{**self.how, "load_in_4bit": load_in_4bit, "backend": "hf"})
        except ConfigError as error:
            self.report.notes.append(f"not compared with the model that the run started from: {error}")
            return None
        found = probe(*loaded, self.encodings, self.length, like=self.run)
        del loaded
        _free()
        return found

    def _base_in_4bit(self, base: Probe) -> Probe:
        """The base in the form of the export: only the adapter is between the two then."""
        if self.source.in_4bit:
            return base
        in_4bit = self._probe_start(load_in_4bit=True) or base
        self.report.notes.append(f"4 bits alone change the base model's logits by {largest(base, in_4bit):.3g} at most")
        return in_4bit

    def _drop(self) -> None:
        self._loaded = None
        _free()


def _check_prompts(found: list[EncodedPrompt], expected: list[EncodedPrompt]) -> None:
    """``ExportError`` where the export's processor reads a row otherwise than the run's."""
    for row, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        same = one.input_ids == other.input_ids and one.media.keys() == other.media.keys()
        if not same or not all(torch.equal(one.media[key], other.media[key]) for key in one.media):
            raise ExportError(
                f"The export's processor reads row {row} otherwise than the run's ({len(one.input_ids)} and "
                f"{len(other.input_ids)} tokens). It was not kept; report this with the model's name."
            )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
