"""load_model from folders saved as published models and our runs look, on the transformers backend."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from vlm_grpo.config import LoraOptions
from vlm_grpo.errors import ConfigError, UnsupportedError
from vlm_grpo.models import hf, load_model
from vlm_grpo.models.families import family_of, tower_of
from vlm_grpo.patches.bitsandbytes import CPU_PACKING


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same test on every machine


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(family, root / family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide enough for 4-bit blocks."""
    return tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("wide") / "qwen", hidden=128)


def encoded(processor, seed=0):
    row = tiny.prompt()
    row[0]["content"][0]["image"] = tiny.image(seed, (84, 56))
    return processor.apply_chat_template(
        [row], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def logits(model, processor, seed=0):
    return model.eval()(**encoded(processor, seed)).logits


def train_step(model, processor):
    """One backward pass; the names of the LoRA B matrices that got no gradient (A's is 0 while B is 0)."""
    model.train()
    model(**encoded(processor)).logits.float().log_softmax(-1)[0, -1, 7].backward()
    return {n for n, p in model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.abs().sum())}


def shake(model):
    """Make an adapter that matters, without training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def save_run(model, processor, path):
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


# ---- a model folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_folder_gives_the_same_model_and_processor(family, folders):
    model, processor = load_model(folders[family])
    original, original_processor = tiny.build(family)
    assert type(model) is type(original) and type(processor) is type(original_processor)
    assert model.dtype == torch.float32 and not model.training
    assert model.name_or_path == folders[family]
    torch.testing.assert_close(logits(model, processor), logits(original, original_processor), atol=1e-5, rtol=0)
    assert (logits(model, processor, seed=1) - logits(model, processor)).abs().max() > 0.05  # the picture matters


def test_the_backend_and_its_reason_are_logged(folders, caplog):
    with caplog.at_level(logging.INFO, "vlm_grpo"):
        load_model(folders["llava"])
        load_model(folders["llava"], backend="hf")
    assert [record.message for record in caplog.records] == [
        "Backend: transformers + PEFT, because there is no CUDA device.",
        'Backend: transformers + PEFT, because backend="hf" was asked for.',
    ]


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_is_of_the_weights_and_never_of_the_adapters(folders, dtype, expected):
    model, _ = load_model(folders["qwen2_vl"], dtype=dtype, lora=LoraOptions(r=2))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(False, expected), (True, torch.float32)}


@pytest.mark.parametrize(
    ("cuda", "native", "expected"),
    [(False, False, torch.float32), (True, False, torch.float16), (True, True, torch.bfloat16)],
)
def test_dtype_auto(monkeypatch, cuda, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    # emulated bfloat16 (including_emulation=True) is slow: it does not count
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert hf.resolve_dtype("auto") == expected


def test_text_only_model_comes_with_its_tokenizer(tmp_path):
    tokenizer = tiny.tokenizer((), {})
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = load_model(tmp_path, lora=LoraOptions(r=2))
    assert type(model.get_base_model()) is transformers.LlamaForCausalLM
    assert processor("hello world")["input_ids"] == tokenizer("hello world")["input_ids"]
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 7


def test_a_model_that_only_the_multimodal_class_knows(tmp_path):
    text = {"model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = transformers.Qwen2AudioConfig(text_config=text, audio_config={**audio, "num_mel_bins": 8})
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(tmp_path)
    model = hf._load_base(str(tmp_path), False, "auto")
    assert type(model) is transformers.Qwen2AudioForConditionalGeneration


# ---- LoRA ------------------------------------------------------------------------------------------------------------


# covers U2
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    ("switches", "kinds"),
    [
        ({}, {("language", "attn"), ("language", "mlp")}),
        ({"vision": True}, {("language", "attn"), ("language", "mlp"), ("vision", "attn"), ("vision", "mlp")}),
        ({"vision": True, "language": False, "mlp": False}, {("vision", "attn")}),
        ({"attention": False}, {("language", "mlp")}),
    ],
    ids=["default", "vision", "vision-attention", "language-mlp"],
)
def test_lora_switches_give_exactly_the_trainable_parameters(folders, family, switches, kinds):
    model, _ = load_model(folders[family], lora=LoraOptions(r=3, alpha=6, **switches))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    row = family_of(model.config)
    assert {(tower_of(row, name), "mlp" if ".mlp." in name else "attn") for name in trained} == kinds
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in trained)
    assert {p.shape[0] for n, p in trained.items() if ".lora_A." in n} == {3}
    language_layers = 2 * sum({"attn": 4, "mlp": 3}[kind] for tower, kind in kinds if tower == "language")
    assert sum(tower_of(row, n) == "language" for n in trained) == 2 * language_layers
    scalings = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scalings == {2.0}


def test_new_adapters_change_nothing_and_named_targets_are_taken(folders):
    plain, processor = load_model(folders["smolvlm"])
    targets = ["v_proj", "connector.modality_projection.proj"]
    model, _ = load_model(folders["smolvlm"], lora=LoraOptions(r=2, targets=targets))
    torch.testing.assert_close(logits(model, processor), logits(plain, processor), atol=0, rtol=0)
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert "model.connector.modality_projection.proj" in adapted
    assert len(adapted) == 1 + 2 + 2  # v_proj of both towers


# covers U4
@pytest.mark.parametrize("checkpointing", [False, True, "unsloth"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_adapter_gets_a_gradient(folders, family, checkpointing):
    lora = LoraOptions(r=2, vision=True)
    model, processor = load_model(folders[family], lora=lora, gradient_checkpointing=checkpointing)
    assert model.is_gradient_checkpointing == bool(checkpointing)
    untrained = train_step(model, processor)
    if family == "llava":  # it reads the last but one layer of its vision tower: the last one has no effect
        untrained = {name for name in untrained if "vision_tower.encoder.layers.2." not in name}
    assert not untrained


# ---- 4-bit, on a CPU -------------------------------------------------------------------------------------------------


def test_four_bit_on_a_cpu_trains_after_it_was_used_in_eval_mode(wide):
    import bitsandbytes as bnb

    model, processor = load_model(wide, load_in_4bit=True, lora=LoraOptions(r=4, vision=True))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 2 * 7 and all("language_model" in name for name in layers)
    assert {m.weight.quant_type for m in layers.values()} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers.values())  # double quantization
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

    used = logits(model, processor)  # an eval forward, as in a rollout: it must not repack the weights
    assert not train_step(model, processor)
    model.zero_grad()
    torch.testing.assert_close(model(**encoded(processor)).logits, used, atol=1e-5, rtol=0)
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6]])).detach().requires_grad_(True)
    layers[next(iter(layers))](embeds).sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_four_bit_is_near_the_full_model(wide):
    full, processor = load_model(wide)
    four, _ = load_model(wide, load_in_4bit=True)
    exact, quantized = logits(full, processor), logits(four, processor)
    error = (exact - quantized).std() / exact.std()
    assert 0.01 < error < 0.5  # quantized, and still the same model


def test_four_bit_switches_off_weight_packing_on_a_cpu(wide):
    load_model(wide, load_in_4bit=True)
    assert CPU_PACKING.probe() is False


def test_four_bit_without_bitsandbytes_is_one_sentence(wide, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match="load_in_4bit needs bitsandbytes, which cannot be imported here"):
        load_model(wide, load_in_4bit=True)
    load_model(wide)  # what does not need it still runs


# ---- run folders -----------------------------------------------------------------------------------------------------


# covers U11
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_run_is_loaded_as_it_was_saved(folders, family, tmp_path):
    model, processor = load_model(folders[family], lora=LoraOptions(r=2, vision=True))
    shake(model)
    run = save_run(model, processor, tmp_path / "run")
    again, again_processor = load_model(run)
    assert again.active_adapters == ["default"]
    torch.testing.assert_close(logits(again, again_processor), logits(model, processor), atol=0, rtol=0)
    plain, _ = load_model(folders[family])
    assert (logits(plain, processor) - logits(model, processor)).abs().max() > 0.05
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


def test_a_half_precision_adapter_is_trained_in_float32(folders, tmp_path):
    model, processor = load_model(folders["qwen2_vl"], lora=LoraOptions(r=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # what TRL does to the adapters of a 4-bit model
    again, _ = load_model(save_run(model, processor, tmp_path))
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_the_processor_is_the_one_of_the_run(folders, tmp_path):
    model, processor = load_model(folders["llava"], lora=LoraOptions(r=2))
    processor.chat_template = "{{ 'of the run' }}"
    assert load_model(save_run(model, processor, tmp_path / "run"))[1].chat_template == "{{ 'of the run' }}"
    model.save_pretrained(tmp_path / "bare")  # an adapter saved by other tools: the base has a processor
    assert load_model(tmp_path / "bare")[1].chat_template == tiny.build("llava")[1].chat_template


def test_a_base_model_may_be_written_relative_to_the_run(tmp_path, monkeypatch):
    tiny.save("smolvlm", tmp_path / "base")
    model, processor = load_model(tmp_path / "base", lora=LoraOptions(r=2))
    run = save_run(model, processor, tmp_path / "runs" / "one")
    saved = json.loads((run / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")  # absolute: found from anywhere
    monkeypatch.chdir(tmp_path / "runs")
    for written in ("../../base", "../base"):  # relative to the run, relative to here
        (run / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": written}))
        torch.testing.assert_close(logits(load_model("one")[0], processor), logits(model, processor), atol=0, rtol=0)


def test_a_run_over_a_run_keeps_both_adapters(folders, tmp_path):
    first, processor = load_model(folders["gemma3"], lora=LoraOptions(r=2))
    shake(first)
    save_run(first, processor, tmp_path / "first")
    merged = load_model(tmp_path / "first")[0].merge_and_unload()
    second = hf._add_adapter(merged, LoraOptions(r=3, mlp=False))
    second.peft_config["default"].base_model_name_or_path = str(tmp_path / "first")
    shake(second)
    save_run(second, processor, tmp_path / "second")
    again, _ = load_model(tmp_path / "second")
    torch.testing.assert_close(logits(again, processor), logits(second, processor), atol=1e-5, rtol=0)
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 2 * 4  # the second one's only
    with pytest.raises(UnsupportedError, match="is an adapter too, which 4-bit weights cannot absorb"):
        load_model(tmp_path / "second", load_in_4bit=True)


def test_lora_options_beside_a_saved_adapter(folders, tmp_path):
    model, processor = load_model(folders["qwen2_5_vl"], lora=LoraOptions(r=2))
    shake(model)
    run = save_run(model, processor, tmp_path / "run")
    same, _ = load_model(run, lora=LoraOptions(r=2))  # the same options continue it
    torch.testing.assert_close(logits(same, processor), logits(model, processor), atol=0, rtol=0)
    with pytest.raises(ConfigError, match=r"lora\.r is 4 but 2 in the adapter\. Leave that out to continue"):
        load_model(run, lora=LoraOptions(r=4))
    with pytest.raises(ConfigError, match=r"lora\.alpha is 32.0 but 16 .*; the options choose 24 modules .* has 14"):
        load_model(run, lora=LoraOptions(r=2, alpha=32, vision=True))


# ---- misuse: one sentence each ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "runs/a/b", "~/nowhere-at-all", ""])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(ConfigError, match=re.escape(f"model: the folder {name!r} does not exist")):
        load_model(name)


@pytest.mark.parametrize("name", ["some-owner/no-such-model", "no such model!", "runs/typo"])
def test_a_name_that_the_hub_does_not_give(name):
    with pytest.raises(
        ConfigError, match="is no folder here and cannot be fetched from the Hugging Face Hub"
    ) as caught:
        load_model(name)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither config\.json nor adapter_config\.json"):
        load_model(tmp_path)


def test_a_torn_or_foreign_folder(folders, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ConfigError, match=r"model: the folder '.*' cannot be read \(.*no-such-type"):
        load_model(tmp_path)
    transformers.BertConfig().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"bert"', '"clip"'))
    with pytest.raises(ConfigError, match="is of type 'clip', which does not generate text"):
        load_model(tmp_path)
    torn = Path(tiny.save("llava", tmp_path / "torn"))
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match="cannot be read .* Check that it is complete"):
        load_model(torn)


def test_an_adapter_whose_base_is_gone(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone"), "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="the base model of its adapter, '.*gone', does not exist. Put it back"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the base model of its adapter, '', does not exist"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="adapter_config.json is no JSON"):
        load_model(tmp_path)


def test_a_processor_that_needs_another_package(folders, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ConfigError, match="processor: .* needs a package that is missing: Package `num2words`"):
        load_model(folders["smolvlm"])


def test_unknown_options_are_named(folders):
    with pytest.raises(ConfigError, match="backend='vllm' is not known. Choose one of auto, unsloth, hf"):
        load_model(folders["llava"], backend="vllm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="dtype='bf16' is not known"):
        load_model(folders["llava"], dtype="bf16")  # pyright: ignore[reportArgumentType]


def test_unsloth_without_a_gpu_is_one_sentence(folders, monkeypatch):
    monkeypatch.delenv("UNSLOTH_ALLOW_CPU", raising=False)
    before = set(sys.modules)
    with pytest.raises(
        UnsupportedError, match=r'backend="unsloth": .*(no CUDA device|not installed).* Use backend="hf"'
    ):
        load_model(folders["llava"], backend="unsloth", lora=LoraOptions())
    assert not [name for name in set(sys.modules) - before if name.startswith("unsloth")]  # not even half imported


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys; from vlm_grpo.models import load_model; from vlm_grpo.models.families import family_of; "
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'unsloth', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkpoint_that_is_4_bit_already_loads_in_another_dtype(wide, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, processor = load_model(wide, load_in_4bit=True, dtype="bfloat16")
    before = logits(model, processor).float()
    save_run(model, processor, tmp_path / "four")
    again, _ = load_model(tmp_path / "four", dtype="float32")
    assert {p.dtype for p in again.parameters() if p.is_floating_point()} == {torch.float32}
    after = logits(again, processor)
    assert after.dtype == torch.float32 and (after - before).abs().max() < 0.1 * before.abs().max()
