"""The page of a run: what it says, that it trusts and loads nothing, and that odd files do not stop it."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm_grpo import report
from vlm_grpo.cli import app
from vlm_grpo.errors import CheckpointError
from vlm_grpo.report import facts, style, tables
from vlm_grpo.report.embed import Embedder


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\ud800\x00"
CONFIG = """# vlm-grpo train
model: {model}
lora: {{r: 16}}
data: {{train: /somewhere/else/train.jsonl, eval: held-out.jsonl}}
rewards: [{{name: accuracy, weight: 1.0}}, {{name: "my.py:judge", weight: 0.5}}]
train: {{num_generations: 4, learning_rate: 1.0e-05}}
"""


def make_run(folder: Path, steps: int = 3, model: str = "org/model") -> Path:
    """A run folder with everything: 4 completions of one prompt a step, two rewards, a picture a prompt."""
    (folder / "media").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(model=model))
    for number in range(2):
        Image.new("RGB", (40, 30), (255 * number, 0, 90)).save(folder / "media" / f"{number}.png")
    write(folder / "metrics.jsonl", [{"step": s + 1, "reward": s, "seconds": 2.0 * s} for s in range(steps)])
    samples = [
        {
            "answer": "7",
            "step": step + 1,
            "prompt": "[/data/a.png] which digit ?",
            "completion": f"answer {step}.{row}",
            "rewards": {"accuracy": float(row % 2), "judge": None if row == 3 else 0.25 * row},
            "advantage": row - 1.5,
            "media": ["/data/a.png"],
            "media_files": [{"kind": "image", "file": f"media/{step % 2}.png"}],
        }
        for step in range(steps)
        for row in range(4)
    ]
    write(folder / "samples.jsonl", samples)
    state = {"accuracy": 0.5, "ci95": [0.25, 0.75], "rows": 4, "reward": 0.75, "rewards": {"accuracy": 0.5}}
    after = {**state, "accuracy": 0.75, "pass@k": {"1": 0.7, "4": 0.9}, "war": 0.7, "uar": 0.6}
    after["by"] = {"kind": {"bar": {"accuracy": 1.0, "ci95": [0.3, 1.0], "rows": 2}}}
    change = {"difference": 0.25, "ci95": [-0.1, 0.6], "p": 0.2, "rows": 4}
    control = {**state, "accuracy": 0.1, "kind": "shuffle"}
    (folder / "evaluation.json").write_text(
        json.dumps({"before": state, "after": after, "control": control, "change": change})
    )
    answers = [
        {"state": name, "row": row, "prompt": "p", "completion": f"{name} {row}", "answer": "7", "correct": right}
        for name, verdicts in (("before", (0, 1, 1, 0)), ("after", (1, 0, 1, 0)))
        for row, right in enumerate(map(bool, verdicts))
    ]
    write(folder / "evaluation.jsonl", answers)
    (folder / "result.json").write_text(json.dumps({"steps": steps, "seconds": 65.0, "stopped": None, "left_out": {}}))
    (folder / "README.md").write_text(
        "# card\n\n## Versions\n\n- torch 2.14.0\n- trl 1.15.0\n\n## How to load it\n- x\n"
    )
    return folder


class Page(HTMLParser):
    """The elements, attributes and visible texts of a page, by Python's own parser."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(run: Path) -> Page:
    return Page(report.write_report(run))


def test_a_page_says_what_the_run_was_and_did(tmp_path):  # covers Q9
    page = page_of(make_run(tmp_path / "runs" / "digits"))
    for said in (
        "finished: 3 steps in 1:05",
        "before training 50.0% 25.0–75.0% 4",
        "after training 75.0%",
        "after, other rows' media 10.0%",
        "Training changed the accuracy by +25.0 points (95% interval -10.0 to +60.0); p = 0.200; the same 4 rows",
        "pass@4 – 0.9 –",
        "UAR – 0.6 –",
        "By kind",
        "bar 2 – 100.0% [30.0, 100.0] –",
        "model org/model",
        "trained LoRA of rank 16",
        "training rows train.jsonl",
        "rewards accuracy × 1, my.py:judge × 0.5",
        "made with torch 2.14.0, trl 1.15.0",
        "[a.png] which digit ?",
        "newly right",
        "newly wrong",
    ):
        assert said in page.text, said
    assert "/somewhere" not in page.source and "/data/a.png" not in page.source, "paths are this machine's own"
    assert page.all("title") and "digits" in page.text
    drawn = [attributes["aria-label"] for attributes in page.all("figure")]
    assert drawn == ["reward: 0 at step 1, 2 at step 3"]


