"""The family table against each family's true published shape, built on the meta device, and against tiny models."""

import logging
import re
from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers

from vlm_grpo.config import LoraOptions
from vlm_grpo.errors import ConfigError
from vlm_grpo.models.families import FAMILIES, family_of, lora_targets, placeholder_ids, tower_of


def _text(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv, **more}


def _vision(hidden: int, ffn: int, layers: int, heads: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "image_size": image}
    return {**sizes, "num_attention_heads": heads, "patch_size": patch, **more}


MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
QWEN_IDS = {"image_token_id": 151655, "video_token_id": 151656}
QWEN_IDS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
QWEN25_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
QWEN25_VISION |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}

# name: class, config as published, published number of parameters,
# and layers x (attention, MLP) of the vision and the language tower, placeholder ids.
PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": (
        "Qwen2VL",
        {
            "text_config": _text(1536, 8960, 28, 12, 2, 151936, rope_parameters=MROPE),
            "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
            "tie_word_embeddings": True,
            **QWEN_IDS,
        },
        2_208_985_600,
        (32, 2, 2, 28, 4, 3),
        (151655, 151656),
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "Qwen2_5_VL",
        {
            "text_config": _text(2048, 11008, 36, 16, 2, 151936, rope_parameters=MROPE),
            "vision_config": {**QWEN25_VISION, "out_hidden_size": 2048},
            "tie_word_embeddings": True,
            **QWEN_IDS,
        },
        3_754_622_976,
        (32, 2, 3, 36, 4, 3),
        (151655, 151656),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "Qwen2_5_VL",
        {
            "text_config": _text(3584, 18944, 28, 28, 4, 152064, rope_parameters=MROPE),
            "vision_config": {**QWEN25_VISION, "out_hidden_size": 3584},
            "tie_word_embeddings": False,
            **QWEN_IDS,
        },
        8_292_166_656,
        (32, 2, 3, 28, 4, 3),
        (151655, 151656),
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        "Idefics3",
        {
            "text_config": _text(576, 1536, 30, 9, 3, 49280, model_type="llama"),
            "vision_config": _vision(768, 3072, 12, 12, 512, 16),
            "scale_factor": 4,
            "image_token_id": 49190,
            "tie_word_embeddings": False,
        },
        256_484_928,
        (12, 4, 2, 30, 4, 3),
        (49190,),
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        "SmolVLM",
        {
            "text_config": _text(2048, 8192, 24, 32, 32, 49280, model_type="llama"),
            "vision_config": _vision(1152, 4304, 27, 16, 384, 14),
            "scale_factor": 3,
            "image_token_id": 49190,
            "tie_word_embeddings": False,
        },
        2_246_784_880,
        (27, 4, 2, 24, 4, 3),
        (49190,),
    ),
    "llava-hf/llava-1.5-7b-hf": (
        "Llava",
        {
            "text_config": _text(4096, 11008, 32, 32, 32, 32064, model_type="llama"),
            "vision_config": _vision(1024, 4096, 24, 16, 336, 14, model_type="clip_vision_model", projection_dim=768),
            "image_token_index": 32000,
            "tie_word_embeddings": False,
        },
        7_063_427_072,
        (24, 4, 2, 32, 4, 3),
        (32000,),
    ),
    "google/gemma-3-4b-it": (
        "Gemma3",
        {
            "text_config": _text(2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024),
            "vision_config": _vision(1152, 4304, 27, 16, 896, 14, vision_use_head=False),
            "mm_tokens_per_image": 256,
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
        },
        4_300_079_472,
        (27, 4, 2, 34, 4, 3),
        (262144,),
    ),
}
SWITCHES = [s for s in product((False, True), repeat=4) if (s[0] or s[1]) and (s[2] or s[3])]


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> SimpleNamespace:
    prefix, config, parameters, layers, ids = PUBLISHED[request.param]
    config = getattr(transformers, f"{prefix}Config")(**config)
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return SimpleNamespace(model=model, config=config, parameters=parameters, layers=layers, ids=ids)


# covers U10
def test_every_parameter_of_the_published_shape_belongs_to_a_tower(published):
    family, towers = family_of(published.config), Counter()
    for name, parameter in published.model.named_parameters():
        tower = tower_of(family, name)
        towers[tower] += parameter.numel()
        assert tower_of(family, f"base_model.model.{name}") == tower
    assert family.tested and set(towers) == {"vision", "projector", "language"}
    assert sum(towers.values()) == published.parameters
    # A projector is a thin thing between a vision tower and a larger language model.
    assert towers["projector"] < towers["vision"] < towers["language"]
    assert towers["language"] >= published.model.get_input_embeddings().weight.numel()


# covers U2
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("-+"[on] for on in s))
def test_lora_switches_choose_exactly_the_layers_of_the_published_shape(published, switches):
    vision, language, attention, mlp = switches
    options = LoraOptions(vision=vision, language=language, attention=attention, mlp=mlp)
    regex = lora_targets(family_of(published.config), published.model, options)
    modules = dict(published.model.named_modules())
    hit = {name for name in modules if re.fullmatch(regex, name)}

    blocks_v, attention_v, mlp_v, blocks_l, attention_l, mlp_l = published.layers
    expected = vision * blocks_v * (attention * attention_v + mlp * mlp_v)
    expected += language * blocks_l * (attention * attention_l + mlp * mlp_l)
    assert len(hit) == expected
    family = family_of(published.config)
    for name in hit:
        assert isinstance(modules[name], torch.nn.Linear)
        assert modules[name] is not published.model.get_output_embeddings()
        assert {"vision": vision, "language": language}[tower_of(family, name)]
        assert (attention and "attn" in name) or (mlp and ".mlp." in name)


