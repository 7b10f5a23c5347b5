"""``vlm-grpo data``: what it says of a file, every fault with its row, and files converted without loss."""

import base64
import datetime
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mediafiles import encoded, sine, write_float_wav, write_video, write_wav
from typer.testing import CliRunner, Result

from vlm_grpo.cli import app
from vlm_grpo.data import load_data, to_sample, undecoded
from vlm_grpo.data.formats import FORMATS
from vlm_grpo.inspection.figures import Columns, Distinct, Spread
from vlm_grpo.inspection.problems import Problems, in_two
from vlm_grpo.media import Medium


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, args)])


def found(*args: str | Path) -> dict[str, Any]:
    result = call("inspect", *args, "--json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def asked(text: str = "Which digit?", *media: str, **columns: Any) -> dict[str, Any]:
    """A good row; ``media`` are slots."""
    parts = [{"type": kind} for kind in media] + [{"type": "text", "text": text}]
    return {"prompt": [{"role": "user", "content": parts}], "answer": "7", **columns}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Good and bad files of each kind."""
    folder = tmp_path_factory.mktemp("media")
    whole = encoded(tiny.image(1, (64, 48)), "PNG")
    nan = sine(16000, 0.2)
    nan[7] = np.nan
    files = {"good.png": whole, "torn.png": whole[: len(whole) // 2], "zero.png": b"", "text.png": b"not a picture"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tiny.image(2, (128, 32)).save(folder / "wide.png")
    write_video(folder / "good.mp4", 40, 10, audio=sine(16000, 4))
    write_video(folder / "none.mp4", 0)
    write_wav(folder / "good.wav", np.stack([sine(16000, 0.5), sine(16000, 0.5)]))
    write_float_wav(folder / "nan.wav", nan)
    return folder


@pytest.fixture
def folder(media: Path, tmp_path: Path) -> Path:
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    return tmp_path


def part(**content: Any) -> dict[str, Any]:
    return {**asked(), "prompt": [{"role": "user", "content": [content, {"type": "text", "text": "What?"}]}]}


# What is wrong with a row, and words of what is said about it; a good row lies before each.
FAULTS: list[tuple[Any, str]] = [
    ('{"prompt": "cut off', "not valid JSON"),
    ('["a", "list"]', "not an object"),
    ({"colour": "red", "size": 3}, "fits no format"),
    ({"prompt": None, "answer": "7", "image": "good.png"}, "fits no format"),
    (asked("two of", "image", "image", image="good.png"), "2 image slots"),
    (asked("none", "video"), '1 video slot but "video(s)" holds 0'),
    (asked("gone", image="missing.png"), '"missing.png" does not exist'),
    (asked("torn", image="torn.png"), "truncated"),
    (asked("zero", image="zero.png"), "0 bytes"),
    (asked("text", image="text.png"), "no picture"),
    (asked("frames", video="none.mp4"), "no frames"),
    (asked("nan", audio="nan.wav"), "NaN"),
    (part(type="picture", picture="good.png"), "part of type 'picture'"),
    ({**asked(), "prompt": [{"role": "humn", "content": "Hello?"}]}, "'humn'"),
    (asked("both", image="good.png", images=["good.png"]), 'both "image" and "images"'),
    ({"conversations": [], "answer": "7"}, '"conversations"'),
    (asked("no answer", answer=None), 'no "answer"'),
    (asked("blank answer", answer="  "), '"answer" is empty'),
    (asked("number", answer=7), '"answer" holds number'),
    ({**asked(), "prompt": [{"role": "user", "content": 5}]}, 'the "content" of a message is 5'),
    (asked("net", image="https://example.org/a.png"), "network address"),
    ({**asked(), "prompt": [{"content": "Who says that?"}]}, 'no "role"'),
    (asked("options", image="good.png", min_pixels=-5), "min_pixels"),
    ({**asked(), "prompt": [{"role": "user", "content": " "}]}, "neither text nor media"),
    ({**asked(), "prompt": [{"role": "system", "content": "Be kind."}]}, 'no message of the role "user"'),
    (asked("half \ud83d of it"), "half of a character ('\\ud83d')"),
    (asked("large", size=2**70), "more than 64 bits"),
    (asked("long name", image="a" * 400), "File name too long"),
    ({"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "7"}]}, "<image>"),
]


@pytest.mark.parametrize("level", ["headers", "full"])
def test_every_fault_of_a_broken_file_is_reported_with_its_row(folder, level):
    # covers A7, Q1
    assert len(FAULTS) >= 20
    good = [asked(f"good {number}", image="good.png") for number in range(len(FAULTS))]
    rows = [row for pair in zip(good, (fault for fault, _ in FAULTS), strict=True) for row in pair]
    expected = {2 * n: words for n, (_, words) in enumerate(FAULTS, 1)}
    report = found(jsonl(folder / "broken.jsonl", rows), "--scan", level)
    said: dict[int, list[str]] = {}
    for problem in report["problems"]:
        assert problem["fix"].endswith("."), problem
        for row in problem["rows"]:
            said.setdefault(row, []).append(problem["what"])
    for row, words in expected.items():
        assert any(words.lower() in text.lower() for text in said.get(row, [])), (row, words, said.get(row))
    assert said.keys() == expected.keys()
    assert report["bad_rows"] == len(expected) and report["rows"] == 2 * len(FAULTS)


# ---- what inspect says -----------------------------------------------------------------------------------------


def varied() -> list[dict[str, Any]]:
    return [
        *(asked(f"picture {number}", "image", image="good.png", answer="yes") for number in range(8)),
        asked("two", "image", "image", images=["good.png", "wide.png"], answer="no", level=3),
        asked("clip", "video", video="good.mp4", answer="no", min_frames=6),
        asked("sound", "audio", audio="good.wav", answer="no"),
        {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}], "answer": "yes"},
        {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}], "answer": "no"},
    ]


def test_counts_columns_media_answers_and_traps(folder):
    report = found(jsonl(folder / "rows.jsonl", varied()))
    assert report["problems"] == [] and report["rows"] == 13 and report["formats"] == {"trl": 13}
    assert report["text_only"] == 2 and report["roles"] == {"user": 13, "system": 2}
    assert report["messages"] == {"min": 1, "median": 1, "p95": 2, "max": 2}
    image, video, audio = (report["media"][kind] for kind in ("image", "video", "audio"))
    # Ten pictures of 64x48, one of 128x32: in nine rows, one of which holds two.
    assert (image["rows"], image["count"]) == (9, 10)
    assert image["width"] == {"min": 64, "median": 64, "p95": 128, "max": 128}
    assert image["pixels"] == {"min": 3072, "median": 3072, "p95": 4096, "max": 4096}
    # 40 frames at 10 a second; one a second would be 4, and the row asks for 6 at least.
    assert video["frames"]["max"] == 40 and video["seconds"]["max"] == 4 and video["taken"]["max"] == 6
    assert audio["sample_rates"] == {"16000": 1} and audio["channels"] == {"2": 1} and audio["seconds"]["max"] == 0.5
    columns = {column["name"]: column for column in report["columns"]}
    assert columns["answer"]["type"] == "text" and columns["answer"]["distinct"] == 2
    assert columns["images"]["type"] == "list of text" and columns["level"]["example"] == "3"
    assert columns["level"]["filled"] == pytest.approx(1 / 13)
    assert [(a["answer"], a["rows"]) for a in report["answers"]] == [("yes", 9), ("no", 4)]
    assert report["repeated"] == report["contradicting"] == 1
    dominating, repeated = report["notes"]
    assert dominating.startswith('69% of the answers are "yes"')
    assert repeated.startswith("1 row repeats the prompt and media of an earlier row, 1 of them with another answer")


def test_the_page_says_it_too_and_the_exit_code_says_whether_there_are_problems(folder):
    good = call("inspect", jsonl(folder / "rows.jsonl", varied()))
    assert good.exit_code == 0
    for words in ("trl", "9 with 10 images", "list of text", "frames taken", "69%", "repeats the prompt", "none"):
        assert words in good.stdout, words
    bad = call("inspect", jsonl(folder / "bad.jsonl", [*varied(), asked("torn", image="torn.png")]))
    assert bad.exit_code == 1 and "14" in bad.stdout and "truncated" in bad.stdout
    assert call("inspect", folder / "nothing.jsonl").exit_code == 2
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    latin = call("inspect", folder / "latin.jsonl")
    assert latin.exit_code == 2 and "not UTF-8" in latin.stderr and "Traceback" not in latin.output
    (folder / "empty.jsonl").touch()
    assert "has no rows" in call("inspect", folder / "empty.jsonl").stderr


def test_a_problem_of_many_rows_is_said_once_with_their_number(folder):
    rows = [asked(f"row {number}", image="gone.png") for number in range(30)]
    result = call("inspect", jsonl(folder / "gone.jsonl", rows))
    assert result.exit_code == 1 and "1, 2, 3, 4, 5, 6, 7, 8" in result.stdout and "and 22 more" in result.stdout
    assert result.stdout.count("gone.png") == 2  # as an example of its column, and in the problem
    (problem,) = found(folder / "gone.jsonl")["problems"]
    assert problem["rows"] == list(range(1, 31)) and problem["count"] == 30


def test_columns_and_tags_of_other_names(folder):
    row = {"question": "<image>Which?", "gold": "7", "picture": "good.png"}
    rows = jsonl(folder / "own.jsonl", [{**row, "id": number} for number in range(3)])
    report = found(rows, "--columns", "problem=question,answer=gold", "--columns", "image=picture")
    assert report["problems"] == [] and report["media"]["image"]["count"] == 3
    assert report["answers"][0]["answer"] == "7"
    assert "gild" in call("inspect", rows, "--columns", "answer=gild").stderr
    assert "needs a name on both sides" in call("inspect", rows, "--columns", "gold").stderr
    assert "no format" in call("inspect", rows, "--format", "nonesuch").stderr
    assert "Add --model" in call("inspect", rows, "--max-prompt-length", "5").stderr


def test_rows_beyond_the_limit_are_not_looked_at(folder):
    rows = jsonl(folder / "rows.jsonl", [*varied(), "{"])
    assert found(rows, "--limit", "13")["problems"] == []
    assert found(rows)["problems"][0]["rows"] == [14]


def test_media_are_not_opened_where_asked(folder):
    rows = jsonl(folder / "rows.jsonl", [asked("torn", image="torn.png")])
    report = found(rows, "--scan", "off")
    assert report["problems"] == [] and report["media"]["image"]["count"] == 1


def test_memory_does_not_grow_with_the_rows():
    spread, distinct, problems = Spread(), Distinct(), Problems()
    for number in range(120_000):
        spread.add(number)
        distinct.add(f"text {number}")
        problems.add(number, f"The file {number} does not exist")
    assert len(spread._values) == 100_000 and len(distinct._seen) == 10_001 and len(list(problems)) == 1000
    assert (spread.count, spread.least, spread.most) == (120_000, 0, 119_999)
    assert spread.quantile(0.5) == pytest.approx(60_000, rel=0.02)  # of a fair draw
    assert (len(distinct), distinct.more) == (10_000, True)
    assert (problems.count, problems.unlisted, problems.bad_rows) == (120_000, 119_000, 120_000)


def test_quantiles_by_hand():
    spread = Spread()
    for number in range(1, 21):
        spread.add(number)
    assert spread.as_dict() == {"min": 1, "median": 10, "p95": 19, "max": 20}


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists)))
def test_any_values_are_told_apart_by_type_and_no_text_breaks_a_message(values):
    columns = Columns()
    for number, value in enumerate(values):
        columns.add(number, {"any": value})
    texts = [columns.type_text(column) for column in columns]
    assert len(texts) == bool(values) and all(texts)
    what, fix = in_two(f"rows.jsonl row 3: it holds {values!r}. Correct it.", "rows.jsonl row 3")
    assert what.startswith("It holds") and fix


# ---- what convert writes ---------------------------------------------------------------------------------------


def plain(medium: Medium) -> tuple[str, Any, dict[str, Any]]:
    """A medium as its bytes."""
    source = medium.source if isinstance(medium.source, list) else [medium.source]
    return medium.kind, [s.read_bytes() if isinstance(s, Path) else s for s in source], medium.overrides


def loaded(path: Path, **options: Any) -> list[tuple[Any, Any, Any]]:
    """Every row that ``load_data`` gives, its media as bytes."""
    rows: Any = undecoded(load_data(str(path), **options))[0]
    samples = [to_sample(row) for row in rows]
    shown = []
    for sample in samples:
        prompt = sample.prompt
        if not isinstance(prompt, str):
            parts = [
                [{**p, p["type"]: p["type"] if p["type"] != "text" else p["text"]} for p in m["content"]]
                for m in prompt
            ]
            prompt = [{**m, "content": part} for m, part in zip(prompt, parts, strict=True)]
        columns = {name: value for name, value in sample.columns.items() if value is not None}
        shown.append((prompt, [plain(medium) for medium in sample.media], columns))
    return shown


def converted(*args: str | Path) -> Result:
    result = call("convert", *args)
    assert result.exit_code == 0, result.output
    return result


SUFFIXES = {"image": ".png", "video": ".mp4", "audio": ".wav"}


def with_files(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An example row of a format, its media files written under the names that it gives."""

    def write(name: str) -> None:
        kind = "video" if name.endswith(".mp4") else "audio" if name.endswith(".wav") else "image"
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"good{SUFFIXES[kind]}", target)

    for value in row.values():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name.endswith((".png", ".jpg", ".mp4", ".wav")):
                write(name)
    return row


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", [format.name for format in FORMATS])
def test_every_format_is_converted_without_loss(folder, name, suffix):
    # covers U1, Q1, A7
    example = with_files(next(format.example for format in FORMATS if format.name == name), folder)
    rows = jsonl(folder / "in.jsonl", [{**example, "id": number, "note": "é \u2028"} for number in range(3)])
    assert f"3 rows (from {name} 3)" in converted(rows, folder / f"out{suffix}").stdout
    assert loaded(folder / f"out{suffix}") == loaded(rows)
    (folder / f"out{suffix}").rename(folder / f"moved{suffix}")
    converted(folder / f"moved{suffix}", folder / f"out{suffix}")
    assert (folder / f"out{suffix}").read_bytes() == (folder / f"moved{suffix}").read_bytes()