def test_rewards_sort_as_numbers_and_their_weighted_sum_is_shown(tmp_path):
    page = page_of(make_run(tmp_path / "run", steps=1))
    cells = [attributes for attributes in page.all("td") if attributes.get("data-title") == "reward"]
    assert [cell["data-value"] for cell in cells] == ["0.0", "1.125", "0.25", "1.0"]  # accuracy + judge / 2; none is 0
    judged = [attributes["data-value"] for attributes in page.all("td") if attributes.get("data-title") == "judge"]
    assert judged == ["0.0", "0.25", "0.5", ""]


def test_figures_beside_a_completion_are_rounded_and_an_answer_is_what_the_row_says(tmp_path):
    # covers L10: what PPO tells of a completion
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    figures = [{"answer": 7.123456789, "score": -2.5871551, "kl": None if n else 0.0, "tag": "t"} for n in range(12)]
    write(run / "samples.jsonl", [{**line, **own} for line, own in zip(lines, figures, strict=True)])
    table = tables.samples_table(run / "samples.jsonl", Embedder(run, 0))
    assert [column.title for column in table.columns[-4:]] == ["judge", "score", "kl", "advantage"]
    assert [cell.text for cell in table.rows[0].cells[-3:]] == ["-2.587", "0", "-1.5"]
    assert [cell.text for cell in table.rows[1].cells[-3:-1]] == ["-2.587", "–"] and table.rows[0].cells[-3].value < 0
    found = {column.title: cell.text for column, cell in zip(table.columns, table.rows[0].cells, strict=True)}
    assert found["answer"] == "7.123456789" and found["tag"] == "t"


def test_nothing_in_a_page_is_loaded_from_elsewhere_and_each_medium_is_there_once(tmp_path):
    page = page_of(make_run(tmp_path / "run", steps=6))
    loaded = [value for _, found in page.elements for name, value in found.items() if name in ("src", "href", "poster")]
    assert all(value.startswith("data:") for value in loaded), loaded
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page.source), "names of SVG are no loads"
    pictures = page.all("img")
    assert len([p for p in pictures if "src" in p]) == 2 and len(pictures) == 24
    keys = {p["data-key"] for p in pictures if "src" in p}
    assert {p["data-same"] for p in pictures if "src" not in p} == keys
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_what_models_and_rows_wrote_is_text_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run")
    lines = list(report.read_jsonl(run / "samples.jsonl"))
    for key in ("prompt", "completion", "answer"):
        lines[0][key] = EVIL
    lines[0]["rewards"] = {EVIL: 1.0}
    lines[0][EVIL] = {"nested": [EVIL]}
    lines[0]["media"], lines[0]["media_files"] = [EVIL, 7], [{"kind": EVIL, "file": "../../secret.png"}, "x"]
    write(run / "samples.jsonl", lines)
    answers = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    write(run / "evaluation.jsonl", [answer | {"completion": EVIL, "prompt": EVIL} for answer in answers])
    (run / "evaluation.json").write_text(json.dumps({"before": {"accuracy": 1, "by": {EVIL: {EVIL: {"accuracy": 1}}}}}))
    write(run / "notes.jsonl", [{"step": 1, "text": EVIL}])
    write(run / "metrics.jsonl", [{"step": s, "reward": s, f"rewards/{EVIL}/mean": 1 - s} for s in range(3)])
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    page = page_of(run)
    assert len(page.all("script")) == 1 and all("onerror" not in found for _, found in page.elements)
    assert [p for p in page.all("img") if not p.get("src", "data:").startswith("data:")] == []
    assert page.text.count("alert(1)") >= 8
    assert "outside of the run folder" in page.text


