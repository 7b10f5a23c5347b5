"""What a page says of a run in words and figures: its options, how it ended, what it answers on held-out rows."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..config import said_as
from .embed import short
from .records import duration, finite, number

REWARD_TRAIN = "reward-train"
UNREWARDED = ("sft", REWARD_TRAIN)  # commands that learn from no rewards, and write no samples
_STATES = {"before": "before training", "after": "after training"}
_CONTROLS = {"blank": "media blanked", "shuffle": "other rows' media", "text": "media left out"}
_OPTIONS = {
    "num_generations": "completions per prompt",
    "learning_rate": "learning rate",
    "beta": "beta (KL)",
    "kl_coef": "KL penalty (kl_coef)",
    "kl_target": "KL to reach",
    "gamma": "gamma",
    "lam": "lambda",
    "vf_coef": "weight of the value loss",
    "loss_type": "loss",
    "scale_rewards": "reward scaling",
    "temperature": "temperature",
    "max_completion_length": "most tokens of a completion",
    "seed": "seed",
}
_OF_GROUPS = ("beta", "scale_rewards")  # which PPO has no use for


class State(NamedTuple):
    """A line of the held-out table.

    Attributes:
        title: whose answers.
        accuracy, low, high: the share of right answers and its 95% interval, 0 to 1.
        rows: how many rows.
    """

    title: str
    accuracy: float | None
    low: float | None
    high: float | None
    rows: str


class Outcome(NamedTuple):
    """The held-out figures.

    Attributes:
        states: the accuracies.
        change: what training changed, as a sentence.
        further: name and values of each other figure, a value a state.
        parts: breakdowns: the column, headings, and lines of a value and its figures.
    """

    states: list[State]
    change: str
    further: list[tuple[str, list[str]]]
    parts: list[tuple[str, list[str], list[tuple[str, list[str]]]]]


def read_config(run: Path) -> tuple[str, dict[str, Any]]:
    """(command, config) of config.yaml; empty where there is none that can be read."""
    path = run / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "", {}
    first = text.partition("\n")[0]
    command = first.rpartition(" ")[2] if first.startswith("# vlm-grpo ") else ""
    return command, config if isinstance(config, dict) else {}


def ending(result: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """How the run ended, in a few words."""
    last = _last_step(records)
    steps, seconds = finite(result.get("steps")), finite(result.get("seconds"))
    if steps is None or went_on(result, records):
        return "nothing logged yet" if last is None else f"not finished: {last:.0f} steps logged so far"
    took = f" in {duration(seconds)}" if seconds is not None else ""
    why = result.get("stopped")
    return f"stopped by {why} after {steps:.0f} steps{took}" if why else f"finished: {steps:.0f} steps{took}"


def went_on(result: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether a run that had stopped was continued since: its result, and figures after training, are of then."""
    last, steps = _last_step(records), finite(result.get("steps"))
    return last is not None and steps is not None and last > steps


def _last_step(records: list[dict[str, Any]]) -> float | None:
    return max((step for record in records if (step := finite(record.get("step"))) is not None), default=None)


def run_facts(
    command: str, config: dict[str, Any], result: dict[str, Any], versions: list[str]
) -> list[tuple[str, str]]:
    """(name, value) of what the run was made from and with."""
    data, train = _mapping(config.get("data")), _mapping(config.get("train"))
    facts = [("command", f"vlm-grpo {said_as(command)}" if command else "")]
    is_ppo = config.get("algorithm") == "ppo"
    facts += [("algorithm", "PPO" if is_ppo else "")]
    facts += [("model", _name(config.get("model"))), ("trained", _trained(config))]
    rows = "pairs" if command == REWARD_TRAIN else "rows"
    facts += [(f"training {rows}", _name(data.get("train"))), (f"held-out {rows}", _name(data.get("eval")))]
    paid, watched = _rewards(config) if command not in UNREWARDED else ([], [])
    facts += [("rewards", ", ".join(paid)), ("watched, no part of the reward", ", ".join(watched))]
    facts += [("captions for the judge", _name(_mapping(config.get("judge")).get("captions")))]
    facts += [("prompts left out", _counts(result.get("left_out")))]
    options = {key: title for key, title in _OPTIONS.items() if not (is_ppo and key in _OF_GROUPS)}
    facts += [(title, as_text(train.get(key))) for key, title in options.items()]
    facts += [("made with", ", ".join(versions))]
    return [(name, value) for name, value in facts if value]


