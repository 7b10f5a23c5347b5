"""``report.html``: one file that shows a run, needs no network, and trusts nothing that a model or a dataset wrote."""

import base64
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .curves import curve_drawings
from .embed import Embedder
from .facts import (
    REWARD_TRAIN,
    UNREWARDED,
    controls_of,
    ending,
    evaluation_facts,
    outcome,
    read_config,
    read_versions,
    run_facts,
    went_on,
)
from .judged import judged
from .pairs import Pairs, pair_outcome, pairs_table, score_drawings, verdicts
from .records import finite, read_jsonl
from .tables import held_out_table, samples_table
from .weights import Rewards, logged_rewards, rewards_of

PAGE = "report.html"
_HELD_OUT_BYTES, _SAMPLE_BYTES = 4_000_000, 10_000_000
_LONGEST_PROMPT = 20_000  # characters


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, finished or not; what the folder does not have is left out, and said.

    Args:
        run: the run folder.
        output: the page; ``report.html`` in the run folder by default. Written beside its name and renamed.

    Returns:
        The page's path.

    Raises:
        CheckpointError: the folder holds no run, or the page cannot be written.
    """
    run = Path(run).expanduser()
    if not any((run / name).is_file() for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json")):
        raise CheckpointError(
            f"{run} holds no run: it has no config.yaml, metrics.jsonl or samples.jsonl. Give a run's folder."
        )
    out = Path(output).expanduser() if output is not None else run / PAGE
    out = out / PAGE if out.is_dir() else out
    page = _render(run)
    beside = out.with_name(f".{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, encoding="utf-8", errors="replace")
        os.replace(beside, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror}). Give another --output.") from error
    return out


def _render(run: Path) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    files = {name: _text_of(name) for name in ("page.html", "page.css", "page.js")}
    script = files["page.js"]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # matplotlib escapes what it is given to write; everything else goes through Jinja's autoescape.
    environment.filters["drawn"] = Markup
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(files["page.html"]).render(
        **_content(run),
        underscore=Markup("_<wbr>"),
        style=Markup(files["page.css"]),
        script=Markup(script),
        script_hash=digest,
    )


def _text_of(name: str) -> str:
    return (resources.files("vlm_grpo.report") / name).read_text(encoding="utf-8")


def _content(run: Path) -> dict[str, Any]:
    """What the template shows, from whatever the folder has."""
    missing: list[str] = []
    command, config = read_config(run)
    result, evaluation = (_object(run / name, missing) for name in ("result.json", "evaluation.json"))
    records = list(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").is_file() else []
    rewards = _rewards(run, config, records)
    is_judge = command == REWARD_TRAIN
    figures = pair_outcome(evaluation) if is_judge else outcome(evaluation, rewards.watched)
    shown = _of_pairs(run, evaluation, missing) if is_judge else _of_answers(run, evaluation, rewards)
    facts = run_facts(command, config, result, read_versions(run)) or evaluation_facts(evaluation)
    is_evaluation = not config and not records and figures is not None
    if not is_evaluation:
        if went_on(result, records) and "after" in evaluation:
            missing.append(
                f"The figures after training are of step {result['steps']}, where this run had stopped before."
            )
        missing += _lacking(command, config, bool(records), shown["samples"] is not None, figures is not None)
    return {
        **shown,
        "title": _title(run),
        "ending": "held-out rows, by vlm-grpo eval" if is_evaluation else ending(result, records),
        "missing": missing,
        "outcome": figures,
        "is_judge": is_judge,
        "judged": judged(run, records, evaluation, rewards),
        "notes": _notes(run / "notes.jsonl"),
        "drawings": curve_drawings(records, rewards),
        "facts": facts,
    }


def _rewards(run: Path, config: dict[str, Any], records: list[dict[str, Any]]) -> Rewards:
    """The rewards by their names in the metrics, or in the samples where nothing else is logged yet."""
    names, path = logged_rewards(records), run / "samples.jsonl"
    if not names and path.is_file():
        given = next((record.get("rewards") for record in read_jsonl(path)), None)
        names = [str(name) for name in given] if isinstance(given, dict) else []
    return rewards_of(config, names)


def _of_answers(run: Path, evaluation: dict[str, Any], rewards: Rewards) -> dict[str, Any]:
    """The tables of a run that answers."""
    embedder = Embedder(run, _HELD_OUT_BYTES)
    answers, written = run / "evaluation.jsonl", run / "samples.jsonl"
    controls = {"control": "media blanked"} | controls_of(evaluation)
    held_out = held_out_table(answers, embedder, controls) if answers.is_file() else None
    embedder.left += _SAMPLE_BYTES
    samples = samples_table(written, embedder, list(rewards.weights.values())) if written.is_file() else None
    return {"held_out": held_out, "samples": samples, "pairs": None, "verdicts": [], "scores": [], "judge_prompt": ""}


def _of_pairs(run: Path, evaluation: dict[str, Any], missing: list[str]) -> dict[str, Any]:
    """The table and drawings of a reward model."""
    pairs = Pairs(run / "evaluation.jsonl", {"control": "media blanked"} | controls_of(evaluation))
    captions = _object(run / "reward_model.json", missing).get("captions") is True
    try:
        prompt = (run / "judge_prompt.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        prompt = ""
    return {
        "held_out": None,
        "samples": None,
        "pairs": pairs_table(pairs, Embedder(run, _HELD_OUT_BYTES + _SAMPLE_BYTES)),
        "verdicts": verdicts(evaluation, captions),
        "scores": score_drawings(pairs),
        "judge_prompt": prompt.strip()[:_LONGEST_PROMPT],
    }


def _lacking(command: str, config: dict[str, Any], logged: bool, sampled: bool, evaluated: bool) -> list[str]:
    """What a run's folder should have and does not."""
    data = config.get("data")
    out = [] if config else ["config.yaml is missing or cannot be read: the options of the run are not shown."]
    out += [] if logged else ["metrics.jsonl has no lines yet: there are no curves."]
    out += [] if sampled or command in UNREWARDED else ["samples.jsonl has no lines yet: there are no samples."]
    if not evaluated and isinstance(data, dict) and data.get("eval"):
        done = "pairs are judged" if command == REWARD_TRAIN else "rows are answered"
        out.append(f"evaluation.json has no figures yet: held-out {done} when a run begins and ends.")
    return out


def _title(run: Path) -> str:
    """The folder's name, after its parent's where that says more: ``demo-image-0 / grpo``."""
    folder = run.resolve()
    above = folder.parent.name
    return f"{above} / {folder.name}" if above and above not in ("runs", "outputs", "output", "tmp") else folder.name


def _object(path: Path, missing: list[str]) -> dict[str, Any]:
    """A JSON file's object; an empty one where there is no file, or none that can be read, which is said."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        missing.append(f"{path.name} cannot be read: what it says is not shown.")
        return {}
    return found if isinstance(found, dict) else {}


def _notes(path: Path, most: int = 50) -> list[tuple[str, str]]:
    """(step, sentence) of what was warned of while the run went on."""
    notes = []
    for record in read_jsonl(path) if path.is_file() else ():
        step = finite(record.get("step"))
        if record.get("text") and len(notes) < most:
            notes.append(("" if step is None else f"{step:.0f}", str(record["text"])[:2000]))
    return notes