def test_a_folder_without_most_files_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json", "evaluation.jsonl", "result.json", "README.md"):
        (run / name).unlink()
    page = page_of(run)
    assert "nothing logged yet" in page.text and page.all("table") == []
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json"):
        assert f"{name} has no" in page.text
    (run / "config.yaml").write_text("a: [")
    write(run / "metrics.jsonl", [{"step": 4, "loss": 1.0}])
    (run / "evaluation.json").write_text('{"before": {"accu')
    text = page_of(run).text
    assert "not finished: 4 steps logged so far" in text and "evaluation.json cannot be read" in text
    assert "config.yaml is missing or cannot be read" in text


def test_torn_lines_and_odd_values_are_survived(tmp_path):
    run = make_run(tmp_path / "run")
    odd = [
        {},
        {"step": "x", "prompt": ["a", {"b": 1}], "completion": None, "rewards": [1], "advantage": "much", "media": 3},
        {"step": 1e400, "rewards": {"accuracy": "1"}, "media_files": {"a": 1}, "completion": "漢字 🙂 " * 9},
    ]
    with (run / "samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in odd) + '{"step": 9, "completion": NaN}\n')
        file.write('{"step": 10, "promp')
    with (run / "evaluation.jsonl").open("a") as file:
        file.write('{"state": "after", "row": "x", "correct": null}\n{"state": 4}\n[]\n{"sta')
    page = page_of(run)
    assert "漢字 🙂" in page.text and "much" not in page.text
    assert len([attributes for attributes in page.all("td") if attributes.get("data-title") == "step"]) == 16


def test_todays_and_yesterdays_evaluations_are_both_read():
    old = {"before": {"accuracy": 0.25, "ci95": [0.1, 0.5], "rows": 12}}
    found = facts.outcome(old)
    assert found is not None and found.states == [("before training", 0.25, 0.1, 0.5, "12")] and found.further == []
    compared = {"after": {"accuracy": 0.5}, "before": {"accuracy": 1}, "settings": {"run": "a/b/c", "baseline": "base"}}
    found = facts.outcome(compared)
    assert found is not None and [state.title for state in found.states] == ["the base model", "c"]
    unscored = {"accuracy": 0.0, "ci95": [0.0, 1.0], "rows": 3, "unscored": 3}
    found = facts.outcome({"after": unscored, "change": {"difference": 0.0, "ci95": [-1, 1], "p": 1.0, "rows": 0}})
    assert found is not None and found.states == [("after training", None, None, None, "3")] and not found.change
    for nothing in ({}, {"before": None}, {"before": {"accuracy": None}}, {"after": [1]}):
        assert facts.outcome(nothing) is None


def test_long_texts_are_folded_and_end_with_their_answer():
    text = "<think>\n" + "word " * 400 + "\n</think>\n<answer>42</answer>"
    cell = tables.text_cell(text)
    assert cell.text + cell.rest == text and cell.tail.endswith("<answer>42</answer>") and cell.cut == 0
    huge = tables.text_cell("x" * 1_000_000 + "end")
    assert (
        len(huge.text) + len(huge.rest) + huge.cut == 1_000_003 and len(huge.rest) <= 8000 and huge.tail[-3:] == "end"
    )
    assert tables.text_cell("short") == tables.Cell("short") and tables.text_cell(2.5).text == "2.5"


def test_every_text_can_be_read_on_its_ground_in_light_and_dark():
    source = (Path(report.__file__).parent / "page.css").read_text()
    light, dark = (dict(re.findall(r"(--[\w-]+): (#\w{6})", part)) for part in source.split("@media", 2)[:2])

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert set(light) == set(dark) >= set(style.VARIABLES.values())
    for scheme in (light, dark):
        for ground in ("--page", "--paper", "--tint"):
            for text in ("--ink", "--muted", "--right", "--wrong", "--link"):
                if ground != "--tint" or text == "--ink":
                    low, high = sorted((luminance(scheme[ground]), luminance(scheme[text])))
                    assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize(("sizes", "most"), [([8] * 1000, 160), ([1] * 5, 160), ([1000], 160), ([16] * 11, 176)])
def test_first_last_and_evenly_spread_groups_are_chosen(sizes, most):
    chosen = tables._spread(sizes)
    assert chosen[0] == 0 and chosen[-1] == len(sizes) - 1 and sum(sizes[group] for group in chosen) <= max(most, 1000)
    gaps = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
    assert len(chosen) == len(sizes) or max(gaps) - min(gaps) <= 1
    order = tables._ends_first(chosen)
    assert sorted(order) == chosen and {order[0], order[1 % len(order)]} == {chosen[0], chosen[-1]}


def test_a_big_run_makes_a_small_page(tmp_path):
    run = tmp_path / "run"
    (run / "media").mkdir(parents=True)
    random.seed(0)
    for number in range(20):
        (run / "media" / f"{number}.png").write_bytes(random.randbytes(900_000))
    with (run / "samples.jsonl").open("w") as file:
        for step in range(400):
            for row in range(4):
                line = {"step": step, "prompt": "p" * 9000, "completion": "c" * 50_000 if step % 50 == 0 else "c"}
                line |= {"media_files": [{"kind": "image", "file": f"media/{step % 20}.png"}], "rewards": {"a": row}}
                file.write(json.dumps(line) + "\n")
    page = report.write_report(run)
    assert 8_000_000 < page.stat().st_size < 20_000_000
    text = Page(page).text
    assert "160 of 1,600 shown. samples.jsonl has all." in text and "no room left on this page" in text


def test_the_command_writes_the_page_and_says_where(tmp_path):
    run = make_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "new" / "page.html")])
    assert done.exit_code == 0 and done.output.strip().endswith("page.html")
    assert (tmp_path / "new" / "page.html").is_file() and not (run / "report.html").exists()


