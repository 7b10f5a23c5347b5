"""`vlm-grpo bench`: both trainers on one prompt, what is measured of them, and what a mistake is told."""

import dataclasses
import inspect
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import PUBLISHED
from real_unsloth import environment
from typer.testing import CliRunner, Result

from vlm_grpo.bench import BenchOptions, published, run_bench
from vlm_grpo.bench.compare import relative_l2
from vlm_grpo.bench.contest import Contest, contenders, run_contender, run_contest, summary
from vlm_grpo.bench.memory import PeakMemory, PeakTensors
from vlm_grpo.bench.prompts import build_prompts
from vlm_grpo.bench.shapes import build_model, build_processor
from vlm_grpo.bench.timing import Meter, PhaseMeter
from vlm_grpo.cli import app
from vlm_grpo.cli.bench import bench as bench_command
from vlm_grpo.errors import ConfigError

SMALL = BenchOptions(
    prompt_tokens=120,
    max_completion_length=5,
    num_generations=3,
    rounds=1,
    hidden_size=64,
    num_hidden_layers=1,
    vocab_size=128,
    vision_hidden_size=64,
    vision_depth=1,
)
ON_COMMAND_LINE = [
    *("--hidden-size", "64", "--num-hidden-layers", "1", "--vocab-size", "128"),
    *("--vision-hidden-size", "64", "--vision-depth", "1", "--max-completion-length", "4", "--rounds", "1"),
]
PROMISED = (
    "step_ratio step_ratio_rounds memory_ratio same_tokens max_logp_diff grad_rel_l2 phases reference model versions"
)

SLOW = pytest.mark.slow


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


def refused(*args: str) -> str:
    result = call(*args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return result.stderr.strip()


@pytest.mark.parametrize("modality", [pytest.param(kind, marks=SLOW) for kind in ("image", "video", "audio")])
def test_both_train_alike_on_prompts_of_the_wanted_length(modality):  # covers Q2
    said = []
    result = run_bench(replace(SMALL, modality=modality, beta=0.04), say=said.append)
    assert result["prompt_tokens"] == 120 and result["completion_tokens"] == 5
    assert 0.5 * 120 < result["media_tokens"] < 120
    assert result["same_tokens"] is True and result["same_tokens_fraction"] == 1.0
    assert result["tensor_memory_ratio"] > 1
    assert result["max_logp_diff"] <= 1e-4 and result["grad_rel_l2"] <= 1e-5
    assert result["phases"]["old_ref_logps"]["reference"] > 0
    for side in ("reference", "ours"):
        phases = sum(phase[side] for phase in result["phases"].values())
        assert phases == pytest.approx(result[f"seconds_{side}"]), "one round: the phases make up the step"
    assert result["step_ratio"] == pytest.approx(result["seconds_reference"] / result["seconds_ours"])
    assert ("GRPOTrainer" in result["reference"]) == (modality == "image")
    assert f"trains without the {modality}" in result["reference"] or modality == "image"
    assert "hidden_size 64 (usually 384)" in said[0] and result["reference"] in said[0]


@pytest.mark.slow
def test_the_reference_reads_every_completions_prompt_by_itself(monkeypatch):
    """With audio the reference is ours with nothing shared; ours calls the processor once a step."""
    from vlm_grpo.intake import Intake

    calls = []
    read = Intake.read
    monkeypatch.setattr(Intake, "read", lambda self, row, *args: (calls.append(id(self)), read(self, row, *args))[1])
    run_bench(replace(SMALL, modality="audio"))
    counts = sorted(calls.count(one) for one in set(calls))
    steps = SMALL.rounds + 4  # two to warm up, two for the memory
    before = counts[0] - steps  # what looks at the rows before step 1 does so for both
    assert before >= 0 and counts[1] - before == steps * SMALL.num_generations


@pytest.mark.slow
def test_a_difference_between_the_trainers_is_seen(monkeypatch):
    """The comparison is of two models: a weight that differs shows in tokens, log-probabilities or gradients."""
    from vlm_grpo.bench import compare

    def different(options, processor):
        model = build_model(options, processor)
        with torch.no_grad():
            model.get_input_embeddings().weight[40:60] += 1e-3 * different.calls
        different.calls += 1
        return model

    different.calls = 0
    monkeypatch.setattr(compare, "build_model", different)
    result = run_bench(SMALL)
    assert not result["same_tokens"] or (result["max_logp_diff"] > 1e-6 and result["grad_rel_l2"] > 1e-5)


def test_relative_l2_by_hand():
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert relative_l2(expected, {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0])}) == pytest.approx(0.2)
    assert relative_l2(expected, {"a": torch.tensor([3.0, 0.0])}) == pytest.approx(0.8), "a missing gradient is zero"
    assert relative_l2({}, {"a": torch.ones(1)}) == math.inf


