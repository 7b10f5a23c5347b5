"""The same completion scored in three ways: by the row alone, in a training batch, and in the trainer's generation."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..encode import EncodedPrompt
from ..errors import FlowError, VLMGRPOError
from ..models.families import family_of, together
from .rows import Probe
from .still import counting, replaced

ANYWAY = "flow_check=False trains all the same."


class Forwards:
    """Forwards of a trainer's model, without gradient. What they raise becomes a ``FlowError`` that names the rows.

    Attributes:
        family: how messages call the model.
        precision: the coarsest type that its forwards round to.
        mixed: whether rows of several prompts share a batch.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.device = trainer, trainer.accelerator.device
        self.model: Any = trainer.accelerator.unwrap_model(trainer.model)
        self.family = f"model type {getattr(self.model.config, 'model_type', type(self.model).__name__)}"
        self.precision = _precision(trainer, self.model)
        # Rows share a forward as they do in the run: where a generation has one prompt, no other row ever meets it.
        self._rows = trainer.args.per_device_train_batch_size
        self._prompts = -(-self._rows * trainer.args.steps_per_generation // trainer.num_generations)
        self.mixed = self._prompts > 1

    def alone(self, probe: Probe) -> tuple[Tensor, Counter[str]]:
        """(T,) log-probs of one row given to the model as the processor made it, and the features made of its media."""
        encoding, tail = probe.encoding, torch.tensor([probe.completion], device=self.device)
        inputs: dict[str, Any] = {key: value.to(self.device) for key, value in encoding.media.items()}
        for key, value in encoding.tokens.items():  # type ids are an answer's; a mask over media stays as it ends
            last = value[:, -1:] if value.ndim > 2 else value.new_full((1, 1), encoding.after.get(key, 0))
            inputs[key] = torch.cat([value, last.repeat_interleave(tail.size(1), 1)], 1).to(self.device)
        ids = torch.cat([torch.tensor([encoding.input_ids], device=self.device), tail], 1)
        labels = ids.clone()
        labels[:, : -tail.size(1)] = -100
        inputs |= {**encoding.options, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        autocast = self.trainer.accelerator.autocast
        with self._named("the model refuses", [probe]), counting(self.model) as made, autocast():
            logps = self.model(**inputs, fused_lm_head=True).log_probs[0, -tail.size(1) :]
        return self._finite(logps.float(), [probe]), made

    def score(self, probes: list[Probe], encodings: list[EncodedPrompt] | None = None) -> Tensor:
        """(rows, T) log-probs as the loss takes them, in batches as large as the run's.

        Args:
            probes: the rows.
            encodings: of the same tokens, in the place of the rows' own.
        """
        encodings = encodings or [probe.encoding for probe in probes]
        rows = [[*encoding.input_ids, *probe.completion] for encoding, probe in zip(encodings, probes, strict=True)]
        width = max(map(len, rows))
        pad = self.trainer._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        with self._named("the training forward fails on", probes):
            logps = self.trainer._get_per_token_logps_and_entropies(
                self.model, ids, mask, len(probes[0].completion), self._rows, num_images=encodings
            )[0]
        return self._finite(logps.float(), probes)

    def counted(self, probes: list[Probe]) -> tuple[Tensor, Counter[str]]:
        """``score``, and the features that were made."""
        self.trainer.sharing.forget()  # what is known already is not made again
        with counting(self.model) as made:
            return self.score(probes), made

    def rollout(self, probes: list[Probe]) -> Tensor:
        """(rows, T) log-probs of the completions, out of the logits of the trainer's own generation."""
        pieces: list[Tensor] = []
        done: list[tuple[int, Tensor]] = []
        generate = self.model.generate

        def forced(rows: list[Probe]) -> Callable[..., Tensor]:
            def run(**arguments: Any) -> Tensor:
                start = arguments["input_ids"].size(1)
                config = copy.deepcopy(arguments["generation_config"])
                config.max_new_tokens = len(rows[0].completion)
                config.output_logits = config.return_dict_in_generate = True
                output = run.generate(
                    **{**arguments, "generation_config": config},
                    prefix_allowed_tokens_fn=lambda row, ids: [rows[row].completion[len(ids) - start]],
                )
                logits = torch.stack(output.logits, 1).float() / self.trainer.temperature
                tokens = torch.tensor([row.completion for row in rows], device=logits.device)
                pieces.append(logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].to(self.device))
                return output.sequences

            run.generate = generate  # where sharing needs another, it is put here
            return run

        for numbers in self._together(probes):
            rows = [probes[number] for number in numbers]
            fields = {"encodings": [row.encoding for row in rows]}
            ids = [list(row.encoding.input_ids) for row in rows]
            with self._named("generation fails on", rows), replaced(self.model, "generate", forced(rows)):
                self.trainer._generate_single_turn(ids, None, fields, self.trainer.num_generations)
            done += zip(numbers, pieces.pop(), strict=True)
        return self._finite(torch.stack([logps for _, logps in sorted(done, key=lambda pair: pair[0])]), probes)

    def _together(self, probes: list[Probe]) -> Iterator[list[int]]:
        """The rows of each call of ``generate``, as the run would part them."""
        family = family_of(self.model.config)
        for start in range(0, len(probes), self._prompts):
            encodings = [probe.encoding for probe in probes[start : start + self._prompts]]
            for rows in together(family, encodings):
                yield [start + row for row in rows]

    def rounding(self, probe: Probe) -> float:
        """Mean move of a row's log-probs when its text is rounded once: deep or untrained models make much of it."""
        generator = torch.Generator(self.device).manual_seed(0)

        def rounded(module: Any, arguments: Any, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator, device=output.device)
            return (output.float() * (1 + torch.finfo(self.precision).eps * noise)).to(output.dtype)

        exact = self.alone(probe)[0]
        handle = self.model.get_input_embeddings().register_forward_hook(rounded)
        try:
            return float((self.alone(probe)[0] - exact).abs().mean())
        finally:
            handle.remove()

    def _finite(self, logps: Tensor, probes: list[Probe]) -> Tensor:
        for row, probe in zip(logps.reshape(len(probes), -1), probes, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise FlowError(
                    f"The log-probabilities of {probe.sample.where} are NaN or infinite before the first step "
                    f"({self.family}). fp16 overflows in models made for bf16: train in bf16 or fp32."
                )
        return logps

    @contextmanager
    def _named(self, what: str, probes: list[Probe]) -> Iterator[None]:
        """Whatever a forward raises, as one sentence; a full memory stays what it is."""
        try:
            yield
        except (VLMGRPOError, torch.OutOfMemoryError):
            raise
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
            kinds = dict.fromkeys(kind for probe in probes for kind in probe.kinds or ("text",))
            raise FlowError(
                f"Before the first step {what} {places(probes)} with {' and '.join(kinds)} ({reason}; {self.family}). "
                "Tensors are missing or changed on the way to the model, or it cannot take these rows: the run would "
                f"fail in the same way. {ANYWAY}"
            ) from error


def places(probes: list[Probe]) -> str:
    """Where the rows are, for a message."""
    return ", ".join(probe.sample.where for probe in probes)


def _precision(trainer: Any, model: nn.Module) -> torch.dtype:
    types = {parameter.dtype for parameter in model.parameters()}
    if trainer.args.bf16 or torch.bfloat16 in types or getattr(model, "is_quantized", False):
        return torch.bfloat16
    on_gpu = (
        trainer.accelerator.device.type != "cpu"
    )  # which convolve in TF32, as coarse as fp16, unless told otherwise
    return torch.float16 if trainer.args.fp16 or torch.float16 in types or on_gpu else torch.float32