def test_a_mixed_file_is_converted_and_paths_are_relative_where_they_can_be(folder, tmp_path_factory):
    rows = [*varied(), asked("frames", "video", videos=[["good.png", "good.png"]], meta={"a": [1, 2.5], "b": None})]
    source = jsonl(folder / "in.jsonl", rows)
    converted(source, folder / "out.jsonl")
    first = json.loads((folder / "out.jsonl").read_text().splitlines()[0])
    assert first["image"] == "good.png"
    assert loaded(folder / "out.jsonl") == loaded(source)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    converted(source, elsewhere / "out.jsonl")
    assert json.loads((elsewhere / "out.jsonl").read_text().splitlines()[0])["image"] == str(folder / "good.png")
    converted(source, elsewhere / "out.parquet")
    assert loaded(elsewhere / "out.jsonl") == loaded(elsewhere / "out.parquet") == loaded(source)
    converted(elsewhere / "out.parquet", elsewhere / "again.jsonl")
    assert loaded(elsewhere / "again.jsonl") == loaded(source)  # a table fills what a row lacks with null


def embedded(folder: Path) -> Path:
    """A table of pictures in its cells, one of them twice."""
    cells = [{"bytes": (folder / name).read_bytes(), "path": name} for name in ("good.png", "wide.png", "good.png")]
    rows = {"prompt": ["one?", "two?", "three?"], "image": cells, "answer": ["1", "2", "3"], "score": [0.1, 2, None]}
    rows["prompt"] = [[{"role": "user", "content": text}] for text in rows["prompt"]]
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "in.parquet")
    return folder / "in.parquet"


