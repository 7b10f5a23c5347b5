"""Parts of a model trained by adapters, in full, or not: the rules, the models, their run folders and their rates."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from typing import Any

import pytest
import recorder
import tiny
import torch
import transformers
from datasets import Dataset
from published import PUBLISHED
from real_unsloth import run_script
from test_models import encoded, logits, save_run, shake
from trl.trainer.utils import use_adapter

from vlm_grpo import LoraOptions, RunConfig, VLMGRPOTrainer, VLMSFTConfig, VLMSFTTrainer, run
from vlm_grpo.config import load_config, to_yaml
from vlm_grpo.errors import ConfigError, UnsupportedError
from vlm_grpo.models import dtypes, load_model
from vlm_grpo.models.families import FAMILIES, family_of, lora_targets, tower_of
from vlm_grpo.models.parts import finish_reference_copies, whole_modules
from vlm_grpo.parts import PARTS, parts_of
from vlm_grpo.rates import split_groups


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made: dict[str, str] = {}

    def of(family: str) -> str:
        made[family] = made.get(family) or tiny.save(family, root / family)
        return made[family]

    return of


def trained(model) -> Counter:
    family = family_of(model.config)
    return Counter(tower_of(family, name) for name, p in model.named_parameters() if p.requires_grad)


def all_of(family: str, parts: set[str]) -> Counter:
    model, _ = tiny.build(family)
    row = family_of(model.config)
    return Counter(tower for name, _ in model.named_parameters() if (tower := tower_of(row, name)) in parts)


# ---- the rules -------------------------------------------------------------------------------------------------------

OFF = dict.fromkeys(PARTS, "off")


# covers Q6
@pytest.mark.parametrize(
    ("lora", "given", "expected"),
    [
        (None, {}, dict.fromkeys(PARTS, "full")),
        (LoraOptions(), {}, {"language": "lora"}),
        (LoraOptions(vision=True), {}, {"language": "lora", "vision": "lora"}),
        (LoraOptions(), {"projector": "full"}, {"language": "lora", "projector": "full"}),
        (LoraOptions(), {"vision": "full", "language": "off"}, {"vision": "full"}),
        (None, {"vision": "lora"}, {"language": "lora", "vision": "lora"}),
        (None, {"audio": "lora", "language": "off"}, {"audio": "lora"}),
        (None, {"projector": "full"}, {"projector": "full"}),
        (None, {"vision": "off"}, {"language": "full", "audio": "full", "projector": "full"}),
        (LoraOptions(targets="q_proj"), {"projector": "full"}, {"projector": "full"}),
    ],
)
def test_what_is_left_out_follows(lora, given, expected):
    parts = parts_of(lora, False, given)
    assert {part: getattr(parts, part) for part in PARTS} == {**OFF, **expected}
    assert parts.adapted == ("lora" in expected.values() or bool(lora and lora.targets))


@pytest.mark.parametrize(
    ("lora", "four_bit", "given", "message"),
    [
        (None, False, {"vision": "some"}, "vision='some' is not known. Choose one of off, lora, full"),
        (LoraOptions(vision=True), False, {"vision": "off"}, 'vision="off" and lora.vision=true are both given'),
        (LoraOptions(language=False), False, {"language": "lora"}, 'language="lora" and lora.language=false are both'),
        (
            LoraOptions(targets="q_proj"),
            False,
            {"vision": "lora"},
            "both choose adapters. Drop lora.targets, or drop v",
        ),
        (LoraOptions(vision=True), False, {"language": "full"}, 'language="full" beside vision="lora"'),
        (LoraOptions(), False, {"language": "full"}, 'language="full" beside lora: an adapter is kept apart'),
        (LoraOptions(targets="q_proj"), False, {"language": "full"}, 'language="full" beside lora.targets: an adapter'),
        (None, True, {"language": "full"}, 'language="full" with load_in_4bit'),
        (None, False, OFF, "every part is off"),
        (LoraOptions(language=False), False, {}, "nothing would be trained with vision=False, language=False"),
    ],
)
def test_parts_that_cannot_be_trained_together_are_one_sentence(lora, four_bit, given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parts_of(lora, four_bit, given)


def test_a_config_with_parts_reads_back_equal_and_says_where_it_contradicts_itself(tmp_path):
    direct = {"model": "m", "lora": True, "language": "off", "vision": "full", "projector": "lora"}
    config = load_config(None, None, direct)
    assert config.lora is not None and not config.lora.language, "as the part says it"
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml") == config
    (tmp_path / "run.yaml").write_text("model: m\nlora: {vision: true}\nvision: full\n")
    with pytest.raises(ConfigError, match=r'run\.yaml: vision="full" and lora\.vision=true are both given'):
        load_config(tmp_path / "run.yaml")


def test_the_sentence_for_fast_inference_gives_the_reason():
    with pytest.raises(UnsupportedError, match="fast_inference=True is not available here: vLLM's copy .* no video"):
        load_model("anything", fast_inference=True)


# ---- the models ------------------------------------------------------------------------------------------------------

# By tower: projectors within it, several of them, none of linear layers, weights of its own, and two encoders.
FULL = [
    ("qwen2_5_vl", {"vision": "full"}),
    ("qwen3_vl", {"projector": "full"}),
    ("qwen2_5_omni_thinker", {"audio": "full", "projector": "full"}),
    ("smolvlm", {"vision": "full", "projector": "full"}),
]


# covers Q6
@pytest.mark.parametrize("language", ["off", "lora"])
@pytest.mark.parametrize(("family", "given"), FULL, ids=[family for family, _ in FULL])
def test_exactly_the_parts_are_trained_and_their_names_say_so(folder, family, given, language):
    model, _ = load_model(folder(family), language=language, lora=LoraOptions(r=2), **given)
    count = trained(model)
    adapters = count.pop("language", 0)
    assert adapters == (0 if language == "off" else 2 * 2 * 7)
    assert count == all_of(family, set(given))


def test_with_the_language_model_in_full_the_model_itself_is_trained(folder):
    model, _ = load_model(folder("qwen2_5_vl"), vision="off")
    assert type(model) is transformers.Qwen2_5_VLForConditionalGeneration
    assert trained(model) == all_of("qwen2_5_vl", {"language", "projector"})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "gemma" in name else name
        for name, (_, config, *_) in PUBLISHED.items()
        if "audio_config" in config
    ],
)
def test_adapters_for_sounds_take_every_block_of_the_published_shape(name):
    prefix, config, *_ = PUBLISHED[name]
    config = getattr(transformers, f"{prefix}Config")(**config)
    ends = ("ForConditionalGeneration", "ForCausalLM")
    with torch.device("meta"):
        model = next(c for end in ends if (c := getattr(transformers, prefix + end, None)))(config)
    family = family_of(config)
    names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    hit = {n for n in names if re.fullmatch(lora_targets(family, model, LoraOptions(), ["audio"]), n)}
    blocks = {re.sub(r"(\.\d+\.).*", r"\1", n) for n in names if tower_of(family, n) == "audio" and "attn" in n}
    assert hit and {tower_of(family, n) for n in hit} == {"audio"}
    each = len(family.audio_attention) + len(family.audio_mlp)
    assert len(hit) == each * len(blocks) == each * {"gemma3n": 12, "phi4_multimodal": 24}.get(family.model_type, 32)


def test_a_weight_between_modules_stays_frozen_beside_adapters_and_is_named(folder, caplog):
    model, _ = load_model(folder("llava_next"), lora=LoraOptions(r=2), projector="full")
    assert "image_newline" in caplog.text and "frozen" in caplog.text
    assert trained(model)["projector"] == all_of("llava_next", {"projector"})["projector"] - 1
    assert whole_modules(tiny.build("llava_next")[0], FAMILIES["llava_next"], ("projector",)) == (
        ["model.multi_modal_projector"],
        ["model.image_newline"],
    )


def test_a_part_the_model_does_not_have_is_named(folder):
    with pytest.raises(ConfigError, match="audio=\"full\": model type 'qwen2_5_vl' has no part of that name"):
        load_model(folder("qwen2_5_vl"), audio="full")
    with pytest.raises(ConfigError, match="vision=\"lora\": model type 'qwen2_audio' has no part of that name"):
        load_model(folder("qwen2_audio"), vision="lora")
    with pytest.raises(ConfigError, match="has no projector with linear layers"):
        load_model(folder("gemma3"), projector="lora")


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["off", "lora"])
def test_what_is_trained_in_full_is_float32_and_answers_without_autocast(folder, language, tmp_path):
    parts: Any = {"vision": "full", "projector": "full", "language": language}
    model, processor = load_model(folder("qwen2_5_vl"), dtype="bfloat16", lora=LoraOptions(r=2), **parts)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    base, _ = load_model(folder("qwen2_5_vl"), dtype="bfloat16")
    torch.testing.assert_close(logits(model, processor), logits(base, processor), atol=0.1, rtol=0)
    move(model)
    run_folder = save_run(model, processor, tmp_path / "run")
    again, _ = load_model(run_folder, dtype="bfloat16")
    torch.testing.assert_close(logits(again, processor), logits(model, processor), atol=0, rtol=0)
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "read back unrounded"
    assert again.generate(**encoded(processor), max_new_tokens=2).shape[0] == 1


# covers O4
@pytest.mark.parametrize("language", ["off", "lora"])
def test_a_reference_beside_half_precision_is_the_copy_that_was_trained_so_far(folder, language):
    parts: Any = {"vision": "full", "projector": "full", "language": language}
    model, processor = load_model(folder("qwen2_5_vl"), dtype="bfloat16", lora=LoraOptions(r=2), **parts)
    move(model)
    trains = trained(model)
    model.add_adapter("ref", model.peft_config["default"])  # these four lines are TRL's
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    policy = logits(model, processor)
    with use_adapter(model, "ref"):
        assert not torch.equal(logits(model, processor), policy), "or nothing is to be done"
    finish_reference_copies(model)
    with use_adapter(model, "ref"):
        torch.testing.assert_close(logits(model, processor), policy, atol=0, rtol=0)
    assert trained(model) == trains
    torch.testing.assert_close(logits(model, processor), policy, atol=0, rtol=0)


def test_a_part_in_full_beside_half_precision_begins_without_a_kl(folder, tmp_path):  # covers O4
    model, processor = load_model(folder("qwen2_5_vl"), dtype="bfloat16", vision="full", language="off")
    move(model)
    picture = [{"type": "image"}, {"type": "text", "text": "count"}]
    rows = [{"prompt": [{"role": "user", "content": picture}], "images": [tiny.image(i)]} for i in range(4)]
    options = recorder.config(tmp_path, beta=0.1, learning_rate=1e-3)
    trainer = VLMGRPOTrainer(model, recorder.reward, options, Dataset.from_list(rows), None, processor)
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl == [0.0]


def move(model) -> None:
    """Another value for everything that is trained, too small for bfloat16 to hold."""
    shake(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * p.std() * 0.3 + 1e-4)


def test_beside_four_bit_weights_the_projector_can_be_trained_in_full(tmp_path):
    path = tiny.save("qwen2_5_vl", tmp_path / "wide", hidden=128)
    model, processor = load_model(path, load_in_4bit=True, projector="full")
    assert trained(model) == all_of("qwen2_5_vl", {"projector"})
    model.train()
    model(**encoded(processor)).logits.float().log_softmax(-1)[0, -1, 7].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    options = VLMSFTConfig(str(tmp_path / "out"), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    VLMSFTTrainer(model, options, rows(), processing_class=processor).train()


def test_four_bit_weights_are_not_trained_in_full(tmp_path):
    path = tiny.save("qwen2_5_vl", tmp_path / "wide", hidden=128)
    whole = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        path, quantization_config=whole, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "four")
    tiny.build("qwen2_5_vl")[1].save_pretrained(tmp_path / "four")
    with pytest.raises(UnsupportedError, match='vision="full": its weights are 4-bit in this checkpoint'):
        load_model(tmp_path / "four", load_in_4bit=True, lora=LoraOptions(r=2), vision="full")


# ---- run folders -----------------------------------------------------------------------------------------------------


# covers U11
@pytest.mark.parametrize("parts", [{"projector": "full"}, {"vision": "full", "language": "off"}], ids=["both", "full"])
def test_a_run_folder_is_loaded_as_it_was_saved_and_merged_without_loss(folder, parts, tmp_path):
    lora = LoraOptions(r=2)
    base, _ = load_model(folder("qwen2_5_vl"))
    model, processor = load_model(folder("qwen2_5_vl"), lora=lora, **parts)
    move(model)
    answer, untouched = logits(model, processor), logits(base, processor)
    assert (answer - untouched).abs().max() > 0.05
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, processor), untouched, atol=0, rtol=0)
    again, _ = load_model(save_run(model, processor, tmp_path / "run"))
    assert trained(again) == trained(model)
    torch.testing.assert_close(logits(again, processor), answer, atol=0, rtol=0)
    torch.testing.assert_close(logits(again.merge_and_unload(), processor), answer, atol=1e-5, rtol=0)


def test_a_run_folder_is_continued_with_the_same_parts_only(folder, tmp_path):
    model, processor = load_model(folder("qwen2_5_vl"), lora=LoraOptions(r=2), projector="full")
    saved = save_run(model, processor, tmp_path / "run")
    load_model(saved, lora=LoraOptions(r=2), projector="full")
    load_model(saved, projector="full")
    with pytest.raises(ConfigError, match="projector is off but full in the adapter. Leave that out to continue"):
        load_model(saved, lora=LoraOptions(r=2))
    with pytest.raises(ConfigError, match="vision is full but off in the adapter"):
        load_model(saved, vision="full")


# ---- feature sharing -------------------------------------------------------------------------------------------------


# covers U10
@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        ({"projector": "full"}, False),
        pytest.param({"vision": "full"}, False, marks=pytest.mark.slow),
        pytest.param({"vision": "lora"}, False, marks=pytest.mark.slow),
        pytest.param({"projector": "lora", "language": "off"}, False, marks=pytest.mark.slow),
        pytest.param({}, True, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_what_is_trained_is_encoded_with_its_gradient(folder, parts, frozen, tmp_path, largest):
    from test_group import assert_same, data_of, train

    model, processor = load_model(folder("qwen2_5_vl"), lora=LoraOptions(r=2), **parts)
    move(model)
    runs = [
        train(model, processor, data_of("qwen2_5_vl"), tmp_path / str(sharing), sharing, beta=0.1)
        for sharing in (True, False)
    ]
    assert_same(*runs, largest, "qwen2_5_vl " + " ".join(parts))
    encodes = sum(features.encodes for features in runs[0].sharing._features.values())
    assert bool(encodes) == frozen


# ---- learning rates --------------------------------------------------------------------------------------------------


def sft_config(path, **options) -> VLMSFTConfig:
    defaults = {"per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant", "weight_decay": 0.01}
    return VLMSFTConfig(str(path), **{**defaults, **quiet, **options})


def rows() -> Dataset:
    pictures = [tiny.image(i) for i in range(2)]
    return Dataset.from_list(
        [{"prompt": tiny.prompt("count one"), "images": [p], "completion": "red"} for p in pictures]
    )


# covers Q6
def test_each_part_has_its_rate_and_it_is_logged(folder, tmp_path):
    model, processor = load_model(folder("qwen2_5_vl"), lora=LoraOptions(r=2), vision="full", projector="full")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 0.0, "projector_learning_rate": 1e-5}
    trainer = VLMSFTTrainer(model, sft_config(tmp_path, **rates), rows(), processing_class=processor)
    trainer.train()
    family, moved = family_of(model.config), Counter()
    for name, p in model.named_parameters():
        if p.requires_grad:
            part = tower_of(family, name)
            moved[part] = max(moved[part], float((p.detach() - before[name]).abs().max()))
    assert moved["vision"] == 0 and 0 < moved["projector"] < 3e-5 and 5e-4 < moved["language"] < 3e-3
    record = trainer.state.log_history[0]
    assert record["learning_rate"] == 1e-3
    assert (record["learning_rate/vision"], record["learning_rate/projector"]) == (0.0, 1e-5)
    assert trainer.optimizer is not None
    decays = {(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert decays == {(rate, decay) for rate in (1e-3, 0.0, 1e-5) for decay in (0.01, 0.0)}


def test_grpo_takes_the_rates_too(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    data = Dataset.from_list([{"prompt": tiny.prompt(f"count {w}", 0)} for w in tiny.WORDS[:4]])
    options = recorder.config(tmp_path, learning_rate=1e-3, vision_learning_rate=2e-4)
    trainer = recorder.Recorder(model, recorder.reward, options, data, processing_class=processor)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate/vision"] == 2e-4


def test_the_order_of_the_groups_depends_on_names_only():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(5)]
    parts = dict(zip(weights, ["language", "vision", "projector", "vision", "language"], strict=True))
    optimizer = torch.optim.AdamW([{"params": weights[:3]}, {"params": weights[3:], "weight_decay": 0.0}], lr=1.0)
    assert split_groups(optimizer, parts, {"vision": 0.1, "projector": 0.2}) == {"vision": 2, "projector": 3}
    number = {id(p): i for i, p in enumerate(weights)}
    found = [([number[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [([0], 1.0, 0.01), ([4], 1.0, 0.0), ([1], 0.1, 0.01), ([2], 0.2, 0.01), ([3], 0.1, 0.0)]


def test_a_rate_for_nothing_is_named(folder, tmp_path):
    model, processor = load_model(folder("qwen2_5_vl"), lora=LoraOptions(r=2))
    with pytest.raises(ConfigError, match="projector_learning_rate=0.001: nothing of the projector part is trained"):
        VLMSFTTrainer(model, sft_config(tmp_path, projector_learning_rate=1e-3), rows(), processing_class=processor)
    model, _ = load_model(folder("qwen2_5_vl"), lora=LoraOptions(r=2), vision="lora")
    ready = (torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), None)
    with pytest.raises(ConfigError, match="vision_learning_rate beside an optimizer of your own"):
        config = sft_config(tmp_path, vision_learning_rate=1e-3)
        VLMSFTTrainer(model, config, rows(), processing_class=processor, optimizers=ready)


# covers U11
@pytest.mark.slow
def test_a_run_with_parts_and_rates_is_continued_exactly(folder, tmp_path, caplog):
    for i in range(2):
        tiny.image(i).save(tmp_path / f"{i}.png")
    lines = [{"prompt": tiny.prompt(f"count {tiny.WORDS[i]}"), "images": [f"{i % 2}.png"]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "rewards.py").write_text(
        "def f(completion_ids, **_):\n    return [float(sum(i) % 7) for i in completion_ids]"
    )
    options = {"num_generations": 2, "gradient_accumulation_steps": 2, "max_completion_length": 4, "save_steps": 2}
    options |= {"learning_rate": 1e-3, "projector_learning_rate": 1e-4, "flow_check": False, "max_steps": 4}

    def config(name: str, **more: Any) -> RunConfig:
        common: Any = {"model": folder("qwen2_5_vl"), "lora": {"r": 2}, "projector": "full", "max_minutes": None}
        rewards: Any = [f"{tmp_path / 'rewards.py'}:f"]
        data: Any = str(tmp_path / "rows.jsonl")
        return RunConfig(**common, data=data, rewards=rewards, output=str(tmp_path / name), train={**options, **more})

    run.train(config("whole"))
    run.train(config("parted"))
    for path in (tmp_path / "parted").glob("*.json"):
        path.unlink()
    shutil.rmtree(tmp_path / "parted" / "checkpoint-4")
    assert run.train(config("parted")).steps == 4 and "checkpoint-2" in caplog.text
    ours, theirs = (load_model(tmp_path / name)[0].state_dict() for name in ("whole", "parted"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- gradient checkpointing and number types -------------------------------------------------------------------------


class Loaded(Exception):
    """The model would be loaded now."""


def test_unsloths_checkpointing_and_the_parts_reach_load_model(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": "a", "answer": "b"}) for _ in range(8)))
    seen: dict[str, Any] = {}

    def fake(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise Loaded

    monkeypatch.setattr(run, "load_model", fake)
    overrides = ["train.gradient_checkpointing=unsloth", "projector=full", "lora=true"]
    direct = {
        "model": "m",
        "data": str(tmp_path / "rows.jsonl"),
        "rewards": ["accuracy"],
        "output": str(tmp_path / "o"),
    }
    config = load_config(None, overrides, direct)
    assert run.plan(config, "train")["trains"] == "language by LoRA; projector in full"
    with pytest.raises(Loaded):
        run.train(config)
    assert seen["gradient_checkpointing"] == "unsloth" and seen["projector"] == "full" and seen["vision"] is None
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing='often': needs true or false or 'unsloth'"):
        run.train(load_config(None, ["train.gradient_checkpointing=often"], direct))
    with pytest.raises(ConfigError, match="gradient_checkpointing='often' is not known"):
        load_model("m", gradient_checkpointing="often")  # pyright: ignore[reportArgumentType]


def test_families_that_overflow_are_those_of_unsloths_list():
    found = importlib.util.find_spec("unsloth_zoo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Unsloth is not installed")
    spec = importlib.util.spec_from_file_location("lists", f"{found.submodule_search_locations[0]}/model_lists.py")
    assert spec is not None and spec.loader is not None
    lists = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lists)

    def theirs(model_type: str) -> bool:
        """As its loader compares: a comma ends a name, underscores count in one of two ways."""
        return any(entry in f"{model_type}," or entry == model_type.replace("_", "") for entry in lists.FORCE_FLOAT32)

    types = [*FAMILIES, "gemma3_text", "gemma4", "qwen3_moe", "glm4_moe_lite", "gpt_oss", "mistral3", "qwen3"]
    assert {name: family_of(type("C", (), {"model_type": name})).float16_overflows for name in types} == {
        name: theirs(name) for name in types
    }


def test_a_family_that_overflows_is_never_loaded_in_float16(folder, monkeypatch, caplog):
    with pytest.raises(ConfigError, match="dtype=\"float16\": model type 'gemma3' exceeds what float16 holds"):
        load_model(folder("gemma3"), dtype="float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert dtypes.family_dtype(FAMILIES["gemma3"], "auto") == torch.bfloat16
    assert "overflows in float16" in caplog.text
    assert dtypes.family_dtype(FAMILIES["qwen2_5_vl"], "auto") == torch.float16


# ---- both backends ---------------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"lora": {"r": 2}},
    {"lora": {"r": 2, "vision": True}},
    {"lora": {"r": 2}, "vision": "full", "projector": "full"},
    {"lora": {"r": 2, "targets": ["q_proj"]}, "vision": "full"},
    {"vision": "full", "language": "off"},
    {"vision": "off"},
]
ON_UNSLOTH = """
import json
import torch
from vlm_grpo.models import load_model
from vlm_grpo.config import LoraOptions

