"""Exports are the run they were made from: merged, quantized, copied; and what is not, is not kept."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from real_unsloth import run_script
from safetensors import SafetensorError
from typer.testing import CliRunner

import vlm_grpo.export as exports
import vlm_grpo.export.export as way
from vlm_grpo.cli import app
from vlm_grpo.config import LoraOptions
from vlm_grpo.data import to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import ConfigError, ExportError, UnsupportedError
from vlm_grpo.export import export_run
from vlm_grpo.export.folder import all_or_nothing
from vlm_grpo.models import load_model


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LLAMA_CPP", raising=False)


def shake(model, scale=0.2):
    """An adapter that matters, without training; parts that are trained whole are moved too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def write_rows(folder, kind, count=3):
    """Rows of one medium each, as files, and the JSONL that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        if kind == "image":
            file = folder / f"{number}.png"
            tiny.image(number, (84, 56)).save(file)
        else:
            file = folder / f"{number}.wav"
            wave = tiny.audio(number)
            soundfile.write(file, np.asarray(wave[0] if isinstance(wave, tuple) else wave, "float32"), 16000)
        content = [{"type": kind}, {"type": "text", "text": "what color is this"}]
        lines.append(json.dumps({"prompt": [{"role": "user", "content": content}], kind: file.name, "answer": "red"}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def save_run(folder, base, data=None, lora=None, scale=0.2, config="", **how):
    """A run folder as training leaves one."""
    torch.manual_seed(0)  # of the adapter's first weights
    model, processor = load_model(base, lora=lora or LoraOptions(r=4), **how)
    shake(model, scale)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    lines = ["# vlm-grpo train", f"model: {base}", "lora: true", "rewards: [accuracy]", config]
    lines += [f"data: {{train: {data}}}"] if data else []
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    (folder / "result.json").write_text(json.dumps({"steps": 7}))
    figure = {"accuracy": 0.5, "ci95": [0.4, 0.6], "rows": 10}
    (folder / "evaluation.json").write_text(json.dumps({"before": figure, "after": {**figure, "accuracy": 0.75}}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), "image")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("base") / "qwen", seed=1)


@pytest.fixture
def run(tmp_path, base, images):
    return save_run(tmp_path / "run", base, images)


@torch.no_grad()
def logits(model, processor, images):
    row = json.loads(Path(images).read_text().splitlines()[0])
    encoded = encode(processor, to_sample(row, Path(images).parent))
    ids = torch.tensor([encoded.input_ids])
    return model.eval()(input_ids=ids, **encoded.tokens, **encoded.media).logits


# covers U11
def test_merged_16bit_is_the_run_in_bfloat16(run, base, images):
    report = export_run(run, "merged_16bit", max_new_tokens=3)
    folder = run / "export-merged_16bit"
    assert report.output == str(folder) and report.saved_by == "PEFT's merge" and report.dtype == "bfloat16"
    assert report.rows == report.answers_equal == 3 and report.rows_from == "the run's training rows"
    assert 0 < report.difference <= report.tolerance < report.effect
    assert 0.95 < report.share < 1.05
    # The same again, by hand: the adapter's logits, and not the base's.
    model, processor = load_model(folder)
    assert not hasattr(model, "peft_config")
    exported = logits(model, processor, images)
    trained = logits(*load_model(run), images)
    assert (exported - trained).abs().max() <= 2 * report.tolerance  # at every token, where the report has the last
    assert (exported - logits(*load_model(base), images)).abs().max() > 0.5 * report.effect > 1e-2


@pytest.mark.slow
def test_the_folder_has_what_a_model_needs_and_its_card(run):
    export_run(run, "merged_16bit", run.parent / "out", rows=2, max_new_tokens=3)
    files = {path.name for path in (run.parent / "out").iterdir()}
    assert files >= {"model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"}
    assert files >= {"processor_config.json", "tokenizer.json", "README.md", "export.json"}
    figures = json.loads((run.parent / "out" / "export.json").read_text())
    assert figures["answers_equal"] == figures["rows"] == 2 and figures["to"] == "merged_16bit"
    card = (run.parent / "out" / "README.md").read_text()
    assert "GRPO" in card and "accuracy x 1" in card and "steps: 7" in card and "75.0%" in card
    assert "answers equal: 2 of 2" in card
    assert "license" not in card and str(run.parent) not in card, "no claim, and no path of this machine"


@pytest.mark.slow
def test_lora_is_loaded_by_peft_and_by_load_model(run, base, images):
    from peft import PeftModel

    for name in ("processor_config.json", "tokenizer_config.json"):
        (run / name).unlink()  # of the base then, which the export still gets
    report = export_run(run, "lora")
    folder = run / "export-lora"
    assert report.difference == 0 and report.share == pytest.approx(1)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert (folder / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    plain, processor = tiny.build("qwen2_5_vl", seed=1)
    trained = logits(*load_model(run), images)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(folder)), processor, images), trained)
    torch.testing.assert_close(logits(*load_model(folder), images), trained)


@pytest.mark.slow
def test_parts_that_were_trained_whole_are_merged_too(tmp_path, base, images):
    run = save_run(tmp_path / "run", base, images, lora=LoraOptions(r=2), vision="full", scale=0.05)
    written = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(written.replace("lora: true", "lora: {r: 2}\nvision: full"))
    saved = json.loads((run / "adapter_config.json").read_text())["modules_to_save"]
    assert saved
    report = export_run(run, "merged_16bit", max_new_tokens=3)
    assert report.answers_equal == 3 and report.difference <= report.tolerance
    assert "(language by LoRA; vision in full, rank 2)" in (Path(report.output) / "README.md").read_text()
    model, _ = load_model(report.output)
    start, _ = load_model(base)
    moved = [
        name
        for (name, one), other in zip(model.named_parameters(), start.parameters(), strict=True)
        if "visual" in name and (one - other).abs().max() > 0.02
    ]
    assert moved


@pytest.mark.slow
def test_tied_embeddings_that_an_adapter_changed_on_one_side(tmp_path, images):
    model, processor = tiny.build("qwen2_5_vl")
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    processor.save_pretrained(tmp_path / "tied")
    tied, _ = load_model(tmp_path / "tied")
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight

    kept = export_run(save_run(tmp_path / "run", str(tmp_path / "tied"), images), "merged_16bit")
    model, _ = load_model(kept.output)
    assert model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

    lora = LoraOptions(r=2, targets=["q_proj", "lm_head"])
    head = export_run(save_run(tmp_path / "head", str(tmp_path / "tied"), images, lora), "merged_16bit")
    assert head.answers_equal == 3
    model, _ = load_model(head.output)
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.slow
def test_an_audio_model(tmp_path):
    base = tiny.save("qwen2_audio", tmp_path / "base")
    data = write_rows(tmp_path / "data", "audio", 2)
    report = export_run(save_run(tmp_path / "run", base, data), "merged_16bit", max_new_tokens=3)
    assert report.rows_from == "the run's training rows"
    assert report.answers_equal == 2 and report.difference <= report.tolerance < report.effect


@pytest.mark.slow
def test_float16_has_more_bits(run):
    coarse = export_run(run, "merged_16bit", run.parent / "a")
    fine = export_run(run, "merged_16bit", run.parent / "b", dtype="float16")
    assert fine.dtype == "float16" and fine.tolerance == pytest.approx(coarse.tolerance / 8, rel=0.1)
    assert fine.difference < coarse.difference / 2


@pytest.mark.slow
def test_a_checkpoint(run, base, images):
    checkpoint = run / "checkpoint-3"
    save_run(checkpoint, base, scale=0.3)
    (checkpoint / "config.yaml").unlink()
    report = export_run(checkpoint, "merged_16bit")
    assert Path(report.output) == run / "export-merged_16bit-checkpoint-3", "not in a folder that will be rotated away"
    assert report.rows_from == "the run's training rows"
    card = (Path(report.output) / "README.md").read_text()
    assert "steps: 3" in card and "75.0%" not in card, "held-out figures are of the run's end"


@pytest.mark.slow
def test_an_adapter_of_another_origin_is_checked_on_made_up_prompts(run):
    (run / "config.yaml").unlink()
    report = export_run(run, "merged_16bit", rows=2)
    assert report.rows_from == "made-up prompts (pictures)" and report.rows == 2


@pytest.mark.slow
def test_rows_that_are_gone_are_said(run, images, caplog):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(images), str(images) + "-gone.jsonl"))
    assert export_run(run, "merged_16bit", run.parent / "a", rows=1).rows_from == "made-up prompts (pictures)"
    assert "The run's own rows cannot be used (training: " in caplog.text and "does not exist" in caplog.text
    assert export_run(run, "merged_16bit", run.parent / "b", rows=1, data=str(images)).rows_from == str(images)


# ---- a whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_model_is_rounded_to_16_bits(tmp_path, base, images):
    model, processor = load_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    run = tmp_path / "run"
    model.save_pretrained(run)
    processor.save_pretrained(run)
    (run / "config.yaml").write_text(f"# vlm-grpo sft\nmodel: {base}\ndata: {images}\n")
    with pytest.raises(ConfigError, match="is a whole model, without an adapter. Use --to merged_16bit"):
        export_run(run, "lora")
    report = export_run(run, "merged_16bit")
    assert report.dtype == "bfloat16" and report.difference <= report.tolerance and report.effect > 0.01
    assert report.share == pytest.approx(1, abs=0.2)
    again = export_run(report.output, "merged_16bit")  # an export is a model of its own
    assert again.difference == 0 and again.effect is None


# ---- what is not kept ------------------------------------------------------------------------------------------------


def test_an_adapter_without_effect(tmp_path, base, images):
    run = save_run(tmp_path / "run", base, images, scale=0.0)
    with pytest.raises(ExportError, match="answers exactly like its base model .* the adapter has no effect"):
        export_run(run, "merged_16bit")
    assert not list(run.glob("*export*"))


@pytest.mark.slow
def test_an_adapter_below_the_rounding(tmp_path, base, images):
    run = save_run(tmp_path / "run", base, images, scale=1e-8)
    with pytest.raises(ExportError, match=r"changes logits by .* at most, less than rounding the weights may"):
        export_run(run, "merged_16bit")


def test_a_merge_that_forgets_the_adapter(run, monkeypatch):
    monkeypatch.setattr(way, "merge", lambda model: model.unload())
    done = CliRunner().invoke(app, ["export", str(run), "--to", "merged_16bit", "--rows", "1"])
    assert done.exit_code == 2 and "The export answers like the base model" in done.stderr
    assert ": 0% of what the adapter changes" in done.stderr and "the adapter was not merged" in done.stderr
    assert not list(run.glob("*export*"))


@pytest.mark.slow
def test_a_merge_that_is_wrong(run, monkeypatch):
    def merge(model):
        merged = model.merge_and_unload()
        merged.lm_head.weight.data.mul_(2.0)
        return merged

    monkeypatch.setattr(way, "merge", merge)
    with pytest.raises(ExportError, match=r"The export differs from the run: logits by up to .* rounding explains"):
        export_run(run, "merged_16bit")


@pytest.mark.slow
def test_an_export_that_does_not_stop(run, monkeypatch):
    ask = way.probe

    def probe(*args, like=None, adapter=True, **options):
        found = ask(*args, like=like, adapter=adapter, **options)
        if like is not None and adapter:  # the export's
            found.ids[0].append(5)
        return found

    monkeypatch.setattr(way, "probe", probe)
    with pytest.raises(ExportError, match="The export answers row 1 otherwise, though its logits are the run's"):
        export_run(run, "merged_16bit", max_new_tokens=3)


@pytest.mark.slow
def test_nothing_half_made_is_left_and_the_old_export_stays(run, monkeypatch):
    export_run(run, "merged_16bit", rows=1)
    before = (run / "export-merged_16bit" / "export.json").read_text()
    with pytest.raises(ConfigError, match="holds an export. Choose another --output, or give --overwrite"):
        export_run(run, "merged_16bit")

    def fail(*args, **options):
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(way.Export, "_compare", fail)
        with pytest.raises(OSError, match="the power went"):
            export_run(run, "merged_16bit", overwrite=True)
    assert (run / "export-merged_16bit" / "export.json").read_text() == before
    assert [path.name for path in run.glob("*export*")] + [path.name for path in run.glob(".*export*")] == [
        "export-merged_16bit"
    ]
    (run / ".export-merged_16bit.partial").mkdir()  # of a process that was killed
    (run / ".export-merged_16bit.partial" / "model.safetensors").write_text("torn")
    assert export_run(run, "merged_16bit", overwrite=True, rows=2).rows == 2
    assert json.loads((run / "export-merged_16bit" / "export.json").read_text())["rows"] == 2
    assert not list(run.glob(".*export*"))


def test_a_process_killed_while_it_replaced_an_export(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "export.json").write_text("{}")
    with pytest.raises(KeyError), all_or_nothing(tmp_path / "out"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the old one is back"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left (28)")])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, base, monkeypatch, error):
    def full(self, *arguments):
        raise error

    run = save_run(tmp_path / "run", base)
    monkeypatch.setattr(way.Export, "go", full)
    with pytest.raises(ExportError, match="the disk of .*export-lora is full. Nothing was kept"):
        export_run(run, "lora")
    assert not [path.name for path in run.iterdir() if "export" in path.name]


def test_ctrl_c_promises_no_checkpoint(monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "export_run", stopped)
    result = CliRunner().invoke(app, ["export", "run", "--to", "lora"])
    assert result.exit_code == 130 and result.stderr == "Stopped.\n"


def test_misuse_is_one_sentence(run, base, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="export: the folder 'nowhere' does not exist"):
        export_run("nowhere", "lora")
    with pytest.raises(ConfigError, match="to='merged' is not known. Choose one of lora, merged_16bit"):
        export_run(run, "merged")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="rows=0 must be 1 or more"):
        export_run(run, "lora", rows=0)
    with pytest.raises(ConfigError, match="holds the model that is exported"):
        export_run(run, "lora", run)
    with pytest.raises(ConfigError, match="holds something else. Choose another --output"):
        export_run(run, "lora", base, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "volume")
        with pytest.raises(ConfigError, match="volume is where a disk is mounted. Choose a folder inside it"):
            export_run(run, "lora", tmp_path / "volume")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither an adapter nor a model"):
        export_run(tmp_path / "empty", "lora")
    second = save_run(tmp_path / "second", str(base))
    saved = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**saved, "base_model_name_or_path": str(run)}))
    with pytest.raises(UnsupportedError, match="is an adapter too .*, which PEFT cannot load below another"):
        export_run(second, "lora", rows=1)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("wide") / "qwen", hidden=128)


@pytest.mark.slow
def test_merged_4bit(tmp_path, wide, images):
    import bitsandbytes

    run = save_run(tmp_path / "run", wide, images, scale=0.3)
    report = export_run(run, "merged_4bit")
    assert any("4 bits alone change the base model's logits by" in note for note in report.notes)
    assert report.difference <= report.tolerance and 0.7 < report.share < 1.3
    assert not (Path(report.output) / ".merged").exists()
    model, _ = load_model(report.output, load_in_4bit=True)
    four = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert four and not any("visual" in name or "lm_head" in name for name in four)


@pytest.mark.slow
def test_a_run_over_4bit_weights(tmp_path, wide, images):
    run = save_run(tmp_path / "run", wide, images, config="load_in_4bit: true", load_in_4bit=True, scale=0.3)
    report = export_run(run, "merged_16bit", tmp_path / "16")
    assert report.difference <= report.tolerance, "against the adapter over 16-bit weights"
    assert report.trained_difference > report.difference, "against the adapter over the 4-bit weights it was trained on"
    names = [name for name, _ in report.lines()]
    assert "to the run in 4-bit" in names
    again = export_run(run, "merged_4bit", tmp_path / "4")
    assert again.trained_difference is None and again.difference <= again.tolerance and 0.7 < again.share < 1.3


@pytest.mark.slow
def test_a_base_that_was_published_in_4_bits(tmp_path, wide, images):
    model, processor = load_model(wide, load_in_4bit=True)
    model.save_pretrained(tmp_path / "four")
    processor.save_pretrained(tmp_path / "four")
    run = save_run(
        tmp_path / "run", str(tmp_path / "four"), images, config="load_in_4bit: true", load_in_4bit=True, scale=0.3
    )
    report = export_run(run, "merged_16bit", tmp_path / "16")
    assert report.difference <= report.tolerance
    assert report.trained_difference <= 2 * report.tolerance, "the weights it was trained over, dequantized"
    plain, _ = load_model(report.output)
    assert getattr(plain.config, "quantization_config", None) is None
    four = export_run(run, "merged_4bit", tmp_path / "4")
    assert four.share > 0.7


# ---- gguf ------------------------------------------------------------------------------------------------------------

_CONVERTER = """
import json, pathlib, sys
merged, options = pathlib.Path(sys.argv[1]), sys.argv[2:]
assert json.loads((merged / "config.json").read_text())["model_type"] == "qwen2_5_vl"
if "refuse" in pathlib.Path(__file__).parent.name:
    sys.exit("Model Qwen is not supported")
