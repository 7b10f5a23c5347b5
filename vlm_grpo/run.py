"""A resolved config to data, model, trainer and artefacts: the one path of every command and of the demo."""

import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .callbacks import (
    CurvesCallback,
    MetricsCallback,
    SamplesCallback,
    SaveEvery,
    StopCallback,
    cut_back,
    graceful_signals,
)
from .card import write_run_card
from .checkpoint import MANIFEST, find_checkpoint, is_whole
from .config import RunConfig, method, require, resolved, said_as
from .critic import saved_values
from .errors import CheckpointError, ConfigError, VLMGRPOError
from .folder import (
    CURVES,
    EVALUATION,
    METRICS,
    NOTES,
    RESULT,
    SAMPLES,
    check_inputs,
    check_run_folder,
    is_main_process,
    open_run_folder,
    read_json,
    run_folder,
    write_json,
)
from .gathering import gather_rows, size_of
from .held_out import HeldOut, run_yardstick
from .models import check_trainable, is_adapter, load_model, refuse_reward_model
from .models.wrappers import is_peft_model
from .notes import kept_warnings
from .pairwise import HeldOutPairs
from .ppo import VLMPPOTrainer
from .ppo_config import VLMPPOConfig
from .preparation import check_size
from .progress import ProgressCallback
from .report import draw_curves, write_report
from .reward_model import VLMRewardConfig, VLMRewardTrainer
from .rewarding import COMMAND as REWARD_TRAIN
from .rewarding import Judging, check_names, make_pairs, read_judging, with_adapter
from .rewards import load_rewards
from .sft import VLMSFTConfig, VLMSFTTrainer
from .trainer import VLMGRPOTrainer
from .trainer_config import VLMGRPOConfig, build_args, one_line

logger = logging.getLogger("vlm_grpo")