def read_versions(run: Path) -> list[str]:
    """What the run was made with, as its model card says; empty where it has none yet."""
    try:
        card = (run / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines = card.partition("\n## Versions\n")[2].partition("\n## ")[0].splitlines()
    return [line[2:].strip()[:80] for line in lines if line.startswith("- ")]


def evaluation_facts(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what ``vlm-grpo eval`` was asked for."""
    settings = _mapping(evaluation.get("settings"))
    named = {"run": "model", "baseline": "baseline", "data": "held-out rows"}
    facts = [(named.get(name, name.replace("_", " ")), value) for name, value in settings.items()]
    return [(str(name), _name(value)) for name, value in facts if isinstance(value, (str, int, float)) and value != ""]


def outcome(evaluation: dict[str, Any], watched: Collection[str] = ()) -> Outcome | None:
    """The figures of evaluation.json; None where it has none.

    Args:
        evaluation: the file's object.
        watched: names of rewards that are no part of the reward.
    """
    found = states_of(evaluation)
    if not found:
        return None
    states = [state_of(title, state) for title, state in found.items()]
    flat = [_flat(state, watched) for state in found.values()]
    names = dict.fromkeys(name for state in flat for name in state)
    further = [(name, [state.get(name) or "–" for state in flat]) for name in names]
    baseline = _mapping(evaluation.get("settings")).get("baseline")
    words = (
        "The accuracy differs from the baseline's"
        if baseline not in (None, "base")
        else "Training changed the accuracy"
    )
    return Outcome(states, change_of(_mapping(evaluation.get("change")), words), further, _parts(found))


def states_of(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What evaluation.json holds of each state, by whose answers they are; those without an accuracy are left out."""
    titles = {**_STATES, **_compared(evaluation)}
    after = titles["after"].removesuffix(" training")
    titles |= {key: f"{after}, {control}" for key, control in controls_of(evaluation).items()}
    found = {title: _mapping(evaluation.get(key)) for key, title in titles.items()}
    return {title: state for title, state in found.items() if finite(state.get("accuracy")) is not None}


def state_of(title: str, state: dict[str, Any]) -> State:
    """A line of the held-out table."""
    # Without a verdict on any row there is an accuracy of nothing: 0, between 0 and 1.
    judged = not state.get("unscored") or state.get("unscored") != state.get("rows")
    low, high = interval(state.get("ci95")) if judged else (None, None)
    accuracy = finite(state.get("accuracy")) if judged else None
    return State(title, accuracy, low, high, as_text(state.get("rows")))


def _compared(evaluation: dict[str, Any]) -> dict[str, str]:
    """What ``vlm-grpo eval`` compared; a run's own evaluation says nothing of it."""
    settings = _mapping(evaluation.get("settings"))
    models = {"before": settings.get("baseline"), "after": settings.get("run")}
    return {key: "the base model" if model == "base" else _name(model) for key, model in models.items() if model}


def controls_of(evaluation: dict[str, Any]) -> dict[str, str]:
    """What was done to the media, by the states that are controls."""
    kinds = {
        key: str(_mapping(evaluation[key]).get("kind", "blank")) for key in evaluation if key.startswith("control")
    }
    return {key: _CONTROLS.get(kind, f"media changed ({kind})") for key, kind in kinds.items()}


def _flat(state: dict[str, Any], watched: Collection[str]) -> dict[str, str]:
    """The further figures of a state, by name."""
    out: dict[str, str] = {}
    for key in ("reward", "war", "uar"):
        if finite(state.get(key)) is not None:
            out[{"reward": "mean reward"}.get(key, key.upper())] = as_text(state[key])
    rewards = _mapping(state.get("rewards"))
    if len(rewards) > 1 or "reward" not in state:
        for name, value in rewards.items():
            out[f"mean of {short(str(name))}" + (" (watched)" if name in watched else "")] = as_text(value)
    out |= {f"pass@{k}": as_text(value) for k, value in _mapping(state.get("pass@k")).items()}
    for name, value in _mapping(state.get("yes_no")).items():
        out[f"yes/no {str(name).replace('_', ' ')}"] = as_text(value)
    for key, title in (("unscored", "rows without a verdict"), ("left_out", "left out"), ("failed", "failed rewards")):
        if state.get(key):
            out[title] = _counts(state[key])
    return out


def change_of(change: dict[str, Any], words: str, of: str = "rows") -> str:
    """``words by +2.0 points (95% interval ...)``: what evaluation.json says of the change; empty where nothing."""
    difference, (low, high) = finite(change.get("difference")), interval(change.get("ci95"))
    if difference is None or change.get("rows") == 0:
        return ""
    words += f" by {100 * difference:+.1f} points"
    words += f" (95% interval {100 * low:+.1f} to {100 * high:+.1f})" if low is not None and high is not None else ""
    p, rows = finite(change.get("p")), finite(change.get("rows"))
    small = "p < 0.001" if p is not None and p < 0.001 else f"p = {p:.3f}" if p is not None else ""
    paired = f"the same {rows:.0f} {of} before and after" if rows is not None else ""
    return "; ".join(part for part in (words, small, paired) if part) + "."


def _parts(found: dict[str, dict[str, Any]]) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """(column, headings, lines) of each breakdown."""
    columns = dict.fromkeys(name for state in found.values() for name in _mapping(state.get("by")))
    out = []
    for column in columns:
        by = {key: _mapping(_mapping(state.get("by")).get(column)) for key, state in found.items()}
        values = list(dict.fromkeys(value for part in by.values() for value in part))
        headings = ["rows", *by]
        lines = []
        for value in values:
            cells = {key: _mapping(part.get(value)) for key, part in by.items()}
            rows = next((cell["rows"] for cell in cells.values() if cell.get("rows") is not None), None)
            lines.append((str(value) or "(none)", [as_text(rows), *(_share(cell) for cell in cells.values())]))
        out.append((str(column), headings, lines))
    return out


def _share(cell: dict[str, Any]) -> str:
    accuracy, (low, high) = finite(cell.get("accuracy")), interval(cell.get("ci95"))
    if accuracy is None:
        return "–"
    return f"{accuracy:.1%}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else "")


def interval(value: Any) -> tuple[float | None, float | None]:
    """The two ends of an interval; None where it has none."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None, None
    return finite(value[0]), finite(value[1])


def _trained(config: dict[str, Any]) -> str:
    lora = config.get("lora")
    base = "4-bit base, " if config.get("load_in_4bit") else ""
    if isinstance(lora, dict):
        return f"{base}LoRA of rank {as_text(lora.get('r'))}"
    return f"{base}all weights" if "lora" in config else ""


def _rewards(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The rewards with their weights, and those of weight 0."""
    specs = config.get("rewards")
    found = [_mapping(spec) for spec in specs] if isinstance(specs, list) else []
    paid, watched = [], []
    for spec in found:
        judge = _name(_mapping(spec.get("kwargs")).get("model"))
        name, weight = _name(spec.get("name")) + (f" ({judge})" if judge else ""), spec.get("weight", 1.0)
        if finite(weight) == 0:
            watched.append(name)
        else:
            paid.append(f"{name} × {as_text(weight)}")
    return paid, watched


def _name(value: Any) -> str:
    """A name as others know it: of a path, its last part; a name with one slash is a hub's."""
    text = as_text(value)
    return short(text) if text.count("/") != 1 or text.startswith((".", "/", "~")) or "\\" in text else text


def _counts(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{short(str(name))}: {as_text(count)}" for name, count in value.items())
    return as_text(value)


def as_text(value: Any) -> str:
    """Any value as a short text."""
    found = finite(value)
    text = number(found) if found is not None else "" if value is None else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    return text.encode("utf-8", "replace").decode()[:400]


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
