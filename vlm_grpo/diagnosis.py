"""What goes wrong in a run without stopping it, said once in one sentence: nothing to learn from, or too much of it."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from .ties import Ranges, Tie, is_tied, most_common

_LOG = logging.getLogger("vlm_grpo")

# Groups. Fewer are judged only where every one of them is tied, which four rollouts in a row hardly are by chance.
GROUPS, FEWEST_GROUPS, FEWEST_ROLLOUTS = 64, 16, 4
TOO_HARD = 1 / 3  # of the groups: a third of all generation is paid for and teaches nothing
TOO_EASY = 0.9  # with eight in ten groups solved a run still learns, from the other two
UNCLEAR = 1 / 2
# Logs. Medians of this many, so that one odd batch decides nothing; the first as many are what a run began with.
LOGS = 8
CLIPPED = 1 / 2  # completions cut off: the usual answer is never finished
DRIFT, DRIFT_TOKENS = 3.0, 16  # a factor that a task rarely asks for; and short answers may triple unnoticed
KL_HIGH = 2.0  # nats a token: what is sampled is e² = 7 times as likely as in the reference, token by token
KL_NONE = 1e-6  # nats a token: below the noise of 16-bit weights; a policy that learns leaves it within a few steps
NO_KL_AFTER = 1 / 4  # of the run: by then a warm-up is over
CERTAIN, CERTAIN_SHARE = 0.05, 0.1  # nats a token, and share of the entropy at the start
CONSTANT = 128  # completions with one reward, in eight rollouts or more
RATE_STEPS = 5  # a warm-up starts at 0 for one step, a schedule ends there for one

_TRENDS = ("completions/mean_length", "completions/clipped_ratio", "kl", "entropy")
_REMEDY = "use easier rows, raise num_generations or temperature, or have other prompts drawn (resample_dead_groups)"


class Diagnosis(TrainerCallback):
    """Reads TRL's metrics and every rollout's rewards, and warns, once a run each, of what keeps it from learning.

    It raises nothing. Share of groups without advantage, by rollout: ``groups/dead``, and of those tied at the lowest
    and at the highest reward ``groups/dead_low`` and ``groups/dead_high``.

    Args:
        names: of the reward functions.
        weights: per function.
        group: completions of a prompt.
        metrics: where metrics are gathered, a list by name, until the next log.
        max_length: the limit of a completion, in tokens.
        each: rewards are normalised one by one before TRL adds them up.
        compares: completions of a prompt are compared with each other, and ``kl`` is that of a token. Else groups are
            not looked at, and it is that of a completion.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        group: int,
        metrics: dict[str, list[float]],
        max_length: int,
        each: bool = False,
        compares: bool = True,
    ) -> None:
        self.names, self.weights, self.group, self.each = list(names), list(weights), group, each
        self.compares, self.leash = compares, "beta" if compares else "kl_coef"
        self.metrics, self.max_length = metrics, max_length
        self.ranges = Ranges()
        self._ties: deque[tuple[Tie | None, float]] = deque(maxlen=GROUPS)
        self._rollouts = 0
        self._same: dict[str, tuple[float | None, int, int, bool]] = {}  # value, completions, rollouts, ever another
        self._first: dict[str, list[float]] = {name: [] for name in _TRENDS}
        self._late: dict[str, deque[float]] = {name: deque(maxlen=LOGS) for name in _TRENDS}
        self._rate_zero: int | None = None  # the first step of those in a row whose learning rate was 0
        self._said: list[str] = []

    # ---- what it is shown ---------------------------------------------------------------------------------------

    def drawn(self, rewards: Sequence[Sequence[float]]) -> list[tuple[Tie | None, float]]:
        """Take in groups of completions, whole and in order, and say of each how it is tied, or None.

        Args:
            rewards: (groups x G, functions), NaN where a function gave none.
        """
        self.ranges.widen(rewards)
        ties: list[tuple[Tie | None, float]] = []
        for start in range(0, len(rewards), self.group):
            own = rewards[start : start + self.group]
            tied = is_tied(own, self.weights, self.each)
            ties.append(self.ranges.tie(own, self.weights) if tied else (None, 0.0))
        self._ties.extend(ties)
        return ties

    def rollout(self, rewards: Sequence[Sequence[float]]) -> None:
        """Take in the completions that are trained on, as ``drawn`` does, and log how many of their groups are tied."""
        kinds = [tie for tie, _ in self.drawn(rewards)]
        self._rollouts += 1
        dead = sum(kind is not None for kind in kinds)
        counts = (("dead", dead), ("dead_low", kinds.count("low")), ("dead_high", kinds.count("high")))
        for name, count in counts if self.compares else ():
            self.metrics.setdefault(f"groups/{name}", []).append(count / max(1, len(kinds)))
        for number, name in enumerate(self.names):
            self._note_same(name, [row[number] for row in rewards])

    def _note_same(self, name: str, values: list[float]) -> None:
        value, count, rollouts, varied = self._same.get(name, (None, 0, 0, False))
        known = {None if math.isnan(v) else v for v in values}
        if len(known) == 1 and (not count or known == {value}):
            self._same[name] = (known.pop(), count + len(values), rollouts + 1, varied)
        elif len(known) == 1:
            self._same[name] = (known.pop(), len(values), 1, True)
        else:
            self._same[name] = (None, 0, 0, True)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs: Any):
        if not logs or "loss" not in logs:  # an evaluation's, or the summary at the end
            return
        for name in _TRENDS:
            value = logs.get(name)
            if value is not None and math.isfinite(value):
                few = self._first[name]
                (few if len(few) < LOGS else self._late[name]).append(value)
        rate = logs.get("learning_rate")
        if rate != 0 or any(getattr(args, f"{part}_learning_rate", None) for part in ("vision", "audio", "projector")):
            self._rate_zero = None
        elif self._rate_zero is None:
            self._rate_zero = state.global_step
        if state.is_world_process_zero:
            self._judge_trends(state.global_step, state.max_steps)
            self._judge_rate(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs: Any):
        if state.is_world_process_zero:
            self._judge_constants(state.global_step)
            if self.compares:
                self._judge_groups(state.global_step)

    # ---- what it says -------------------------------------------------------------------------------------------

    def _say(self, what: str, step: int, sentence: str) -> None:
        if what not in self._said:
            self._said.append(what)
            _LOG.warning("Step %d: %s", step, sentence)

    def _judge_groups(self, step: int) -> None:
        ties, kinds = list(self._ties), [kind for kind, _ in self._ties]
        none_lives = len(ties) >= FEWEST_GROUPS and all(kinds)
        if self._rollouts < FEWEST_ROLLOUTS or not (len(ties) == GROUPS or none_lives):
            return

        def tied(kind: Tie, share: float) -> str | None:
            """``38% of the last 64 groups are tied at 0``, where it is more than a share."""
            found = kinds.count(kind) / len(kinds)
            at = f"tied at {most_common(ties, kind):g}" if found and kind != "unscored" else ""
            return f"{found:.0%} of the last {len(kinds)} groups are {at}" if found >= share else None

        if said := tied("low", TOO_HARD):
            self._say(
                "low", step, f"{said}: the task is too hard for this policy. Warm-start it (vlm-grpo sft), {_REMEDY}."
            )
        if said := tied("high", TOO_EASY):
            harder = "Drop the rows that are solved (data.max_pass_rate), or use harder ones"
            self._say("high", step, f"{said}: these rows teach nothing any more. {harder}.")
        if (said := tied("between", UNCLEAR)) and not (
            len(self.names) == 1 and "constant " + self.names[0] in self._said
        ):
            finer = "Use a reward that tells better completions from worse ones, or raise temperature"
            self._say(
                "between", step, f"{said}, neither the lowest nor the highest reward: they teach nothing. {finer}."
            )
        if said := tied("unscored", UNCLEAR):
            self._say(
                "unscored",
                step,
                f"{said}without two completions that have a reward, so there is nothing to compare: the rewards gave "
                "None or failed. Look at rewards/.../failed, and at what the rewards need from a row.",
            )

    def _judge_constants(self, step: int) -> None:
        for number, name in enumerate(self.names):
            value, count, rollouts, varied = self._same.get(name, (None, 0, 0, False))
            if count < CONSTANT or rollouts < LOGS or self.weights[number] == 0:
                continue
            low, high = sorted(self.ranges.of(number), key=lambda end: end * self.weights[number])
            # Of a single reward, the sentences on groups say the same.
            alone = self.compares and len(self.names) == 1 and (value in (low, high) or "between" in self._said)
            if alone or (varied and value == high):  # it has been learned
                continue
            gave = "None for" if value is None else f"{value:g} for"
            self._say(
                f"constant {name}",
                step,
                f'the reward "{name}" gave {gave} every one of the last {count} completions; it teaches nothing. '
                "Check that it reads what the model writes (vlm-grpo reward test), or leave it out.",
            )

    def _judge_trends(self, step: int, last: int) -> None:
        now = {name: statistics.median(late) for name, late in self._late.items() if len(late) == LOGS}
        began = {name: statistics.median(first) for name, first in self._first.items() if len(first) == LOGS}
        length, clipped, kl, entropy = (now.get(name, math.nan) for name in _TRENDS)
        kl = kl if self.compares else kl / max(1.0, length)
        # What is cut off needs no comparison with the start: the first logs tell already.
        clipped = began.get("completions/clipped_ratio", math.nan) if math.isnan(clipped) else clipped
        if clipped >= CLIPPED:
            self._say(
                "clipped",
                step,
                f"{clipped:.0%} of the completions are cut off at max_completion_length={self.max_length} tokens, "
                "before their end. Raise it, or reward shorter completions.",
            )
        self._judge_length(step, began.get("completions/mean_length", math.nan), length)
        self._judge_kl(step, last, kl)
        solved = sum(kind == "high" for kind, _ in self._ties) > len(self._ties) / 2
        start = began.get("entropy", math.nan)
        if entropy < min(CERTAIN, CERTAIN_SHARE * start) and not solved:
            self._say(
                "entropy",
                step,
                f"the entropy fell from {start:.2g} to {entropy:.2g} nats a token: the completions of a prompt are "
                "nearly the same, and little is explored any more. Lower learning_rate, raise temperature, or set "
                "entropy_coef.",
            )

    def _judge_kl(self, step: int, last: int, kl: float) -> None:
        explained = {"low", "high", "between", "unscored", "rate"} & set(self._said)
        if kl > KL_HIGH:
            self._say(
                "kl",
                step,
                f"the KL divergence from the reference is {kl:.3g} nats a token: the policy has left the reference "
                f"behind. Lower learning_rate, or raise {self.leash}, and look at the completions in samples.jsonl.",
            )
        elif abs(kl) < KL_NONE and step >= NO_KL_AFTER * last and not explained:
            self._say(
                "no kl",
                step,
                f"the KL divergence from the reference is still {abs(kl):.1g} nats a token: the policy has not moved. "
                "Raise learning_rate.",
            )

    def _judge_length(self, step: int, before: float, now: float) -> None:
        if not abs(now - before) >= DRIFT_TOKENS:
            return
        if now >= DRIFT * before:
            advice = "If the reward has not risen with them, penalise length, or lower learning_rate."
            how = f"grew from {before:.0f} to {now:.0f} tokens ({now / before:.1f} times as long)"
        elif now * DRIFT <= before:
            advice = "Check that the reward does not favour short completions, or lower learning_rate."
            how = f"shrank from {before:.0f} to {now:.0f} tokens ({now / before:.0%} of their length)"
        else:
            return
        self._say("length", step, f"the completions {how} since the run began. {advice}")

    def _judge_rate(self, step: int, last: int) -> None:
        if self._rate_zero is not None and step - self._rate_zero + 1 >= RATE_STEPS and step < last:
            self._say(
                "rate",
                step,
                f"the learning rate has been 0 since step {self._rate_zero}: nothing is learned. Set learning_rate, "
                "and look at lr_scheduler_type and warmup_steps.",
            )

    # ---- resume -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in plain containers."""
        return {
            "ties": list(self._ties),
            "rollouts": self._rollouts,
            "same": dict(self._same),
            "ranges": dict(self.ranges.seen),
            "first": {name: list(values) for name, values in self._first.items()},
            "late": {name: list(values) for name, values in self._late.items()},
            "rate": self._rate_zero,
            "said": list(self._said),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave; nothing, where a checkpoint holds none."""
        if not state:
            return
        self._ties.extend(state["ties"])
        self._rollouts, self._rate_zero, self._said = state["rollouts"], state["rate"], list(state["said"])
        self._same.update(state["same"])
        self.ranges.seen.update(state["ranges"])
        self._first.update(state["first"])
        for name, values in state["late"].items():
            self._late[name].extend(values)


def install_diagnosis(trainer: Any) -> None:
    """A diagnosis of a GRPO trainer, as ``_diagnosis``."""
    trainer._diagnosis = Diagnosis(
        trainer.reward_func_names,
        trainer.reward_weights.tolist(),
        trainer.num_generations,
        trainer._metrics["train"],
        trainer.args.max_completion_length,
        trainer.multi_objective_aggregation == "normalize_then_sum",
        trainer.compares,
    )
    trainer.add_callback(trainer._diagnosis)


def note_rollout(trainer: Any) -> None:
    """After TRL has scored a rollout: the names that others know its metrics by, and how its groups are tied.

    ``completion_length`` is TRL's ``completions/mean_length``; ``advantage/mean`` and ``advantage/std`` are over the
    completions of all processes. ``kl`` is TRL's own name.
    """
    training = trainer.model.training
    metrics, logs = trainer._metrics["train" if training else "eval"], trainer._logs
    metrics["completion_length"].append(metrics["completions/mean_length"][-1])
    if training:
        metrics["advantage/mean"].append(statistics.fmean(logs["advantages"]))
        some = len(logs["advantages"]) > 1
        metrics["advantage/std"].append(statistics.stdev(logs["advantages"]) if some else 0.0)
        rewards = [logs["rewards"][name] for name in trainer.reward_func_names]
        trainer._diagnosis.rollout(list(zip(*rewards, strict=True)))