# What a run of the command line does where TRL's defaults suit a script: log each step, keep two checkpoints.
_RUN_DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
}
_SECONDS_BETWEEN_SAVES = 120.0
_CONFIGS: dict[str, Any] = {"train": VLMGRPOConfig, "ppo": VLMPPOConfig, "sft": VLMSFTConfig}
_CONFIGS[REWARD_TRAIN] = VLMRewardConfig
# Options whose values a run writes down also where they are a library's defaults, which the next version may change.
_WRITTEN = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("num_generations", "generation_batch_size", "num_iterations", "max_completion_length", "temperature", "top_p"),
    *("beta", "epsilon", "loss_type", "scale_rewards", "gradient_checkpointing", "disable_dropout"),
    *("kl_coef", "kl_estimator", "kl_target", "gamma", "lam", "vf_coef", "cliprange_value", "whiten_advantages"),
    "center_rewards_coefficient",
    *_RUN_DEFAULTS,
)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_dir: its folder.
        steps: optimizer steps taken in all, earlier starts included.
        seconds: training seconds in all.
        metrics: the last logged step's.
        evaluation: held-out figures by name (``before``, ``after``, ``control``), where ``data.eval`` was given.
        stopped: why it ended early (``time limit``, ``SIGTERM``, ``Ctrl-C``), else None.
        left_out: rows without good media by dataset, as the scan found them; and how often a row was left out later,
            by reason.
    """

    run_dir: Path
    steps: int
    seconds: float
    metrics: dict[str, Any]
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def train(config: RunConfig, *, fresh: bool = False, resume_from_checkpoint: str | None = None) -> RunResult:
    """Reinforcement learning by GRPO or PPO, from the start or from where the run folder's last checkpoint is.

    Raises:
        VLMGRPOError: anything about the config, data, rewards or folder that cannot work; nothing is written then.
    """
    return _Run(config, "train").go(fresh, resume_from_checkpoint)


def sft(config: RunConfig, *, fresh: bool = False, resume_from_checkpoint: str | None = None) -> RunResult:
    """Supervised warm start on the completions of the rows; its run folder is a model that ``train`` starts from."""
    return _Run(config, "sft").go(fresh, resume_from_checkpoint)


def reward_train(config: RunConfig, *, fresh: bool = False, resume_from_checkpoint: str | None = None) -> RunResult:
    """A reward model from pairs of responses: its run folder is one that the reward ``model`` of other runs takes."""
    return _Run(config, REWARD_TRAIN).go(fresh, resume_from_checkpoint)


def plan(config: RunConfig, command: str) -> dict[str, Any]:
    """What the run would do, checked as far as it can be without loading the model; touches nothing."""
    run = _Run(config, command)
    check_run_folder(run.config, command)
    checkpoint, _ = find_checkpoint(run_folder(config))
    args = run.args
    rows = {
        "training rows": size_of(run.data),
        "held-out rows": 0 if run.held_out is None else len(run.held_out.rows),
        "rows left out": sum(run.rows.left_out.values()),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "device": str(args.device),
        "trains": "the adapter of the run" if is_adapter(config.model) else str(run.config.parts),
        "starts": f"from {checkpoint.name}" if checkpoint else "from step 0",
    }
    if command == "train":
        prompts = args.generation_batch_size // args.num_generations
        steps = args.max_steps
        if steps <= 0:
            per_step = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
            steps = int(args.num_train_epochs * (len(run.data) // prompts) * per_step)
        rows |= {"prompts per generation": prompts, "completions per prompt": args.num_generations, "steps": steps}
    return {**resolved(run.config), **rows}


class _Run:
    """One run: everything that can fail on bad input happens in ``__init__``, before a file is written."""

    def __init__(self, config: RunConfig, command: str) -> None:
        require(config, command)
        refuse_reward_model(config.model, said_as(command))
        config = with_adapter(config) if command == REWARD_TRAIN else config
        check_trainable(config.model, config.load_in_4bit, config.parts)
        self.command = command
        learns = method(config, command)
        check_names(learns, config.train, _CONFIGS)
        options = {**_RUN_DEFAULTS, **config.train}
        self.args: Any = build_args(_CONFIGS[learns], options, output_dir=str(run_folder(config)))
        self.config = config.model_copy(update={"train": {**_effective(self.args), **config.train}})
        self.rewards, self.weights = load_rewards(config.rewards) if config.rewards else ([], [])
        self.judging: Judging | None = read_judging(config) if command == REWARD_TRAIN else None
        self.rows = gather_rows(config)
        if self.judging is not None:
            make_pairs(self.rows, config, self.judging)
        self.data, self.held_out = self.rows.train, self._held_out()
        _check_trackers(self.args.report_to)
        if config.data.streaming and self.args.max_steps <= 0:
            raise ConfigError(
                "data.streaming=true: a stream does not say how many rows it has, so when to stop. Give --max-steps."
            )
        if self.args.eval_strategy != "no" and self.held_out is None:
            raise ConfigError(
                f"train.eval_strategy={self.args.eval_strategy.value} needs held-out rows. Give them as data.eval."
            )
        if command == "train":
            self.args.reward_weights = self.weights
            check_size(self.data, self.args)

    def _held_out(self) -> HeldOut | HeldOutPairs | None:
        if self.rows.held_out is None:
            return None
        if self.judging is not None:
            return HeldOutPairs(self.rows.held_out, self.args)
        learned = self.args.completion_column if self.command == "sft" else None
        return HeldOut(self.rows.held_out, run_yardstick(self.config, self.rewards, learned), self.args)

    def go(self, fresh: bool, resume_from_checkpoint: str | None) -> RunResult:
        with open_run_folder(self.config, self.command, fresh) as folder:
            self.args.distributed_state.wait_for_everyone()  # the first process may have set the old folder aside
            if is_main_process():
                check_inputs(folder, *self._input_files(), self.rows.kept)
            done = read_json(folder / RESULT)
            if done and resume_from_checkpoint is None and self._is_over(done):
                return RunResult(**{**done, "run_dir": folder})
            checkpoint = self._checkpoint(folder, resume_from_checkpoint)
            model, processor = self._load()
            trainer = self._trainer(model, processor)
            evaluations = read_json(folder / EVALUATION)
            if self.held_out is not None and "before" not in evaluations and checkpoint is None:
                self.held_out.before(trainer, folder, evaluations)
            stop, seconds = self._train(trainer, folder, checkpoint)
            return self._finish(trainer, folder, evaluations, stop, seconds)

    def _input_files(self) -> tuple[list[Path], list[Path]]:
        """The files of rows (and of what a judge reads beside them), and those of rewards."""
        rows = [name for name in (self.config.data.train, self.config.data.eval) if name]
        rewards = [spec.name.rpartition(":")[0] for spec in self.config.rewards if ".py:" in spec.name]
        judged = self.judging.files if self.judging is not None else ()
        return [*(Path(name).expanduser() for name in rows), *judged], [Path(name).expanduser() for name in rewards]

    def _is_over(self, done: dict[str, Any]) -> bool:
        folder, limit = self.config.output, self.config.max_minutes
        if done["stopped"] is None:
            logger.warning("%s: this run is finished (%d steps). --fresh starts it anew.", folder, done["steps"])
            return True
        if limit is not None and done["seconds"] >= 60 * limit:
            logger.warning("%s: its %g minutes are used up. Raise max_minutes to go on.", folder, limit)
            return True
        return False

    def _checkpoint(self, folder: Path, given: str | None) -> Path | None:
        if given is not None and given.lower() not in ("true", "latest"):
            if not Path(given).is_dir():
                raise CheckpointError(f'The checkpoint "{given}" is no folder. Correct the path.')
            if not (Path(given) / "trainer_state.json").is_file():
                raise CheckpointError(f'"{given}" is no checkpoint: it has no trainer_state.json. Correct the path.')
            if (Path(given) / MANIFEST).is_file() and not is_whole(Path(given)):
                raise CheckpointError(
                    f'The checkpoint "{given}" is torn. Leave the option out to take the newest whole.'
                )
            if is_main_process():
                _leave_branch(folder, Path(given).resolve())
            return Path(given).resolve()
        checkpoint, torn = find_checkpoint(folder)
        for path in torn:
            logger.warning("%s is torn (a file of its manifest is missing or has another size): ignored.", path)
        if checkpoint is not None:
            logger.warning("Continuing from %s.", checkpoint)
        return checkpoint

    def _load(self) -> tuple[Any, Any]:
        from transformers import set_seed

        config = self.config
        set_seed(self.args.seed)  # new adapters start from random weights
        return load_model(
            config.model,
            backend=config.backend,
            load_in_4bit=config.load_in_4bit,
            lora=config.lora,
            language=config.language,
            vision=config.vision,
            audio=config.audio,
            projector=config.projector,
            dtype=self._dtype(),
            max_seq_length=config.max_seq_length,
            gradient_checkpointing=self.args.gradient_checkpointing,
        )

    def _dtype(self) -> Any:
        """fp32 where the weights themselves are trained: half precision would round the optimizer's updates away."""
        parts, quantized = self.config.parts, self.config.load_in_4bit
        trains_weights = not parts.apart and not quantized and not is_adapter(self.config.model)
        return "float32" if trains_weights and self.config.dtype == "auto" else self.config.dtype

    def _trainer(self, model: Any, processor: Any) -> Any:
        from transformers import PrinterCallback

        evaluated = self.rows.held_out if self.args.eval_strategy != "no" else None
        try:
            media: dict[str, Any] = {"media": self.config.media, "media_root": self.config.data.media_root}
            if self.command == "train":
                cls: Any = VLMGRPOTrainer
                if self.config.algorithm == "ppo":
                    cls, media["values"] = VLMPPOTrainer, saved_values(self.config.model, is_peft_model(model))
                trainer: Any = cls(model, self.rewards, self.args, self.data, evaluated, processor, **media)
            elif self.judging is not None:
                media |= {"judge": self.judging.judge, "captions": self.judging.captions}
                trainer = VLMRewardTrainer(model, self.args, self.data, evaluated, processor, **media)
            else:
                trainer = VLMSFTTrainer(model, self.args, self.data, evaluated, processor, **media)
        except VLMGRPOError:
            raise
        except (
            ValueError,
            NotImplementedError,
            ImportError,
        ) as error:  # options that TRL or transformers refuse together
            raise ConfigError(f"train: {one_line(error)}") from error
        trainer.remove_callback(PrinterCallback)
        trainer.create_model_card = lambda *_, **__: None  # TRL's knows neither data nor results; ours comes at the end
        return trainer

    def _train(self, trainer: Any, folder: Path, checkpoint: Path | None) -> tuple[StopCallback, float]:
        metrics, samples = folder / METRICS, folder / SAMPLES
        step = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else -1
        for path in (metrics, samples, folder / NOTES):
            if is_main_process():
                cut_back(path, step)
        recorder = MetricsCallback(metrics)
        stop = StopCallback(self.config.max_minutes, recorder.seconds)
        callbacks: list[Any] = [recorder, SaveEvery(_SECONDS_BETWEEN_SAVES), stop]
        if self.command == "train":
            callbacks.append(SamplesCallback(samples, trainer))
        progress = ProgressCallback(said_as(self.command), seconds_left=stop.seconds_left)
        for callback in [*callbacks, CurvesCallback(metrics, folder / CURVES), progress]:
            trainer.add_callback(callback)
        if checkpoint is not None and _is_last(checkpoint):
            _restore(trainer, checkpoint)
            recorder.on_train_begin(trainer.args, trainer.state, trainer.control)
            return stop, recorder.seconds()
        try:
            notes = kept_warnings(folder / NOTES, trainer) if is_main_process() else nullcontext()
            with graceful_signals(stop), notes:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except ImportError as error:  # an optimizer's package
            raise ConfigError(f"train: {one_line(error)}") from error
        finally:
            progress.close()
        return stop, recorder.seconds()

    def _finish(
        self, trainer: Any, folder: Path, evaluations: dict[str, Any], stop: StopCallback, seconds: float
    ) -> RunResult:
        if stop.reason not in ("SIGTERM", "Ctrl-C"):  # these two leave no time; the checkpoint holds everything
            trainer.save_model(str(folder))
            if self.held_out is not None:
                self.held_out.after(trainer, folder, evaluations)
            if is_main_process() and not _is_drawn(folder):
                draw_curves(folder / METRICS, folder / CURVES)
        last = next((dict(logs) for logs in reversed(trainer.state.log_history) if "loss" in logs), {})
        left_out = {**self.rows.left_out, **trainer.intake.left_out}
        result = RunResult(folder, trainer.state.global_step, seconds, last, evaluations, stop.reason, left_out)
        _write(folder / RESULT, {**asdict(result), "run_dir": str(folder)})
        if is_main_process() and stop.reason not in ("SIGTERM", "Ctrl-C"):
            write_run_card(folder, self.config, self.command, size_of(self.data), len(self.rows.held_out or ()))
            try:
                write_report(folder)
            except CheckpointError as error:  # the run is done and saved: a page that has no room takes nothing away
                logger.warning("%s", error)
        return result


