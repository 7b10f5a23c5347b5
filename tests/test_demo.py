"""The demo's data, model and configs, and the whole of it with the number of steps shrunk."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from vlm_grpo import demo, load_data, load_model, run
from vlm_grpo.cli import app
from vlm_grpo.config import resolved
from vlm_grpo.data import to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import ConfigError
from vlm_grpo.trainer_config import VLMGRPOConfig, build_args

FILES = ("labels", "train", "held-out")
KEYS = {
    *("modality", "algorithm", "seed", "accuracy_before", "ci95_before", "accuracy_after", "ci95_after"),
    *("accuracy_sft_only", "accuracy_control", "reward_first", "reward_last", "steps", "seconds", "run_dir"),
}


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in FILES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    demo.write_digits(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.save_tiny_model(folder, seed=0)
    return folder


def test_every_scan_is_in_one_part_only(data: Path):
    rows = rows_of(data)
    assert {name: len(part) for name, part in rows.items()} == {"labels": 100, "train": 1247, "held-out": 450}
    images = [row["image"] for part in rows.values() for row in part]
    assert sorted(images) == [f"digits/{index:04d}.png" for index in range(1797)]
    assert sorted(path.name for path in (data / "digits").iterdir()) == [Path(image).name for image in sorted(images)]
    for part in rows.values():  # a part without some digit would measure something else
        assert set(Counter(row["answer"] for row in part)) == set(demo.DIGITS)


def test_pictures_and_labels_are_scikit_learns(data: Path):
    digits: Any = load_digits()
    for row in [row for part in rows_of(data).values() for row in part]:
        index = int(Path(row["image"]).stem)
        assert row["answer"] == demo.DIGITS[digits.target[index]]
    for index in range(0, 1797, 100):
        with Image.open(data / "digits" / f"{index:04d}.png") as picture:
            assert picture.mode == "RGB"
            small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX)).flatten()
        alike = [np.corrcoef(small, scan)[0, 1] for scan in digits.data]
        assert np.argmax(alike) == index


def test_a_seed_draws_its_own_labels_and_never_from_the_held_out_rows(data: Path, tmp_path: Path):
    demo.write_digits(tmp_path, seed=1)
    first, second = rows_of(data), rows_of(tmp_path)
    assert second["held-out"] == first["held-out"]
    labels = [{row["image"] for row in rows["labels"]} for rows in (first, second)]
    assert len(labels[0] & labels[1]) < 30, "100 of 1,347, drawn anew"
    pool = [{row["image"] for name in ("labels", "train") for row in rows[name]} for rows in (first, second)]
    assert pool[0] == pool[1]


def test_the_tiny_model_loads_and_can_say_every_digit(model_folder: Path, data: Path):
    model, processor = load_model(model_folder)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    words = [processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in demo.DIGITS]
    assert all(len(ids) == 1 for ids in words) and len({ids[0] for ids in words}) == 10
    assert processor.tokenizer.unk_token_id not in [ids[0] for ids in words]

    rows = load_data(str(data / "held-out.jsonl"), limit=2)
    encoded = [encode(processor, to_sample(row)) for row in rows]  # type: ignore[arg-type]
    assert encoded[0].input_ids.count(model.config.image_token_id) == 4, "56 x 56 pixels, 28 x 28 to a token"
    assert processor.tokenizer.unk_token_id not in encoded[0].input_ids, "the tokenizer knows the whole prompt"
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([e.input_ids]), **e.media, **e.tokens).logits[0, -1].softmax(-1)
            for e in encoded
        ]
    assert (logits[0] - logits[1]).abs().sum() > 0.01, "another picture, another answer"


def test_a_models_weights_are_its_seeds(model_folder: Path, tmp_path: Path):
    for seed in (0, 1):
        demo.save_tiny_model(tmp_path / str(seed), seed)
    saved, same, other = (
        torch.cat([p.flatten() for p in load_model(folder)[0].parameters()])
        for folder in (model_folder, tmp_path / "0", tmp_path / "1")
    )
    assert torch.equal(saved, same) and not torch.allclose(saved, other)


def test_configs_chain_the_stages_and_hold_out_the_held_out_rows(tmp_path: Path):
    warm, grpo = demo.warm_config(tmp_path, 3), demo.grpo_config(tmp_path, 3, full=False)
    continued = demo.continued_config(tmp_path, 3, seconds=90)
    assert grpo.model == continued.model == warm.output and len({c.output for c in (warm, grpo, continued)}) == 3
    assert {config.data.eval for config in (warm, grpo, continued)} == {str(tmp_path / "data" / "held-out.jsonl")}
    assert warm.data.train == continued.data.train == str(tmp_path / "data" / "labels.jsonl")
    assert grpo.data.train == str(tmp_path / "data" / "train.jsonl")
    assert [config.train["seed"] for config in (warm, grpo, continued)] == [3, 3, 3]
    assert continued.max_minutes == 1.5
    assert grpo.lora is not None and demo.grpo_config(tmp_path, 3, full=True).lora is None
    args: Any = build_args(VLMGRPOConfig, resolved(grpo)["train"], output_dir=str(tmp_path))
    assert args.generation_batch_size // args.num_generations <= 1247


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A few steps of a few rows; everything else as it is."""
    for recipe, steps, rows in ((demo._WARM, 2, 4), (demo._GRPO, 3, 16)):
        monkeypatch.setitem(recipe, "max_steps", steps)
        monkeypatch.setitem(recipe, "per_device_train_batch_size", rows)
    monkeypatch.setattr(demo, "write_digits", few_held_out(demo.write_digits))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def few_held_out(write):
    """Nine evaluations of 450 rows would take longer than all the rest."""

    def function(folder: Path, seed: int) -> None:
        write(folder, seed)
        lines = (folder / "held-out.jsonl").read_text().splitlines()[:70]
        (folder / "held-out.jsonl").write_text("\n".join(lines) + "\n")

    return function


