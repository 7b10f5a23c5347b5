"""The family table against each family's true published shape, built on the meta device, and against tiny models."""

import logging
import re
from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
from published import PUBLISHED
from safetensors.torch import save_file

from vlm_grpo import load_model
from vlm_grpo.collate import model_inputs
from vlm_grpo.config import LoraOptions
from vlm_grpo.encode import EncodedPrompt
from vlm_grpo.errors import ConfigError
from vlm_grpo.models.families import (
    FAMILIES,
    family_of,
    lora_targets,
    placeholder_ids,
    placeholder_ids_by_kind,
    together,
    tower_of,
)

SWITCHES = [s for s in product((False, True), repeat=4) if (s[0] or s[1]) and (s[2] or s[3])]


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> SimpleNamespace:
    prefix, config, parameters, layers, ids = PUBLISHED[request.param]
    config = getattr(transformers, f"{prefix}Config")(**config)
    ends = ("ForConditionalGeneration", "ForCausalLM")
    model_class = next(found for end in ends if (found := getattr(transformers, prefix + end, None)))
    with torch.device("meta"):
        model = model_class(config)
    return SimpleNamespace(model=model, config=config, parameters=parameters, layers=layers, ids=ids)


# covers U10
def test_every_parameter_of_the_published_shape_belongs_to_a_tower(published):
    family, towers = family_of(published.config), Counter()
    for name, parameter in published.model.named_parameters():
        tower = tower_of(family, name)
        towers[tower] += parameter.numel()
        assert tower_of(family, f"base_model.model.{name}") == tower
    encoders = {tower for tower in ("vision", "audio") if getattr(family, tower)}
    assert family.tested and set(towers) == {"projector", "language"} | encoders
    rounded = isinstance(published.parameters, float)
    assert sum(towers.values()) == pytest.approx(published.parameters, rel=2e-3 if rounded else 0)
    # A projector is a thin thing between a tower and a larger language model.
    for encoder in encoders:
        assert towers["projector"] < towers[encoder] < towers["language"]
    assert towers["language"] >= published.model.get_input_embeddings().weight.numel()


# covers U2 A11
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("-+"[on] for on in s))
def test_lora_switches_choose_exactly_the_layers_of_the_published_shape(published, switches):
    vision, language, attention, mlp = switches
    options = LoraOptions(vision=vision, language=language, attention=attention, mlp=mlp)
    family = family_of(published.config)
    blocks_v, attention_v, mlp_v, blocks_l, attention_l, mlp_l = published.layers
    if vision and not blocks_v:
        with pytest.raises(ConfigError, match="in its vision tower"):
            lora_targets(family, published.model, options)
        return
    regex = lora_targets(family, published.model, options)
    modules = dict(published.model.named_modules())
    hit = {name for name in modules if re.fullmatch(regex, name)}
    expected = vision * blocks_v * (attention * attention_v + mlp * mlp_v)
    expected += language * blocks_l * (attention * attention_l + mlp * mlp_l)
    assert len(hit) == expected
    for name in hit:
        assert isinstance(modules[name], torch.nn.Linear)
        assert modules[name] is not published.model.get_output_embeddings()
        assert {"vision": vision, "language": language}[tower_of(family, name)], "never the tower of sounds"
        mixes, feeds = re.search(r"attn|attention|\.conv\.", name), re.search(r"\.mlp\.|\.feed_forward\.", name)
        assert (attention and mixes) or (mlp and feeds)


# covers U2
def test_placeholder_ids_of_the_published_shape(published):
    assert placeholder_ids(published.config) == published.ids
    embeddings = published.model.get_input_embeddings().weight
    assert all(0 <= i < embeddings.size(0) for i in published.ids)


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