def test_time_counts_for_the_innermost_phase(monkeypatch):
    meter = Meter(torch.device("cpu"))
    monkeypatch.setattr(meter, "_now", iter([0.0, 1.0, 3.0, 7.0]).__next__)
    with meter.phase("other"), meter.phase("generate"):
        pass
    assert meter.seconds["other"] == 1.0 + 4.0 and meter.seconds["generate"] == 2.0


def test_peak_memory_forgets_what_was_before():
    big = torch.ones(64 * 2**18)  # 64 MiB
    del big
    peak = PeakMemory(torch.device("cpu"))
    small = torch.ones(16 * 2**18)
    del small
    used = peak.read()
    if used is None:
        pytest.skip("this system does not tell")
    assert 15 * 2**20 < used < 40 * 2**20


def test_peak_of_tensors_is_of_those_alive_together():
    kept = torch.ones(2**18)
    peak = PeakTensors()
    one = torch.ones(2**18)  # 1 MiB
    two = one + 1
    del one
    three = two + kept
    del two, three
    assert peak.read() == pytest.approx(2 * 2**20, abs=1000)  # a number is a tensor too


@pytest.mark.parametrize(
    ("tokens", "source"), [(256, "960x960"), (850, "1280x960"), (252, "1280x960"), (2000, "1485x1188")]
)
def test_media_tokens_are_exact(tokens, source):
    """The usual picture is cropped where no resize of it has so many tokens, and enlarged where it is too small."""
    prompts = build_prompts(replace(SMALL, prompt_tokens=None, media_tokens=tokens), 1)
    assert prompts.media_tokens == tokens
    pixels = prompts.dataset[0]["image"].size
    assert prompts.source == source == f"{pixels[0]}x{pixels[1]}"
    grid = prompts.processor.image_processor(prompts.dataset[0]["image"], return_tensors="pt")["image_grid_thw"][0]
    assert grid.prod().item() // 4 == tokens