def test_embedded_bytes_become_files_named_by_their_content_or_stay_bytes(folder):
    source = embedded(folder)
    said = converted(source, folder / "out.jsonl").stdout
    assert "2 media files in" in said
    files = sorted((folder / "out_media").iterdir())
    assert {file.read_bytes() for file in files} == {(folder / n).read_bytes() for n in ("good.png", "wide.png")}
    names = [json.loads(line)["image"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert (
        names[0] == names[2] == f"out_media/{hashlib.sha256((folder / 'good.png').read_bytes()).hexdigest()[:32]}.png"
    )
    assert loaded(folder / "out.jsonl") == loaded(source)
    converted(source, folder / "out.parquet")
    assert loaded(folder / "out.parquet") == loaded(source)
    cell = undecoded(load_data(str(folder / "out.parquet")))[0][0]["image"]
    assert cell == {"bytes": (folder / "good.png").read_bytes(), "path": "good.png"}
    assert load_data(str(folder / "out.parquet"))[1]["image"].size == (128, 32)  # a picture to a reward, as before


def test_bad_rows_stop_a_conversion_with_all_of_them_or_are_left_out(folder):
    rows = [asked("a", image="good.png"), asked("b", image="torn.png"), "{", asked("c", image="gone.png"), asked("d")]
    source, out = jsonl(folder / "in.jsonl", rows), folder / "out.jsonl"
    stopped = call("convert", source, out)
    assert stopped.exit_code == 1 and not out.exists() and "Nothing was written" in stopped.stderr
    for words in ("truncated", "not valid JSON", "does not exist", "--drop-bad"):
        assert words.lower() in " ".join(stopped.stderr.split()).lower()
    assert "3 bad rows left out" in converted(source, out, "--drop-bad").stdout
    assert [row[0][0]["content"][-1]["text"] for row in loaded(out)] == ["a", "d"]
    before = out.read_bytes()
    none = call("convert", jsonl(folder / "none.jsonl", ["{"]), folder / "none2.jsonl", "--drop-bad")
    assert none.exit_code == 1 and "Nothing was written: 1 row of" in none.stderr
    refused = call("convert", source, out)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr and out.read_bytes() == before
    converted(source, out, "--drop-bad", "--overwrite", "--limit", "1")
    assert len(loaded(out)) == 1


def test_what_cannot_be_converted_is_said(folder):
    rows = [asked("a"), asked("b", answer=3)]
    mixed = call("convert", jsonl(folder / "mixed.jsonl", rows), folder / "out.jsonl", "--drop-bad")
    assert mixed.exit_code == 1 and 'Column "answer" holds' in " ".join(mixed.stderr.split())
    assert "neither .jsonl nor .parquet" in call("convert", folder / "mixed.jsonl", folder / "out.csv").stderr
    day = datasets.Dataset.from_dict({"prompt": ["x"], "day": [datetime.date(2026, 1, 2)]})
    day.to_parquet(folder / "day.parquet")
    dated = call("convert", folder / "day.parquet", folder / "out.jsonl")
    assert dated.exit_code == 1 and 'column "day"' in " ".join(dated.stderr.split()).lower()
    converted(folder / "day.parquet", folder / "day2.parquet")
    assert loaded(folder / "day2.parquet") == loaded(folder / "day.parquet")
    assert sorted(path.name for path in folder.glob(".*")) == []  # nothing half-written lies about


def test_a_folder_takes_the_file_under_its_own_name(folder):
    (folder / "sub").mkdir()
    converted(jsonl(folder / "rows.jsonl", varied()), folder / "sub")
    assert loaded(folder / "sub" / "rows.jsonl") == loaded(folder / "rows.jsonl")


def test_other_containers_are_read_too(folder):
    rows = [{"question": f"<image>Which {number}?", "image": "good.png", "answer": "7"} for number in range(3)]
    (folder / "rows.json").write_text(json.dumps(rows))
    csv = ["question,image,answer", *(f"{row['question']},{row['image']},{row['answer']}" for row in rows)]
    (folder / "rows.csv").write_text("\n".join(csv))
    (folder / "several").mkdir()
    shutil.copyfile(folder / "good.png", folder / "several" / "good.png")
    address = "data:image/png;base64," + base64.b64encode((folder / "good.png").read_bytes()).decode()
    jsonl(folder / "address.jsonl", [{**row, "image": address} for row in rows])
    for name in ("rows.json", "rows.csv", "address.jsonl"):
        report = found(folder / name)
        assert report["problems"] == [] and report["media"]["image"]["width"]["max"] == 64, name
        converted(folder / name, folder / "out.jsonl", "--overwrite")
        assert loaded(folder / "out.jsonl") == loaded(folder / name), name


def test_names_of_another_project_are_converted_too(folder):
    turns = [{"who": "asker", "says": "<image>Which?"}, {"who": "helper", "says": "7"}]
    source = jsonl(folder / "in.jsonl", [{"talk": turns, "pictures": ["good.png"], "id": 1}])
    columns = {"messages": "talk", "images": "pictures"}
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "asker", "assistant_tag": "helper"}
    options = [f"--columns={ours}={theirs}" for ours, theirs in columns.items()]
    options += [f"--tags={tag}={name}" for tag, name in tags.items()]
    converted(source, folder / "out.jsonl", *options)
    assert loaded(folder / "out.jsonl") == loaded(source, columns=columns, tags=tags)
    assert json.loads((folder / "out.jsonl").read_text())["answer"] == "7"


def test_a_stopped_conversion_leaves_nothing(folder, monkeypatch):
    source = embedded(folder)

    def full(*args):
        raise OSError(28, "No space left on device")

    before = sorted(folder.iterdir())
    for suffix in (".jsonl", ".parquet"):
        with monkeypatch.context() as patch:
            patch.setattr("vlm_grpo.inspection.writers.os.replace", full)
            stopped = call("convert", source, folder / f"out{suffix}")
        assert stopped.exit_code == 2 and "No space left" in stopped.stderr
        assert sorted(folder.iterdir()) == before


# ---- with a model, and as a page ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """An omni model's folder without its weights: only the processor may be read."""
    path = tiny.save("qwen2_5_omni_thinker", tmp_path_factory.mktemp("model"))
    for weights in Path(path).glob("*.safetensors"):
        weights.unlink()
    return path


def test_prompt_tokens_are_counted_as_the_processor_expands_them(folder, model):
    rows = [asked("one two", "image", image="good.png"), asked("one two")]
    report = found(jsonl(folder / "rows.jsonl", rows), "--model", model)["tokens"]
    # The picture is 64x48: with patches of 14 and merges of 2 that is 2 x 2 tokens, between two markers.
    assert report["of_media"] == {"min": 0, "median": 0, "p95": 4, "max": 4}
    assert report["prompt"]["max"] - report["prompt"]["min"] == 6
    limit = int(report["prompt"]["min"])
    over = found(folder / "rows.jsonl", "--model", model, "--max-prompt-length", str(limit))
    assert over["tokens"]["rows_over"] == 1 and over["problems"][0]["rows"] == [1]
    assert f"more than max_prompt_length={limit}" in over["problems"][0]["what"]
    refused = call("inspect", folder / "rows.jsonl", "--model", "./nonesuch")
    assert refused.exit_code == 2 and "does not exist" in refused.stderr


def test_what_the_processor_refuses_is_a_problem_of_its_row(folder, tmp_path_factory):
    model = tiny.save("gemma3", tmp_path_factory.mktemp("gemma"))
    rows = [asked("one", "image", image="good.png"), asked("two", "video", video="good.mp4"), asked("three")]
    report = found(jsonl(folder / "rows.jsonl", rows), "--model", model)
    (problem,) = report["problems"]
    assert problem["rows"] == [2] and "no video processor" in problem["what"] and "row 2" not in problem["what"]


@pytest.fixture
def html(folder, model) -> str:
    rows = [*varied()[7:11], {**asked("<script>alert(1)</script> & more"), "note": "<b>bold</b>"}]
    rows += [asked("torn", image="torn.png"), asked("last")]
    result = call(
        "inspect", jsonl(folder / "rows.jsonl", rows), "--html", folder / "p.html", "--model", model, "--rows", "6"
    )
    assert result.exit_code == 1 and "p.html" in result.stdout
    return (folder / "p.html").read_text(encoding="utf-8")


def test_the_html_page_holds_rows_media_and_tokens_and_needs_no_network(html):
    assert html.count("<article") == 6 and "The first 6 of 7 rows" in html
    # Four pictures (one a row's second), a filmstrip and a spectrogram; a video's and a sound's player.
    assert html.count("<img") == 5 and html.count("data:video/mp4") == 1 and html.count("data:audio/wav") == 1
    assert "6 of 40 frames" in html and "64×48 pixels" in html and "after the chat template" in html
    assert "truncated" in html and "<b>&lt;|IMAGE|&gt;</b>" in html
    assert "&lt;script&gt;alert(1)" in html and "<script" not in html and "<b>bold</b>" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html) and "http" not in html and "url(" not in html


def test_a_page_cannot_be_a_folder(folder):
    jsonl(folder / "rows.jsonl", [asked()])
    for place in (folder, "."):
        result = call("inspect", folder / "rows.jsonl", "--html", place)
        assert result.exit_code == 2 and "that is a folder. Give the name of a file" in result.stderr


def test_the_page_in_a_browser(folder, html):
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get((folder / "p.html").as_uri())
        broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert browser.execute_script(broken) == 0
        ready = "return [...document.querySelectorAll('video,audio')].map(m => m.error === null && m.duration)"
        WebDriverWait(browser, 10).until(lambda b: all(b.execute_script(ready)))
        assert browser.execute_script(ready) == [pytest.approx(4, abs=0.2), pytest.approx(0.5, abs=0.05)]
        wider = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(wider) == 0
        paper = "return getComputedStyle(document.body).backgroundColor"
        colours = []
        for scheme in ("light", "dark"):
            features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
            colours.append(browser.execute_script(paper))
        assert colours == ["rgb(246, 247, 249)", "rgb(20, 23, 27)"]
    finally:
        browser.quit()