def test_the_demo_from_end_to_end(shrunk: Path):
    result = CliRunner().invoke(app, ["demo", "--json", "--seed", "5"])
    assert result.exit_code == 0, result.output
    *above, last = result.stdout.strip().splitlines()
    assert above == [], "with --json, stdout holds the object alone"
    figures = json.loads(last)
    assert set(figures) == KEYS
    assert (figures["modality"], figures["algorithm"], figures["seed"]) == ("image", "grpo", 5)
    assert figures["steps"] == 3 and figures["seconds"] > 0
    for accuracy, interval in (("accuracy_before", "ci95_before"), ("accuracy_after", "ci95_after")):
        low, high = figures[interval]
        assert 0 <= low <= figures[accuracy] <= high <= 1 and high - low > 0.02
        assert round(70 * figures[accuracy], 6) % 1 == 0, "a share of the held-out rows"
    metrics = [json.loads(line) for line in (Path(figures["run_dir"]) / "metrics.jsonl").open()]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert (figures["reward_first"], figures["reward_last"]) == (metrics[0]["reward"], metrics[-1]["reward"])

    folder = shrunk / "runs" / "demo-image-5" / "grpo"
    assert Path(figures["run_dir"]).resolve() == folder
    for name in ("curves.png", "held-out.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 20, name
    assert "warm start continued as long" in result.stderr and "held-out digits" in result.stderr
    told = {"before": figures["accuracy_before"], "sft_only": figures["accuracy_sft_only"]}
    shown = re.findall(r"(\d+\.\d)%", result.stderr)
    assert {f"{100 * value:.1f}" for value in told.values()} <= set(shown)

    again = CliRunner().invoke(app, ["demo", "--json", "--seed", "5"])
    assert again.exit_code == 0 and again.stdout.strip() == last, "nothing is trained twice"


def test_what_the_demo_does_not_have_is_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["demo", "--modality", "smell", "--output", str(tmp_path / "x")])
    assert result.exit_code == 2 and "smell" in result.output and "image" in result.output
    with pytest.raises(ConfigError, match='there is no modality "smell". Use image'):
        demo.demo(modality="smell", output=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_an_interrupted_stage_is_the_last_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    begun: list[str] = []

    def stage(stopped: str | None):
        def function(config: Any) -> run.RunResult:
            begun.append(Path(config.output).name)
            return run.RunResult(Path(config.output), 1, 1.0, {}, stopped=stopped)

        return function

    monkeypatch.setattr(run, "sft", stage(None))
    monkeypatch.setattr(run, "train", stage("Ctrl-C"))
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 130 and begun == ["warm", "grpo"]
    assert "The same command again continues" in result.stderr and "Traceback" not in result.stderr