# covers U2
def test_placeholder_ids_of_the_published_shape(published):
    assert placeholder_ids(published.config) == published.ids
    assert all(0 <= i < published.config.get_text_config().vocab_size for i in published.ids)


def test_every_row_of_the_table_is_tested():
    prefixes = {prefix for prefix, *_ in PUBLISHED.values()}
    assert {getattr(transformers, f"{prefix}Config").model_type for prefix in prefixes} == set(FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_placeholders_are_what_the_processor_puts_in_for_a_picture(family):
    model, processor = tiny.build(family)
    rows = [tiny.prompt("what color is this", images=n) for n in (0, 2)]
    for row in rows[1:]:
        for part, seed in zip(row[0]["content"][:2], (1, 2), strict=True):
            part["image"] = tiny.image(seed)
    encoded = [
        processor.apply_chat_template([row], tokenize=True, return_dict=True, return_tensors="pt") for row in rows
    ]
    ids = torch.tensor(placeholder_ids(model.config, processor))
    assert not torch.isin(encoded[0]["input_ids"], ids).any()
    assert torch.isin(encoded[1]["input_ids"], ids).sum() >= 2
    # The one the model replaces by features: one more of it is what a sampled one would be.
    extra = torch.tensor([[model.config.image_token_id]])
    assert model.config.image_token_id in ids
    inputs = {
        name: torch.cat([value, extra if name == "input_ids" else value[:, -1:]], dim=1)
        if value.ndim == 2 and value.shape == encoded[1]["input_ids"].shape
        else value
        for name, value in encoded[1].items()
    }
    with pytest.raises((ValueError, IndexError, RuntimeError)), torch.no_grad():
        model(**inputs)


def test_processor_tokens_that_are_expanded_again_are_placeholders():
    model, processor = tiny.build("gemma3")
    start = processor.tokenizer.convert_tokens_to_ids("<start_of_image>")
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_image>")
    assert set(placeholder_ids(model.config, processor)) == {start, model.config.image_token_id}
    assert end not in placeholder_ids(model.config, processor)


def test_text_only_model_is_all_language_and_has_no_placeholders(caplog):
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(num_hidden_layers=3))
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        family = family_of(model.config)
        family_of(model.config)
    assert sum("qwen3" in record.message for record in caplog.records) <= 1  # said once a process
    assert not family.tested
    assert {tower_of(family, name) for name, _ in model.named_parameters()} == {"language"}
    regex = lora_targets(family, model, LoraOptions())
    assert sum(re.fullmatch(regex, name) is not None for name, _ in model.named_modules()) == 3 * 7
    assert placeholder_ids(model.config) == ()
    with pytest.raises(ConfigError, match="'qwen3' has no attention layer .* vision tower"):
        lora_targets(family, model, LoraOptions(vision=True))


def test_unknown_multimodal_family_is_found_by_names_and_never_across_towers():
    config = transformers.MllamaConfig()  # its vision blocks are called "layers", as a language model's are
    with torch.device("meta"):
        model = transformers.MllamaForConditionalGeneration(config)
    family = family_of(config)
    towers = {name: tower_of(family, name) for name, _ in model.named_parameters()}
    assert set(towers.values()) == {"vision", "projector", "language"}
    for vision in (False, True):
        regex = lora_targets(family, model, LoraOptions(vision=vision, language=not vision, mlp=False))
        hit = [name for name, _ in model.named_modules() if re.fullmatch(regex, name)]
        assert len(hit) > 100
        assert {tower_of(family, name) for name in hit} == {"vision" if vision else "language"}


def test_targets_stand_instead_of_the_switches():
    model, _ = tiny.build("qwen2_5_vl")
    family = family_of(model.config)
    for targets in (["q_proj", "visual.merger.mlp.0"], r"model\.visual\.merger\.mlp\.\d", "all-linear"):
        assert lora_targets(family, model, LoraOptions(targets=targets, language=False, vision=False)) == targets
    # a single string is PEFT's regular expression over the whole name
    with pytest.raises(ConfigError, match="'q_proj' matches no module of the model as a regular expression"):
        lora_targets(family, model, LoraOptions(targets="q_proj"))
    with pytest.raises(ConfigError, match="'query' matches no module of the model as a module name"):
        lora_targets(family, model, LoraOptions(targets=["q_proj", "query"]))


def test_nothing_switched_on_is_refused():
    model, _ = tiny.build("llava")
    off = SimpleNamespace(vision=False, language=True, attention=False, mlp=False, targets=None)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        lora_targets(family_of(model.config), model, off)


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight", "vision"),
        ("base_model.model.model.visual.merger.mlp.0.lora_B.default.weight", "projector"),
        ("visual.blocks.3.mlp.gate_proj.weight", "vision"),  # the layout of older checkpoints
        ("model.language_model.layers.1.self_attn.q_proj.lora_B.ref.weight", "language"),
        ("base_model.model.lm_head.weight", "language"),
        ("value_head.weight", "other"),
        ("model.visually.weight", "other"),  # a prefix is a whole path component
    ],
)
def test_tower_of_a_name(name, tower):
    assert tower_of(FAMILIES["qwen2_5_vl"], name) == tower