pathlib.Path(options[options.index("--outfile") + 1]).write_text(" ".join(options))
"""
_RUNNER = f"""#!{sys.executable}
import pathlib, sys
options = dict(zip(sys.argv[1:], sys.argv[2:]))
assert pathlib.Path(options["--image"]).is_file() and options["-p"] == "what color is this" and options["--temp"] == "0"
assert pathlib.Path(options["-m"]).name == "model-bf16.gguf"
assert pathlib.Path(options["--mmproj"]).name == "mmproj-bf16.gguf"
print("an answer of llama.cpp")
"""


def llama_cpp(folder):
    """Something that is called as llama.cpp's programs are."""
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(_CONVERTER)
    return folder


def test_gguf_without_llama_cpp_is_one_line_at_once(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(exports, "Export", None)  # before anything is loaded
    with pytest.raises(UnsupportedError, match="needs llama.cpp's convert_hf_to_gguf.py.*Do: git clone") as caught:
        export_run(run, "gguf")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--llama-cpp: nowhere has no convert_hf_to_gguf.py"):
        export_run(run, "gguf", llama_cpp="nowhere")
    assert not list(run.glob("*export*"))


@pytest.mark.slow
def test_gguf_is_converted_from_a_checked_merge(run, tmp_path, monkeypatch):
    folder = llama_cpp(tmp_path / "llama.cpp")
    monkeypatch.setenv("PATH", "/nowhere")
    report = export_run(run, "gguf", llama_cpp=str(folder), rows=1)
    out = run / "export-gguf"
    assert {path.name for path in out.glob("*.gguf")} == {"model-bf16.gguf", "mmproj-bf16.gguf"}
    assert (out / "mmproj-bf16.gguf").read_text().endswith("--outtype bf16 --mmproj")
    assert not (out / ".merged").exists() and report.difference <= report.tolerance
    assert report.gguf_answers_equal is None and "llama-mtmd-cli" in report.notes[-1]

    runner = folder / "build" / "bin" / "llama-mtmd-cli"
    runner.write_text(_RUNNER)
    runner.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    report = export_run(run, "gguf", overwrite=True, rows=1)
    assert report.gguf_answers_equal == 0


@pytest.mark.slow
def test_gguf_that_llama_cpp_refuses(run, tmp_path):
    folder = llama_cpp(tmp_path / "refuse")
    with pytest.raises(ExportError, match=r"cannot convert the merged model \(Model Qwen is not supported\)"):
        export_run(run, "gguf", llama_cpp=str(folder), rows=1)
    assert not list(run.glob("*export*"))


@pytest.mark.slow
def test_the_command_prints_the_report(run):
    done = CliRunner().invoke(app, ["export", str(run), "--to", "lora", "--rows", "2"])
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "exported to lora" in text and "2 of 2" in text and "tolerance" in text


# ---- the real Unsloth ------------------------------------------------------------------------------------------------

_UNSLOTH = """
import json, torch
from pathlib import Path
import tiny
from safetensors.torch import load_file
from vlm_grpo import LoraOptions, export_run, load_model
from test_export import shake

model, processor = tiny.build("qwen2_5_vl")
model.to(torch.bfloat16).save_pretrained("base")
processor.save_pretrained("base")
model, processor = load_model("base", backend="unsloth", lora=LoraOptions(r=4, vision=True))
shake(model)
model.save_pretrained("run")
processor.save_pretrained("run")
Path("run/config.yaml").write_text("# vlm-grpo train\\nmodel: base\\nlora: true\\nbackend: unsloth\\n")
options = {"rows": 2, "max_new_tokens": 3}
by_unsloth = export_run("run", "merged_16bit", **options)
by_peft = export_run("run", "merged_16bit", "peft", backend="hf", **options)
one, other = (load_file(f"{report.output}/model.safetensors") for report in (by_unsloth, by_peft))
pad = processor.tokenizer.pad_token_id
for weights in (one, other):
    weights["model.embed_tokens.weight"][pad] = 0  # which Unsloth sets so
apart = max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
lora = export_run("run", "lora", **options)

import vlm_grpo.models.unsloth as ours
ours.save_merged = lambda model, processor, folder: (
    load_model("base", backend="hf", dtype="bfloat16")[0].save_pretrained(folder), processor.save_pretrained(folder)
)
mended = export_run("run", "merged_16bit", "mended", **options)
print(json.dumps({"unsloth": vars(by_unsloth), "peft": vars(by_peft), "apart": apart,
                  "same": one.keys() == other.keys(), "lora": vars(lora), "mended": vars(mended)}))
"""


@pytest.mark.slow
def test_unsloth_merges_as_peft_does_and_its_failures_are_mended(tmp_path):
    found = run_script(_UNSLOTH, tmp_path)
    for report in (found["unsloth"], found["peft"], found["mended"]):
        assert report["difference"] <= report["tolerance"] < report["effect"] and report["answers_equal"] == 2
    assert found["unsloth"]["saved_by"] == "Unsloth's merge" and found["peft"]["saved_by"] == "PEFT's merge"
    assert found["same"] and found["apart"] == 0
    assert found["lora"]["difference"] == 0
    assert found["mended"]["saved_by"] == "PEFT's merge", "the adapter had been forgotten"
