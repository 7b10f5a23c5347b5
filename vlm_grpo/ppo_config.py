"""VLMPPOConfig: every option of VLMGRPOConfig, and what PPO has beyond it, by the names of TRL's former PPOConfig."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .advantages import KLController
from .errors import ConfigError, UnsupportedError
from .patches.trl import own_grpo_config
from .trainer_config import VLMGRPOConfig, no_choice

_TRLConfig: Any = own_grpo_config()
_ESTIMATORS = ["k1", "k1_clamped", "k3"]
_LOSSES = ("dapo", "bnpo", "grpo", "dr_grpo")


@dataclass
class VLMPPOConfig(VLMGRPOConfig):
    """Options of ``VLMPPOTrainer``.

    Some of GRPO's mean what PPO calls otherwise: ``num_generations`` is the completions of a prompt (1 will do),
    ``num_iterations`` the PPO epochs of a rollout, ``epsilon`` the clip of the policy's ratio. A rollout has
    ``steps_per_generation / gradient_accumulation_steps`` mini-batches.

    Raises:
        ConfigError: values that cannot work together.
        UnsupportedError: an option that this trainer has no test for.
    """

    fewest_generations: ClassVar[int] = 1

    num_generations: int | None = field(default=1, metadata={"help": "Completions of a prompt; 1 or more."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: how often a rollout is trained on."})
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Weight of the KL penalty in each token's reward; with kl_target the one to begin with."},
    )
    kl_estimator: Literal["k1", "k1_clamped", "k3"] = field(
        default="k1",
        metadata={
            "help": "The KL penalty of a token: k1 is the difference of the log-probabilities, k1_clamped "
            "that or 0, k3 the always positive estimate of less variance (Schulman 2020)."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL of a completion, in nats, that kl_coef is adapted to reach. Default: kl_coef is fixed."},
    )
    kl_horizon: int = field(
        default=10000, metadata={"help": "Completions over which kl_coef adapts to kl_target (Ziegler et al. 2019)."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of a token's reward for the token before it."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalised advantage estimate."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss; 0 trains without values."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "How far a value may move from the rollout's in its loss; null: any way."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Bring a rollout's advantages to mean 0 and variance 1."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Bring the rewards of a rollout's tokens to variance 1."}
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Bring scores to mean 0 and variance 1 by all that the run has seen so far."}
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Keep scores, normalised or not, between minus this and this."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a completion that does not end: a positive number."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value adapter and its head. Default: learning_rate."}
    )

    def __post_init__(self) -> None:
        _refuse(self)
        if self.per_device_train_batch_size is None and (self.num_generations or 1) == 1:
            self.per_device_train_batch_size = 8  # TRL's own
        super().__post_init__()

    def _derive(self) -> None:
        if self.num_generations == 1:
            _derive_single(self)
        else:
            super()._derive()

    @classmethod
    def of(cls, args: Any = None) -> "VLMPPOConfig":
        """``args`` as a ``VLMPPOConfig``: see ``VLMGRPOConfig.of``.

        Raises:
            ConfigError: ``args`` is no such config, or asks for something refused.
        """
        config = super().of(args)
        assert isinstance(config, cls), "the parent makes one of this class"
        _refuse(config)
        return config


def _refuse(config: Any) -> None:
    """What only makes sense where completions are compared, or where the KL is in the loss."""
    if config.beta:
        raise ConfigError(
            f"beta={config.beta}: that is the KL in GRPO's loss. PPO's is in the rewards: give kl_coef, and leave beta "
            "out."
        )
    if config.missing_eos_penalty and config.mask_truncated_completions:
        raise ConfigError(
            "missing_eos_penalty beside mask_truncated_completions: what is masked learns from no penalty. Leave one "
            "of them out."
        )
    if config.scale_rewards not in ("group", True):
        raise ConfigError(
            f"scale_rewards={config.scale_rewards}: PPO compares no group. Leave it out; there are whiten_advantages "
            "and normalize_scores."
        )
    KLController(config.kl_coef, config.kl_target, config.kl_horizon)  # says what cannot be
    if config.resample_dead_groups:
        raise ConfigError(
            f"resample_dead_groups={config.resample_dead_groups}: PPO compares no group, none is dead. Leave it out."
        )
    if config.kl_estimator not in _ESTIMATORS:
        raise ConfigError(no_choice("kl_estimator", config.kl_estimator, _ESTIMATORS))
    if config.loss_type not in _LOSSES:
        raise ConfigError(
            f'loss_type="{config.loss_type}" is not PPO\'s clipped loss. Give one of {", ".join(_LOSSES)}.'
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError(
            f'multi_objective_aggregation="{config.multi_objective_aggregation}" normalises the rewards of a group. '
            "PPO adds them up by their weights: leave it out."
        )
    if config.value_learning_rate is not None and config.vf_coef == 0:
        raise ConfigError(
            f"value_learning_rate={config.value_learning_rate:g} beside vf_coef=0: without a value loss no values are "
            "trained. Leave one of them out."
        )
    for name in ("sync_ref_model", "off_policy_mask_threshold"):
        if getattr(config, name, None):
            raise UnsupportedError(f"{name}={getattr(config, name)} has no test with PPO yet. Leave it out.")


def _derive_single(config: Any) -> None:
    """TRL's ``__post_init__`` for one completion of a prompt, which it refuses: the batch sizes that it derives.

    Repeated here are the lines of ``GRPOConfig.__post_init__`` (TRL 1.15) that are about batches.
    """
    super(_TRLConfig, config).__post_init__()
    config.scale_rewards = {True: "group", False: "none"}.get(config.scale_rewards, config.scale_rewards)
    each = config.per_device_train_batch_size * config.world_size
    if config.generation_batch_size is not None and config.steps_per_generation is not None:
        raise ValueError(
            "'generation_batch_size' and 'steps_per_generation' can not be both configured at the same time"
        )
    if config.generation_batch_size is not None:
        if config.generation_batch_size % each:
            raise ValueError(
                f"generation_batch_size ({config.generation_batch_size}) must be divisible by the global batch size "
                f"({each})."
            )
        config.steps_per_generation = config.generation_batch_size // each
    else:
        config.steps_per_generation = config.steps_per_generation or config.gradient_accumulation_steps
        config.generation_batch_size = each * config.steps_per_generation
    group = config.num_generations_eval or 1
    if (
        config.do_eval
        and config.eval_strategy != "no"
        and config.per_device_eval_batch_size * config.world_size % group
    ):
        raise ValueError(
            f"The global eval batch size ({config.per_device_eval_batch_size} * {config.world_size}) must be "
            f"divisible by the number of generations used for evaluation ({group})."
        )