@pytest.mark.parametrize(
    ("prefix", "encoder"),
    # Its vision blocks are called "layers", as a language model's are; its sounds' are too.
    [("Mllama", "vision"), ("Qwen2Audio", "audio")],
)
def test_unknown_multimodal_family_is_found_by_names_and_never_across_towers(prefix, encoder):
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(getattr(transformers, f"{prefix}Config")())
    family = family_of(SimpleNamespace(model_type="nobody_has_heard_of_it"))
    towers = {name: tower_of(family, name) for name, _ in model.named_parameters()}
    assert set(towers.values()) == {encoder, "projector", "language"}
    for vision in (False, True) if encoder == "vision" else (False,):
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


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.q_proj.weight", "audio"),
        ("model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.embed_tokens_extend.audio_embed.up_proj_for_speech.weight", "projector"),
        ("model.layers.0.mlp.down_proj.weight", "language"),
    ],
)
def test_a_tower_inside_the_projector_is_the_tower(name, tower):
    assert tower_of(FAMILIES["phi4_multimodal"], name) == tower


KINDS = [(family, kind) for family, kinds in tiny.KINDS.items() for kind in kinds]


# covers O1
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_kind_leaves_its_own_placeholders_and_no_other_kinds(family, kind):
    model, processor = tiny.build(family)
    ids = placeholder_ids_by_kind(model.config, processor)
    assert set(ids) == set(tiny.KINDS[family])
    row = tiny.rows(f"{kind} one", tiny.KINDS[family])[0]
    tokens = set(reference.encode(processor, row)["input_ids"][0].tolist())
    assert tokens & set(ids[kind])
    others = {token for other in ids if other != kind for token in ids[other]} - set(ids[kind])
    assert not tokens & others
    counted = {getattr(model.config, name) for name in FAMILIES[model.config.model_type].counted}
    assert bool(counted) == (family == "qwen2_5_omni_thinker")
    assert set(placeholder_ids(model.config, processor)) == {token for own in ids.values() for token in own} | counted


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_another_medium_moves_the_log_probabilities(family, kind):
    """The comparisons of batches with single rows would be empty otherwise."""
    model, processor = tiny.build(family)
    one, other = tiny.rows(f"{kind} one", tiny.KINDS[family])[:2]
    other = {**other, "prompt": one["prompt"]}
    completion = processor.tokenizer("red green blue one", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found = [reference.logps(model, reference.encode(processor, row), completion) for row in (one, other, one)]
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert torch.equal(found[0], found[2])


# covers U10
@pytest.mark.parametrize("family", tiny.KINDS)
def test_a_saved_family_is_loaded_as_itself(family, tmp_path):
    model, processor = tiny.build(family)
    again, its_processor = load_model(tiny.save(family, tmp_path / "model"), backend="hf")
    assert type(again) is type(model) and type(its_processor) is type(processor)
    rows = [tiny.rows(f"{kind} one", tiny.KINDS[family])[0] for kind in tiny.KINDS[family]]
    with torch.no_grad():
        for row in rows:
            pairs = ((model, processor), (again, its_processor))
            first, second = (reference.logps(m, reference.encode(p, row), [40, 50, 60]) for m, p in pairs)
            assert torch.equal(first, second)


def test_of_a_speaking_model_the_part_that_thinks_is_loaded(tmp_path):
    """The published Omni checkpoints hold a talker too, which has no part in a text's log-probabilities."""
    thinker, processor = tiny.build("qwen2_5_omni_thinker")
    parts = {"thinker_config": thinker.config.to_dict(), "enable_audio_output": False}  # its talker is not tiny
    transformers.Qwen2_5OmniConfig(**parts).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = {f"thinker.{name}": value.contiguous() for name, value in thinker.state_dict().items()}
    save_file(weights | {"talker.weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = load_model(tmp_path, backend="hf")
    assert type(model) is type(thinker)
    assert all(torch.equal(value, weights[f"thinker.{name}"]) for name, value in model.state_dict().items())


# ---- what cannot share a forward -------------------------------------------------------------------------------------


def _row(**media: Any) -> EncodedPrompt:
    return EncodedPrompt([1, 2, 3], {}, {name: torch.as_tensor(value) for name, value in media.items()})


def test_rows_share_a_forward_unless_the_family_says_otherwise():
    def clips(*counts_and_frames):
        return [_row(pixel_values_videos=torch.zeros(n, frames, 3, 56, 56)) for n, frames in counts_and_frames]

    llava, phi = FAMILIES["llava_onevision"], FAMILIES["phi4_multimodal"]
    assert together(llava, clips((1, 4), (1, 6), (3, 4))) == [[0, 2], [1]], "more clips, or longer ones"
    assert together(llava, [*clips((1, 4)), _row(), _row(pixel_values=[[1.0]])]) == [[0], [1, 2]]
    assert together(FAMILIES["qwen2_5_vl"], [*clips((1, 4), (1, 6)), _row()]) == [[0, 1, 2]]
    masks = [_row(audio_attention_mask=mask) for mask in ([[1, 1], [1, 1]], [[1, 1], [1, 0]], [[0, 1], [1, 1]])]
    assert together(phi, masks) == [[0], [1, 2]]
    heard = EncodedPrompt([1], {}, {}, {"use_audio_in_video": True})
    assert together(FAMILIES["qwen2_5_omni_thinker"], [_row(), heard, _row(), heard]) == [[0, 2], [1, 3]]
    assert together(llava, []) == []


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("llava_onevision", {"videos": [tiny.video(0, 4)]}, {"videos": [tiny.video(1, 6)]}),
        ("mllama", {"images": [tiny.image(0)]}, {"images": [tiny.image(1), tiny.image(2)]}),
        ("mllama", {"images": [tiny.image(0)]}, {}),
        ("gemma3n", {"audios": [tiny.audio(0, 0.52)]}, {"audios": [tiny.audio(1, 0.9)]}),
        ("phi4_multimodal", {"audios": [tiny.audio(0, 0.5)]}, {"audios": [tiny.audio(1, 0.9)]}),
        ("phi4_multimodal", {"audios": [tiny.audio(0)]}, {"audios": [tiny.audio(1), tiny.audio(2)]}),
        ("phi4_multimodal", {"audios": [tiny.audio(0)]}, {"images": [tiny.image(1)]}),
        ("phi4_multimodal", {"images": [tiny.image(0, (64, 64))]}, {"images": [tiny.image(1, (64, 50))]}),
    ],
)
def test_rows_that_are_kept_apart_would_change_each_other(family, first, second):
    """When this fails, transformers has mended the family: take the name out of its ``apart``."""
    model, processor = tiny.build(family)
    encoded = []
    for row in (first, second):
        counts = {kind: len(row.get(kind, ())) for kind in ("images", "videos", "audios")}
        encoded.append(reference.encode(processor, {"prompt": tiny.prompt("count", **counts), **row}))
    rows = [_encoded(inputs) for inputs in encoded]
    assert together(family_of(model.config), rows) == [[0], [1]]
    with torch.no_grad():
        alone = reference.logps(model, encoded[0], [40])
        try:
            batch = model(**model_inputs(rows, processor.tokenizer.pad_token_id), use_cache=False).logits[:, -1]
        except (ValueError, RuntimeError):
            return
    assert (batch[0].log_softmax(-1)[40] - alone[0]).abs() > 1e-4


def _encoded(inputs: dict[str, Any]) -> EncodedPrompt:
    ids = inputs["input_ids"][0].tolist()
    tokens = {name: inputs[name] for name in ("token_type_ids", "cross_attention_mask") if name in inputs}
    media = {name: v for name, v in inputs.items() if name not in ("input_ids", "attention_mask", *tokens)}
    return EncodedPrompt(ids, tokens, media)


# ---- sounds ----------------------------------------------------------------------------------------------------------


# covers O1
def test_qwen2_audio_counts_its_tokens_by_the_length_rule():
    """M mel frames make L = (M - 1) // 2 + 1 positions and (L - 2) // 2 + 1 tokens, for processor and model alike."""
    model, processor = tiny.build("qwen2_audio")
    for frames in range(2, 201):
        row = {"prompt": tiny.prompt("count", images=0, audios=1), "audios": [np.zeros(frames * 160, np.float32)]}
        encoded = reference.encode(processor, row)
        assert encoded["feature_attention_mask"].sum() == frames
        length = (frames - 1) // 2 + 1
        tokens = (length - 2) // 2 + 1
        assert (encoded["input_ids"] == model.config.audio_token_id).sum() == tokens, f"{frames} frames"
        lengths = model.model.audio_tower._get_feat_extract_output_lengths(torch.tensor([frames]))
        assert [int(n) for n in lengths] == [length, tokens]
        if frames % 40 == 0:
            with torch.no_grad():
                reference.logps(model, encoded, [40])  # it compares tokens with features itself