def test_the_same_options_make_the_same_weights_and_rows():
    one, other = (build_prompts(SMALL, 2) for _ in range(2))
    assert one.dataset[1]["prompt"] == other.dataset[1]["prompt"] != one.dataset[0]["prompt"]
    assert one.dataset[1]["image"].tobytes() == other.dataset[1]["image"].tobytes()
    weights = [build_model(SMALL, one.processor).state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_the_last_line_is_one_json_object_and_a_sweep_is_drawn(tmp_path):
    out = tmp_path / "new" / "bench.png"
    case = (*ON_COMMAND_LINE, "--num-generations", "2,3", "--prompt-tokens", "80", "--beta=0.04")
    result = call(*case, "--json", "--plot", str(out))
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1, "everything else goes to stderr"
    sweep = json.loads(result.stdout)["sweep"]
    assert [one["num_generations"] for one in sweep] == [2, 3]
    for one in sweep:
        assert set(PROMISED.split()) <= one.keys()
        assert one["step_ratio_rounds"] and one["prompt_tokens"] == 80 and one["device"] == "cpu"
        assert set(one["versions"]) == {"python", "torch", "transformers", "trl", "peft", "vlm_grpo"}
    assert "plain log-prob head" in result.stderr and "changed from the fixed shape" in result.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and not list(out.parent.glob(".*"))


def test_one_case_is_a_table_and_bars(tmp_path):
    out = tmp_path / "bench.png"
    result = call(
        *ON_COMMAND_LINE, "--num-generations", "2", "--prompt-tokens", "80", "--train-vision", "--plot", str(out)
    )
    assert result.exit_code == 0, result.output
    for shown in ("forward + backward", "whole step", "ratio of each round", "both sampled the same tokens"):
        assert shown in result.stdout
    assert "(vision too)" in result.stdout and out.exists()


def test_misuse_is_told_in_one_sentence():
    assert refused("--num-generations", "two") == (
        "--num-generations two: needs a whole number, or several as in 2,4,8,16."
    )
    assert refused("--num-generations", "8,1") == "num_generations=1: needs 2 or more. Correct the value."
    assert "no vision tower" in refused("--modality", "audio", "--train-vision")
    assert "multiple of 64" in refused("--hidden-size", "100")
    assert "none for a text. Give" in refused(*ON_COMMAND_LINE, "--prompt-tokens", "100", "--media-tokens", "100")
    assert "Give 256, for instance" in refused(*ON_COMMAND_LINE, "--media-tokens", "251")
    assert "need a multiple of 8. Give 248" in refused("--modality", "video", "--media-tokens", "251")
    assert "have 750 tokens" in refused("--modality", "audio", "--media-tokens", "751")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused("--device", "cuda")


def test_only_what_differs_from_the_fixed_shape_is_named():
    assert BenchOptions(modality="audio", rounds=9, max_completion_length=30).changes() == {}
    assert BenchOptions(beta=0.04, media_tokens=256).changes() == {"beta": (0.0, 0.04), "media_tokens": (None, 256)}


def test_the_commands_defaults_are_the_fixed_shape():
    usual = dataclasses.asdict(BenchOptions()) | {"num_generations": "8"}
    given = {name: option.default for name, option in inspect.signature(bench_command).parameters.items()}
    assert {name: usual[name] for name in usual.keys() & given.keys()} == {
        name: given[name] for name in usual.keys() & given.keys()
    }
    of_a_contest = {"against", "shape", "prompts_per_step", "load_in_4bit", "memory_gib", "models"}
    assert given.keys() - usual.keys() == {"as_json", "plot", *of_a_contest}


def test_options_cannot_be_of_no_modality():
    with pytest.raises(ConfigError, match='modality="smell"'):
        BenchOptions(modality="smell")  # type: ignore[arg-type]


# ---- whole trainers against each other -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", published.SHAPES)
def test_a_published_shape_has_the_published_number_of_parameters(name):
    shape = published.SHAPES[name]
    processor = build_processor(published.shaped(BenchOptions(modality=shape.modality), name))
    model = published.meta_model(name, processor.tokenizer)
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
    (known,) = [entry for entry in PUBLISHED.items() if entry[0].split("/")[1].startswith(shape.title)]
    assert known[1][2] == shape.parameters and {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_shape_is_written_whole_and_once(tmp_path, monkeypatch):
    """What is loaded has every weight, and logits that are neither flat nor certain."""
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 128}
    shape = published.SHAPES["qwen2.5-vl-3b"]
    text = {**shape.text, **sizes, "num_attention_heads": 1, "num_key_value_heads": 1}
    tower = {**shape.tower, "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1}
    tower |= {"out_hidden_size": 128, "fullatt_block_indexes": [0]}
    small = dataclasses.replace(shape, text=text, tower=tower, parameters=0)
    monkeypatch.setitem(published.SHAPES, "qwen2.5-vl-3b", small)
    folder = published.write_model("qwen2.5-vl-3b", SMALL, tmp_path, "cpu")
    assert (
        folder == published.write_model("qwen2.5-vl-3b", SMALL, tmp_path, "cpu") and len(list(tmp_path.iterdir())) == 1
    )
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is model.get_input_embeddings().weight, "tied, as published"
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert len(processor.tokenizer) == 128 and processor.chat_template
    logits = model(input_ids=torch.tensor([[20, 30, 40]])).logits.float()
    assert logits.isfinite().all() and 0.05 < logits.std() < 3


def test_a_kept_model_is_of_its_own_sizes_and_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = published.write_model("tiny", SMALL, Path("kept"), "cpu")
    assert folder.is_absolute(), "every contender runs in a folder of its own"
    deeper = published.write_model("tiny", replace(SMALL, vision_depth=SMALL.vision_depth + 1), Path("kept"), "cpu")
    assert deeper != folder and json.loads((deeper / "config.json").read_text())["vision_config"]["depth"] == 2
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="models: cannot be made .* Give another folder"):
        published.write_model("tiny", SMALL, Path("file/models"), "cpu")


def test_nothing_half_written_is_left_of_a_model(tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(published, "build_model", fails)
    with pytest.raises(RuntimeError, match="full"):
        published.write_model("tiny", SMALL, tmp_path, "cpu")
    assert not list(tmp_path.iterdir())


def test_who_stands_against_whom():
    assert contenders("trl") == ("trl", "ours")
    assert contenders("unsloth,trl") == ("unsloth", "trl", "ours-unsloth", "ours")
    with pytest.raises(ConfigError, match="--against vllm: needs trl, unsloth, or both"):
        contenders("vllm")
    with pytest.raises(ConfigError, match="only vlm-grpo trains on audio"):
        Contest(replace(SMALL, modality="audio"), ("trl", "ours"))
    with pytest.raises(ConfigError, match="takes no audio. Give --modality image"):
        Contest(replace(SMALL, modality="audio"), ("ours",), "qwen2.5-vl-3b")
    with pytest.raises(ConfigError, match="shape='gpt'"):
        Contest(SMALL, ("ours",), "gpt")
    with pytest.raises(ConfigError, match="memory_gib=-1: needs more than 0"):
        Contest(replace(SMALL, device="cuda"), ("ours",), memory_gib=-1)
    with pytest.raises(ConfigError, match="only a GPU's memory"):
        Contest(SMALL, ("ours",), memory_gib=24)


def test_misuse_of_against_is_told_in_one_sentence():
    assert "has a use only with --against" in refused("--shape", "qwen2.5-vl-3b")
    assert refused("--against", "vllm") == "--against vllm: needs trl, unsloth, or both: trl,unsloth."
    assert "a sweep has no --against" in refused("--against", "trl", "--num-generations", "2,4")
    assert refused("--against", "trl", "--prompts-per-step", "one") == (
        "--prompts-per-step one: needs a whole number, or several as in 2,4,8,16."
    )
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused("--against", "trl", "--device", "cuda")


def said(prompts: int, seconds: float, warm_up: bool = False, peak: int = 5) -> dict:
    phases = {"process": 0.1, "generate": 1.0, "old_ref_logps": 0.0, "forward_backward": 0.5, "other": 0.2}
    peaks = {"generate": [3, 7], "forward_backward": [peak, 9], "other": [None, None]}
    more = {"phases": phases, "peaks": peaks, "prompt_tokens": 12, "completion_tokens": 4}
    return {"event": "step", "prompts": prompts, "warm_up": warm_up, "seconds": seconds, **more}


def test_a_row_is_the_medians_and_the_highest_by_hand():
    lines = [{"event": "loaded", "seconds": 9.0, "peak": [2, 2]}, {"event": "note", "message": "fell back"}]
    lines += [
        said(1, 50.0, warm_up=True, peak=8),
        said(1, 2.0),
        said(1, 4.0),
        said(1, 3.0),
        said(8, 30.0, warm_up=True),
    ]
    row = summary("trl", 1, [*lines, {"event": "error", "prompts": None, "kind": "out of time", "message": "stopped"}])
    assert row["seconds"] == 3.0 and row["rounds"] == [2.0, 4.0, 3.0] and "error" not in row
    assert row["peak_bytes"] == 8 and row["peak_reserved_bytes"] == 9, "the warm-up needs memory too"
    assert row["peaks"]["process"] == [None, None] and row["load_seconds"] == 9.0 and row["notes"] == ["fell back"]
    late = summary("trl", 8, [*lines, {"event": "error", "prompts": None, "kind": "out of time", "message": "stopped"}])
    assert late["error"] == "out of time: stopped" and "seconds" not in late
    full = summary("trl", 8, [*lines, {"event": "error", "prompts": 8, "kind": "out of memory", "message": "CUDA"}])
    assert full["error_kind"] == "out of memory" and "error" not in summary("trl", 1, lines)
    assert summary("ours", 2, lines)["error"] == "not reached"


@pytest.mark.slow
def test_a_contender_that_breaks_or_hangs_is_a_row_with_an_error(tmp_path):
    broken = run_contender(Contest(SMALL, ("ours",)), "ours", tmp_path / "nothing", tmp_path)
    assert broken[-1]["event"] == "error" and "ours.json" not in str(broken[-1])
    assert broken[-1]["kind"] == "ConfigError" and "does not exist" in broken[-1]["message"]
    slow = run_contender(Contest(SMALL, ("ours",), limit=0.2), "ours", tmp_path / "nothing", tmp_path)
    assert slow == [{"event": "error", "prompts": None, "kind": "out of time", "message": "stopped after 0 s"}]


def test_what_belongs_to_no_phase_counts_for_other(monkeypatch):
    meter = PhaseMeter(torch.device("cpu"))
    monkeypatch.setattr(meter, "_now", iter([0.0, 1.0, 3.0, 7.0, 8.0, 8.0]).__next__)
    meter.reset()
    with meter.phase("generate"):
        pass
    assert meter.finish() == 8.0
    assert meter.seconds["generate"] == 2.0 and sum(meter.seconds.values()) == pytest.approx(8.0)


@pytest.mark.slow
def test_trl_and_ours_in_processes_of_their_own(tmp_path):
    out = tmp_path / "contest.png"
    case = (*ON_COMMAND_LINE, "--against", "trl", "--num-generations", "2", "--prompt-tokens", "120")
    result = call(
        *case, "--prompts-per-step", "1,2", "--json", "--plot", str(out), "--models", str(tmp_path / "models")
    )
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1 and "ours, prompts a step: 2" in result.stderr
    figures = json.loads(result.stdout)
    rows = figures["contenders"]
    assert [(row["contender"], row["prompts_per_step"]) for row in rows] == [
        (name, count) for name in ("trl", "ours") for count in (1, 2)
    ]
    for row in rows:
        assert row["prompt_tokens"] == 120 and row["completion_tokens"] == 4 and "error" not in row
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], rel=1e-3), (
            "one round: they make up the step"
        )
        assert row["phases"]["generate"] > 0 and row["peak_bytes"] != 0
    assert out.read_bytes().startswith(b"\x89PNG") and len(list((tmp_path / "models").iterdir())) == 1


@pytest.mark.slow
def test_unsloth_and_ours_on_the_real_unsloth(tmp_path):
    paths = str(Path(__file__).parent / "gpu" / "on_cpu")
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([paths, variables["PYTHONPATH"]])
    case = replace(SMALL, max_completion_length=4, num_generations=2)
    result = run_contest(Contest(case, contenders("unsloth"), warm_up=1, environment=variables))
    assert [row["name"] for row in result["contenders"]] == ["Unsloth", "ours on Unsloth"]
    for row in result["contenders"]:
        assert row.get("error") is None and row["seconds"] > 0 and row["completion_tokens"] == 4
        assert row["prompt_tokens"] == 120 and row["phases"]["forward_backward"] > 0 and "notes" not in row
    assert "unsloth" in result["versions"]