@pytest.mark.parametrize("given", ["absent", "empty", "file"])
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{given} holds no run: .* Give a run's folder"):
        report.write_report(tmp_path / given)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    run = make_run(tmp_path / "run")
    blocked = tmp_path / "file"
    blocked.write_text("old")
    with pytest.raises(CheckpointError, match="cannot be written .* Give another --output"):
        report.write_report(run, blocked / "page.html")
    assert blocked.read_text() == "old"


def test_the_folder_that_eval_writes_is_a_page_too(tmp_path):
    folder = make_run(tmp_path / "run") / "eval-digits"
    folder.mkdir()
    state = {"accuracy": 0.5, "ci95": [0.25, 0.75], "rows": 4}
    compared = {"after": state, "control": {**state, "kind": "text"}, "control:shuffle": {**state, "kind": "shuffle"}}
    asked = {"run": "/somewhere/runs/digits", "baseline": None, "data": "held-out.jsonl", "samples": 4}
    (folder / "evaluation.json").write_text(json.dumps({**compared, "settings": asked}))
    answer = {"row": 0, "completion": "c", "answer": "7", "correct": True, "prompt": "p"}
    write(folder / "evaluation.jsonl", [{**answer, "state": name} for name in ("after", "control", "control:shuffle")])
    text = page_of(folder).text
    for said in ("held-out rows, by vlm-grpo eval", "digits 50.0%", "digits, media left out", "samples 4"):
        assert said in text, said
    assert "after media left out other rows' media" in text and "has no" not in text


def test_a_run_that_went_on_after_its_time_was_up_is_not_called_stopped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "reward": 1.0}\n{"step": 7, "reward": 1.0}\n')
    (tmp_path / "result.json").write_text('{"steps": 5, "seconds": 9, "stopped": "time limit"}')
    (tmp_path / "evaluation.json").write_text('{"after": {"accuracy": 0.5, "ci95": [0.2, 0.8], "rows": 8}}')
    text = report.write_report(tmp_path).read_text()
    assert "not finished: 7 steps" in text and "stopped by time limit" not in text
    assert "figures after training are of step 5" in text
