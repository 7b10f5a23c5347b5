"""``VLMGRPOTrainer``: TRL's GRPOTrainer, with media that reach the loss.

TRL keeps sampling, losses, metrics, tools and logging. This class hides the media from it: every prompt is encoded
once, its encoding travels as one entry of a Python list in TRL's batches, and is collated right before a forward.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from .carry import Row
from .checkpoint import ExactCheckpoints
from .collate import collate, pack_rollout, unpack_rollout
from .config import MediaOptions
from .data import MEDIA_COLUMNS, decoded
from .diagnosis import note_rollout
from .encode import EncodedPrompt
from .errors import UnsupportedError
from .group import from_units, to_units, unique, up_to_end
from .models.adapters import check_policy_adapter, kept_flags, role
from .models.families import family_of, together
from .models.modes import inference_mode, restored, without_checkpointing
from .models.wrappers import is_peft_model
from .numbers import FiniteNumbers
from .patches.transformers import quiet_layerdrop
from .patches.trl import LOG_PROBS, own_grpo_trainer
from .precision import leave_float16
from .preparation import (
    check_processes,
    check_size,
    end_at_any_eos,
    install_checks,
    install_reference,
    mend_adapters,
    mend_heads,
    refuse_untested,
    share_base,
    share_groups,
    suppress_placeholders,
    watch_rewards,
)
from .quantized import trainable_data
from .randomness import same_random_states
from .rates import PartRates
from .resample import check_resampling, replay_rewards, resampled
from .rewards import as_functions, check_finite, marks, say_changed, shown
from .rows import encoded_rows, make_intake, readable
from .scoring import Encodings, as_one_forward, score_rows
from .trainer_config import VLMGRPOConfig

_TRLTrainer: Any = own_grpo_trainer()


class VLMGRPOTrainer(_TRLTrainer, FiniteNumbers, PartRates, ExactCheckpoints):
    """GRPO for prompts with images, videos, sounds and text in one batch. Takes what TRL's ``GRPOTrainer`` takes.

    Rows: of any format that ``vlm_grpo.data`` knows. Canonical is ``prompt`` (messages, or a string to which the chat
    template has been applied) with media columns (``image(s)``, ``video(s)``, ``audio(s)``: a path, bytes, PIL, arrays,
    frames, or a ``datasets`` media column), or with media inside the message parts; other columns go to the reward
    functions, which receive the original rows, media included.

    Differences from TRL: log-probabilities also work without Triton; without PEFT and with ``beta > 0`` the reference
    is a frozen copy of the model as given; the processor you pass is copied and never changed; checkpoints are atomic
    and continue exactly; the completions of a prompt share its work; a run whose media do not reach the loss is
    stopped before step 1, and on step 1 one with a trained tower that receives no gradient.

    Args:
        model: a name, a path, a model or a PEFT model.
        reward_funcs: one or several, TRL's contract ``(prompts, completions, **columns) -> list[float | None]``.
        args: a ``VLMGRPOConfig``, or any ``GRPOConfig``.
        train_dataset: map-style or streaming.
        media_root: the folder that relative media paths start from; by default the current directory.
        media: how media are opened, and what happens to those that cannot be.
        tools: functions that return text; see TRL for this and the other arguments.

    Raises:
        ConfigError: fewer rows than one generation batch needs, or arguments that cannot work together.
        UnsupportedError: ``rollout_func``, ``environment_factory``, vLLM, continuous batching, images from tools.
        DataFormatError: a row that is no sample.
        FlowError: a kind of medium does not reach the log-probabilities.
        GradientError: on step 1, see above.
        SharingError: ``group_sharing=True`` where it would not be exact.
        NumbersError: a loss, a gradient, a generated logit or a weight became NaN or infinite.
        RewardError: a reward that is NaN or infinite.
    """

    _tag_names = ["trl", "grpo", "vlm-grpo"]
    compares = True  # the completions of a prompt with each other

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Any] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        media_root: str | Path | None = None,
        media: MediaOptions | dict[str, Any] | None = None,
    ) -> None:
        args = self._args_of(args)
        refuse_untested(rollout_func=rollout_func, environment_factory=environment_factory)
        check_size(train_dataset, args)
        LOG_PROBS.ensure()
        leave_float16(args, model)
        if args.world_size > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # a rank's micro-batch may hold no image
        self.media_root = None if media_root is None else Path(media_root).expanduser()
        self.media = MediaOptions.of(media)
        train_dataset, pictures = readable(train_dataset, "train_dataset")
        eval_dataset, more = readable(eval_dataset, "eval_dataset")
        self._pictures = pictures | more
        check_policy_adapter(model)
        adapters = trainable_data(model)
        beta, sync = args.beta, args.sync_ref_model
        adapted = is_peft_model(model) or peft_config is not None  # then the base model is the reference
        copies_reference = beta != 0 and not adapted and not isinstance(model, str)
        try:
            if copies_reference:  # TRL would load it again from the path the model once came from
                args.beta, args.sync_ref_model = 0.0, False
            with kept_flags(model):
                super().__init__(
                    model,
                    as_functions(reward_funcs),
                    args,
                    train_dataset,
                    eval_dataset,
                    copy.deepcopy(processing_class),
                    reward_processing_classes,
                    callbacks,
                    optimizers,
                    quantization_config,
                    peft_config,
                    tools,
                )
        finally:
            args.beta, args.sync_ref_model = beta, sync
        watch_rewards(self)
        mend_heads(self)
        if copies_reference:
            install_reference(self)
        mend_adapters(self, adapters)
        self._tokenizer.padding_side = "left"
        quiet_layerdrop(self.accelerator.unwrap_model(self.model))
        suppress_placeholders(self)
        end_at_any_eos(self)
        self._share_groups()
        check_processes(self)
        check_resampling(self)
        self.intake = make_intake(self)
        install_checks(self)
        share_base(self)

    # ---- set-up -------------------------------------------------------------------------------------------------

    def _args_of(self, args: Any) -> VLMGRPOConfig:
        return VLMGRPOConfig.of(args)

    def _share_groups(self) -> None:
        share_groups(self)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", *MEDIA_COLUMNS]

    # ---- rollout ------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            self._flow_check.check_rows(inputs)  # of a streaming dataset; of a table it is long done
        with self.watch("process"):
            rows = self._encoded_rows(inputs)
        # TRL, and what stands in its place, switch checkpointing off and on, and adapters for its reference.
        with restored(self.model), kept_flags(self.model):
            rows = resampled(self, rows)
            batch = super()._generate_and_score_completions(rows)
        note_rollout(self)
        batch["encodings"] = [row.encoding for row in rows]
        with self.watch("logps"):
            self._add_old_and_ref_logps(batch)
        if self.log_completions and self.log_multimodal:
            pictures = [[m.open(self.media) for m in row.sample.media if m.kind == "image"] for row in rows]
            self._logs["images"].extend(gather_object(pictures))
        # TRL shuffles and splits what it gets: groups, so that the completions of a prompt stay together.
        return to_units(batch, self._unit) if self.model.training else batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        return from_units(inputs) if self.model.training else inputs

    def _encoded_rows(self, inputs: list[dict[str, Any]]) -> list[Row]:
        return encoded_rows(self, inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        encodings = [prompt.encoding for prompt in prompts]
        fields = {"encodings": encodings, "drawn": [prompt.drawn for prompt in prompts]}
        return [list(encoded.input_ids) for encoded in encodings], None, fields

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        encodings = multimodal_fields.get("encodings")
        if encodings is None:
            raise UnsupportedError("A tool returned an image, which has no test yet. Return text from tools.")
        if None not in (drawn := multimodal_fields.get("drawn", [None])):
            return [own.ids for own in drawn], None if drawn[0].logprobs is None else [own.logprobs for own in drawn]
        completions, logprobs = {}, {}
        with inference_mode(self.model, self.generation_config, keep_dropout=True):
            for rows in together(family_of(self.model.config), encodings):
                ids, own = [prompt_ids[row] for row in rows], [encodings[row] for row in rows]
                with self.watch("generate"), self.numbers.generating(ids, own) as generated:
                    out, logps = self._generate_shared(ids, own), None
                    if out is None:
                        extra = [len(row) - len(encoded.input_ids) for row, encoded in zip(ids, own, strict=True)]
                        fields = collate(own, extra=extra)
                        out, logps = super()._generate_single_turn(ids, None, fields, *args, **kwargs)
                    generated += out
                completions |= dict(zip(rows, out, strict=True))
                logprobs |= dict(zip(rows, logps or [None] * len(rows), strict=True))
        ordered = range(len(encodings))
        known = all(logprobs[row] is not None for row in ordered)
        return [completions[row] for row in ordered], [logprobs[row] for row in ordered] if known else None

    def _generate_shared(self, prompt_ids: list[list[int]], encodings: list[EncodedPrompt]) -> list[list[int]] | None:
        """Completions with each prompt prefilled once, as TRL's method gives them; None where that cannot be."""
        if not self.sharing.generates(self.model, encodings):
            return None
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id
        prompts, index = unique(prompt_ids, encodings)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            sequences = self.sharing.generate(model, prompts, index, self.generation_config, pad, device)
        return None if sequences is None else up_to_end(sequences, self.eos_token_ids)

    def _add_old_and_ref_logps(self, batch: dict[str, Any]) -> None:
        """The two log-probabilities that TRL takes before it has the encodings, under TRL's own conditions."""
        train = self.model.training
        size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)

        def logps(model: Any) -> Tensor | None:
            width = batch["completion_ids"].size(1)
            return self._get_per_token_logps_and_entropies(
                model, ids, mask, width, size, num_images=batch["encodings"]
            )[0]

        with torch.no_grad(), without_checkpointing(self.model):
            if self._needs_old():
                batch["old_per_token_logps"] = logps(self.model)
            if self._needs_reference() and self.ref_model is not None:
                batch["ref_per_token_logps"] = logps(self.ref_model)
            elif self._needs_reference():
                policy = self.accelerator.unwrap_model(self.model)
                with role(policy, "ref" if "ref" in policy.peft_config else None):
                    batch["ref_per_token_logps"] = logps(self.model)

    def _calculate_rewards(self, inputs: list[Row], prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if inputs[0]["prompt"].drawn is not None:
            return replay_rewards(self, inputs)
        self.numbers.after_generation()
        rows = {id(row.original): row.original for row in inputs}  # a group shares one
        opened = {key: decoded(row, self._pictures) for key, row in rows.items()}
        originals = [opened[id(row.original)] for row in inputs]
        prompts = [original["prompt"] for original in originals]
        self.failures.begin()
        with shown(self.reward_funcs, originals, inputs):
            rewards = super()._calculate_rewards(originals, prompts, completions, completion_ids_list)
        for number, function in enumerate(self.reward_funcs):
            if isinstance(function, nn.Module):
                first, name = self.accelerator.process_index * len(inputs), self.reward_func_names[number]
                shown_to = {"prompts": prompts, "completions": completions}
                check_finite(rewards[first : first + len(inputs), number], name, shown_to)
                check_finite(rewards[:, number], name, {})  # another process's
        # TRL's table and samples.jsonl show it beside the completion, unless a reward has logged its own.
        if "answer" in originals[0] and "answer" not in self._pending_extra_logs:
            self._log_completion_extra("answer", [original["answer"] for original in originals])
        return self.failures.mask(rewards)

    def _needs_old(self) -> bool:
        return bool(self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations))

    def _needs_reference(self) -> bool:
        return self.beta != 0

    # ---- loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # TRL hands this entry on to the method below untouched: the one way through its fixed list of arguments.
        inputs["num_images"] = Encodings(inputs["encodings"], self._idle(inputs))
        loss = super()._compute_loss(model, inputs)
        return self.numbers.note(self._whole_loss(loss, inputs), inputs)

    def _whole_loss(self, loss: Tensor, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss, and what a subclass adds to it."""
        return loss

    def _idle(self, inputs: dict[str, Any]) -> list[bool]:
        """Of each row, whether nothing in the loss has a gradient for it."""
        exact = self.beta == 0 and not self._entropy_bonus_enabled and not self.aux_loss_enabled
        if not exact or self.args.world_size > 1:  # DDP waits for every parameter
            return [False] * len(inputs["encodings"])
        zero = (inputs["advantages"].reshape(len(inputs["encodings"]), -1) == 0).all(1).tolist()
        ready = {
            senses: self.sharing.moved.cover(self.model, senses) for senses in {e.senses for e in inputs["encodings"]}
        }
        return [none and ready[e.senses] for none, e in zip(zero, inputs["encodings"], strict=True)]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        num_images: list[EncodedPrompt] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities (B, T) in nats at the sampling temperature, entropies (B, T) and the router loss.

        ``num_images`` carries the rows' encodings. Without them (TRL's own call while it scores a rollout) the
        answer is None, three times; ``_add_old_and_ref_logps`` follows.
        """
        if num_images is None:
            return None, None, None
        rows = num_images if isinstance(num_images, Encodings) else Encodings(num_images)
        score = partial(self._score_rows, input_ids, attention_mask, logits_to_keep, rows, batch_size, compute_aux_loss)
        # Also where others fall back, and this one does not.
        logps, entropies, aux_loss, *self._beside = as_one_forward(model, score)
        if entropies is not None:  # hooks of what leaves DDP are given None where the loss does not use it
            entropies = entropies.view_as(entropies)
        for output in (logps, entropies if compute_entropy else None):
            self._gradient_check.watch(output, [encoded.senses for encoded in rows])
        self.numbers.said.watch(logps, rows)
        return logps, entropies if compute_entropy else None, aux_loss

    def _score_rows(self, *arguments: Any) -> tuple[Any, ...]:
        """What ``scoring.score_rows`` gives, and behind it what else a subclass takes from the same forward."""
        return score_rows(self, *arguments)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with same_random_states():  # a run trains on the same completions, evaluated or not
            return super().evaluate(*args, **kwargs)

    # ---- resume -------------------------------------------------------------------------------------------------

    def _resume_state(self) -> dict[str, Any]:
        state = {
            "step": self._step,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "entropy": (self.entropy_coef, self._last_world_entropy),
            "moved": sorted(self.sharing.moved.names),
            "diagnosis": self._diagnosis.state(),
            "failures": self.failures.state(),
            "judges": marks(self.reward_funcs),
        }
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            state["rollout"] = pack_rollout([from_units(batch) for batch in self._buffered_inputs])
        return state

    def _load_resume_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._metrics["train"].update(state["metrics"])
        self.entropy_coef, self._last_world_entropy = state["entropy"]
        self.sharing.moved.names.update(state.get("moved", ()))
        self._diagnosis.load(state.get("diagnosis", {}))
        self.failures.load(state.get("failures", {}))
        say_changed(self.reward_funcs, state.get("judges", {}))
        if "rollout" in state:
            batches = unpack_rollout(state["rollout"], self.accelerator.device)
            self._buffered_inputs = [to_units(batch, self._unit) for batch in batches]