def _effective(args: Any) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in _WRITTEN if hasattr(args, name)}
    return {name: getattr(value, "value", value) for name, value in values.items() if name != "report_to"}


def _leave_branch(folder: Path, checkpoint: Path) -> None:
    """Set newer checkpoints of this run aside: the run goes on from an older one, on another branch."""
    for path in folder.glob("checkpoint-*") if checkpoint.parent == folder else ():
        if path.name[11:].isdigit() and int(path.name[11:]) > int(checkpoint.name[11:]):
            number = 1
            while (aside := folder / f"left-{path.name}-{number}").exists():
                number += 1
            path.rename(aside)
    (folder / RESULT).unlink(missing_ok=True)


def _write(path: Path, value: Any) -> None:
    if is_main_process():
        write_json(path, value)


def _check_trackers(names: Any) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names:
        if name not in available:
            raise ConfigError(
                f'train.report_to: "{name}" is not installed or not known here (installed: '
                f"{', '.join(available) or 'none'}). Install it, or leave it out."
            )


def _is_drawn(folder: Path) -> bool:
    """Whether the curves are newer than the figures, as after training; not where there was nothing left to train."""
    curves, metrics = folder / CURVES, folder / METRICS
    return curves.is_file() and metrics.is_file() and curves.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def _is_last(checkpoint: Path) -> bool:
    """Killed between its last checkpoint and its results: transformers would take one more step."""
    state = read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]


def _restore(trainer: Any, checkpoint: Path) -> None:
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