def describe(model):
    named = [(n, str(p.dtype)) for n, p in model.named_parameters() if p.requires_grad]
    return {"trained": sorted(named), "type": type(model).__name__}

out = []
for path, case in json.loads(CASES):
    lora = case.pop("lora", None)
    lora = LoraOptions(**lora) if lora else None
    model, processor = load_model(path, backend="unsloth", lora=lora, gradient_checkpointing=True, **case)
    out.append(describe(model))
    if case.pop("dtype", None):
        model.save_pretrained("run")
        processor.save_pretrained("run")
        out[-1]["again"] = describe(load_model("run", backend="unsloth", dtype="bfloat16")[0])
kinds = []
for asked in ("unsloth", True):
    model, _ = load_model(path, backend="unsloth", lora=LoraOptions(r=2), gradient_checkpointing=asked)
    model.gradient_checkpointing_enable()  # as the Trainer does
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    names = {getattr(m._gradient_checkpointing_func, "func", m._gradient_checkpointing_func).__name__ for m in layers}
    kinds.append(sorted(names))
import os
print(json.dumps({"cases": out, "kinds": kinds, "full": os.environ.get("UNSLOTH_ENABLE_FULL_FINETUNING")}))
"""


# covers U2 U10
@pytest.mark.slow
def test_both_backends_train_the_same_parameters(folder, tmp_path):
    cases = [(folder("qwen2_5_vl"), case) for case in CASES]
    cases += [(folder("smolvlm"), {"lora": {"r": 2}, "vision": part}) for part in ("lora", "full")]
    cases.append((folder("qwen2_5_vl"), {"lora": {"r": 2}, "projector": "full", "dtype": "bfloat16"}))
    found = run_script(f"CASES = {json.dumps(json.dumps(cases))}\n{ON_UNSLOTH}", tmp_path)
    for (path, case), theirs in zip(cases, found["cases"], strict=True):
        lora = LoraOptions(**case["lora"]) if "lora" in case else None
        options = {name: value for name, value in case.items() if name != "lora"}
        model, _ = load_model(path, lora=lora, **options)
        ours = sorted([name, str(p.dtype)] for name, p in model.named_parameters() if p.requires_grad)
        assert (ours, type(model).__name__) == (theirs["trained"], theirs["type"]), case
    assert found["cases"][-1]["again"] == {key: found["cases"][-1][key] for key in ("trained", "type")}
    assert found["kinds"] == [["unsloth_checkpoint"], ["checkpoint"]], "the kind that was asked for stays"
    assert found["full"] in (None, "0"), "or no model of this process would get an adapter any more"
