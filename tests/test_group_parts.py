"""The parts that groups share their work by, each for itself, on numbers worked out by hand."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import recorder
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from vlm_grpo.data import to_sample
from vlm_grpo.encode import EncodedPrompt, encode
from vlm_grpo.errors import SharingError
from vlm_grpo.group import GroupSharing, SharingReport, advice, from_units, to_units, unique, unit_of, up_to_end
from vlm_grpo.group.attention import decoding, install, packed_attention, packing
from vlm_grpo.group.cache import SharedLayer, share
from vlm_grpo.group.comparing import compare, gap
from vlm_grpo.group.features import Features, joined
from vlm_grpo.group.idle import zero_gradients
from vlm_grpo.group.layout import Layout, Packed
from vlm_grpo.group.reasons import Unshareable, reason_against
from vlm_grpo.group.rollout import generate, generation_reason, positions
from vlm_grpo.group.sharing import groups_of
from vlm_grpo.models.families import family_of, placeholder_ids
from vlm_grpo.models.wrappers import is_peft_model, plain_model
from vlm_grpo.patches.transformers import answered_by
from vlm_grpo.patches.trl import LOG_PROBS, add_fused_head

# ---- units -----------------------------------------------------------------------------------------------------------


def batch() -> dict[str, Any]:
    """Eight rows; every entry tells which row it is of."""
    rows = torch.arange(8)
    return {
        "prompt_ids": rows[:, None] * 10 + torch.arange(3),
        "completion_ids": rows[:, None] + torch.zeros(1, 5, dtype=torch.long),
        "advantages": rows.float(),
        "tools_of_tomorrow": [f"row {i}" for i in range(8)],
        "pairs": tuple((i, i) for i in range(8)),
        "of_many_dimensions": rows.view(8, 1, 1, 1).float(),
        "num_items_in_batch": torch.tensor(40),
        "nothing": None,
    }


def test_units_stay_together_through_trls_shuffle_and_split():
    # covers U10
    torch.manual_seed(1)
    parts = split_tensor_dict(shuffle_sequence_dict(to_units(batch(), 2)), 2)
    seen = []
    for part in parts:
        out = from_units(part)
        assert out.keys() == batch().keys()
        rows = out["advantages"].int().tolist()
        assert len(rows) == 4 and all(a % 2 == 0 and b == a + 1 for a, b in zip(rows[::2], rows[1::2], strict=True))
        assert out["prompt_ids"].tolist() == [[10 * i, 10 * i + 1, 10 * i + 2] for i in rows]
        assert out["completion_ids"].tolist() == [[i] * 5 for i in rows]
        assert out["tools_of_tomorrow"] == [f"row {i}" for i in rows]
        assert out["pairs"] == [(i, i) for i in rows]
        assert out["of_many_dimensions"].flatten().tolist() == rows
        assert out["num_items_in_batch"] == 40 and out["nothing"] is None
        seen += rows
    assert sorted(seen) == list(range(8)) and seen != list(range(8))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_units_and_back(size):
    out = from_units(to_units(batch(), size))
    for name, value in batch().items():
        same = torch.equal(out[name], value) if isinstance(value, Tensor) else out[name] == value
        assert same or out[name] == list(value), name


@pytest.mark.parametrize(
    ("size", "generations", "unit"), [(4, 4, 4), (8, 4, 4), (2, 4, 2), (6, 4, 2), (3, 4, 1), (12, 8, 4), (1, 4, 1)]
)
def test_the_unit_is_what_fits_into_both(size, generations, unit):
    assert unit_of(size, generations) == unit


@pytest.mark.parametrize(("size", "generations"), [(4, 4), (8, 4), (12, 4), (2, 4), (1, 4), (3, 6), (1, 1), (5, 1)])
def test_whole_groups_and_equal_parts_need_no_advice(size, generations):
    assert advice(size, generations) is None


@pytest.mark.parametrize(
    ("size", "generations", "parts", "times", "nearest"),
    [(6, 4, 2, 2, 8), (3, 4, 1, 4, 4), (5, 4, 1, 4, 4), (12, 8, 4, 2, 16), (10, 8, 2, 4, 8), (7, 4, 1, 4, 8)],
)
def test_other_sizes_say_what_is_lost(size, generations, parts, times, nearest):
    assert advice(size, generations) == (
        f"per_device_train_batch_size={size} holds groups of num_generations={generations} only in parts of {parts}: "
        f"each prompt is processed {times} times instead of once. The nearest size without that loss is {nearest}."
    )


# ---- the packed row --------------------------------------------------------------------------------------------------


def test_packed_rows_by_hand():
    """Prompt a b c, completions 1 2 3 and 4 5 6: ab | c12 | c45. A shorter prompt is padded in front."""
    layout = Layout(prefix=2, suffixes=2, width=3)
    assert layout.length == 8 and layout.logical == 5
    prompts = torch.tensor([[10, 11, 12], [0, 20, 21]])
    rows = layout.pack(prompts, torch.tensor([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [6, 5, 4]]]))
    assert rows.tolist() == [[10, 11, 12, 1, 2, 12, 4, 5], [0, 20, 21, 7, 8, 21, 6, 5]]
    assert layout.unpack(rows).tolist() == [[[12, 1, 2], [12, 4, 5]], [[21, 7, 8], [21, 6, 5]]]
    assert layout.repeat(torch.arange(5)[None]).tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    axes = torch.arange(15).view(3, 1, 5)  # places on three axes
    assert layout.repeat(axes, -1)[1].tolist() == [[5, 6, 7, 8, 9, 7, 8, 9]]


def test_a_prompt_of_one_token_has_no_prefix():
    layout = Layout(0, 2, 2)
    assert layout.pack(torch.tensor([[7]]), torch.tensor([[[1, 2], [3, 4]]])).tolist() == [[7, 1, 7, 3]]


def test_a_mask_is_cut_from_the_models_own():
    layout = Layout(3, 2, 2)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., 0, 1] = True  # an image of two tokens in the prompt
    packed = Packed.of(layout, lambda n: mask[..., :n, :n])
    assert packed.prompt is not None and torch.equal(packed.prompt, mask[..., :3, :3])
    assert packed.suffix is not None and torch.equal(packed.suffix, mask[..., 3:, :])
    causal = Packed.of(layout, lambda n: None)
    assert causal.prompt is None and causal.suffix is None
    mask[..., 2, 3] = True
    with pytest.raises(Unshareable, match="attend to what follows them, as in a prefix language model"):
        Packed.of(layout, lambda n: mask)


def window(n: int) -> Tensor:
    places = torch.arange(n)
    return ((places[:, None] >= places) & (places[:, None] - places < 3))[None, None]


def both_ways(n: int) -> Tensor:
    """The first four tokens see each other."""
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[:4, :4] = True
    return mask[None, None]


def padded(n: int) -> Tensor:
    """Two rows; the second has two tokens of padding in front, which see themselves only."""
    mask = torch.ones(2, 1, n, n, dtype=torch.bool).tril()
    mask[1, :, :, :2] = torch.eye(n, 2, dtype=torch.bool)
    return mask


@pytest.mark.parametrize("kv", [1, 2, 4], ids=["one key head", "grouped", "all"])
@pytest.mark.parametrize(
    ("mask", "prefix"), [(None, 0), (None, 5), (window, 0), (window, 5), (both_ways, 5), (padded, 5)]
)
def test_packed_attention_is_that_of_rows_alone(mask, prefix, kv):
    """Outputs and gradients, in float64, against plain products."""
    layout, heads, size = Layout(prefix, 3, 4), 4, 8
    torch.manual_seed(0)
    shapes = [(2, n, layout.length, size) for n in (heads, kv, kv)]
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    packed = Packed.of(layout, mask or (lambda n: None))
    out = packed_attention(query, key, value, packed, scaling=0.3)
    expected = torch.zeros_like(out)
    own = torch.ones(layout.logical, layout.logical, dtype=torch.bool).tril() if mask is None else mask(layout.logical)
    for number in range(3):
        start = prefix + 4 * number
        places = torch.cat([torch.arange(prefix), torch.arange(start, start + 4)])
        q, k, v = query[:, :, places], key[:, :, places], value[:, :, places]
        k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~own, float("-inf"))
        expected = expected.index_copy(2, places, scores.softmax(-1) @ v)
    assert torch.allclose(out, expected, atol=1e-12)
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum(), (query, key, value), retain_graph=True)
    truth = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, truth, strict=True))


def test_attention_that_the_packed_row_does_not_know_is_refused():
    model, _ = tiny.build("qwen2_5_vl")
    text = model.config.get_text_config()
    install(model)
    twin = text._attn_implementation
    install(model)
    assert text._attn_implementation == twin == "shared_sdpa", "once is enough"
    assert model.config.vision_config._attn_implementation == "sdpa", "towers keep theirs"
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    packed, states = Packed(Layout(2, 2, 2)), torch.randn(1, 4, 6, 8)
    with pytest.raises(Unshareable, match="its attention takes softcap"):
        ALL_ATTENTION_FUNCTIONS[twin](model, states, states, states, packed, softcap=30.0)
    other, _ = tiny.build("qwen2_5_vl")
    other.config.get_text_config()._attn_implementation_internal = "of_its_own"
    with pytest.raises(Unshareable, match=r"its attention \(of_its_own\) is not one of transformers' own"):
        install(other)


def test_installed_attention_outside_of_a_packed_row_is_the_original():
    model, processor = tiny.build("qwen2_5_vl")
    ids = torch.arange(30, 42)[None]
    before = model(input_ids=ids).logits
    install(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    with packing(Layout(20, 2, 3)):
        assert torch.equal(model(input_ids=ids).logits, before), "a row of another length is no packed row"


# ---- the cache -------------------------------------------------------------------------------------------------------


def filled(rows: int, heads: int, length: int, size: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.randn(rows, heads, length, size), torch.randn(rows, heads, length, size), 0)
    return cache


@pytest.mark.parametrize("padded", [False, True])
def test_a_shared_layer_is_a_repeated_one(padded):
    torch.manual_seed(0)
    prompts, generations, kv, heads, size = 2, 3, 2, 4, 8
    layer = filled(prompts, kv, 5, size).layers[0]
    keys, values = layer.keys.repeat_interleave(3, 0), layer.values.repeat_interleave(3, 0)
    padding = torch.ones(prompts, 5, dtype=torch.bool)
    padding[1, :2] = not padded
    shared = SharedLayer(layer, generations, 4, padding if padded else None)
    for step in range(1, 4):
        new = [torch.randn(6, kv, 1, size) for _ in range(2)]
        own = shared.update(*new)
        assert own[0].shape == (6, kv, step, size) and shared.get_seq_length() == 5 + step
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        assert all(torch.equal(a, b) for a, b in zip(shared.expanded(), (keys, values), strict=True))
        query = torch.randn(6, heads, 1, size)
        seen = torch.cat([padding.repeat_interleave(3, 0), torch.ones(6, step, dtype=torch.bool)], 1)[:, None, None]
        k, v = (x.repeat_interleave(2, 1) for x in (keys, values))
        expected = nn.functional.scaled_dot_product_attention(query, k, v, seen, scale=0.4)
        assert torch.allclose(shared.attend(query, 0.4), expected.transpose(1, 2), atol=1e-6)
    shared.update(*new)
    with pytest.raises(Unshareable, match="more than the 4 tokens it has room for were generated"):
        shared.update(*new)


def test_only_whole_groups_of_plain_layers_are_shared():
    padding, index = torch.ones(2, 5, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    cache = share(filled(2, 1, 5, 4), index, 2, 3, padding, ())
    assert isinstance(cache.layers[0], SharedLayer) and cache.layers[0].padding is None
    for generations, whole, rows in ((None, (), [1, 0, 0]), (2, (0,), [0, 0, 1, 1])):
        cache = filled(2, 1, 5, 4)
        keys = cache.layers[0].keys
        out = share(cache, torch.tensor(rows), generations, 3, padding, whole).layers[0]
        assert not isinstance(out, SharedLayer) and torch.equal(out.keys, keys[rows])


# ---- rollout ---------------------------------------------------------------------------------------------------------


def words(*ids: int) -> EncodedPrompt:
    return EncodedPrompt(list(ids), {"token_type_ids": torch.tensor([ids]) % 2}, {})


def test_unique_prompts_are_those_of_one_object_and_the_same_tokens():
    """A turn behind a tool's answer is another prompt of the same encoding."""
    one, two = words(5, 6), words(5, 6)
    prompts, index = unique([[5, 6], [5, 6], [5, 6, 7], [5, 6]], [one, one, one, two])
    assert prompts.ids == [[5, 6], [5, 6, 7], [5, 6]] and prompts.encodings == [one, one, two]
    assert index == [0, 0, 1, 2]
    inputs = prompts.inputs(1, "cpu")
    assert inputs["input_ids"].tolist() == [[1, 5, 6], [5, 6, 7], [1, 5, 6]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert prompts.inputs(1, "cpu", [2])["input_ids"].tolist() == [[5, 6]] and prompts.tokens == ("token_type_ids",)


def test_completions_go_up_to_their_end():
    rows = torch.tensor([[4, 3, 9, 9], [4, 5, 6, 7], [8, 4, 3, 3], [3, 3, 3, 3]])
    assert up_to_end(rows, [3, 8]) == [[4, 3], [4, 5, 6, 7], [8], [3]]
    assert up_to_end(rows, []) == rows.tolist()


def test_ways_of_generating_that_need_their_own_cache():
    assert generation_reason(GenerationConfig(do_sample=True, top_k=5)) is None
    for options, reason in [
        ({"cache_implementation": "static"}, "cache_implementation='static' asks for"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size splits"),
        ({"num_beams": 3}, "num_beams=3 moves"),
    ]:
        assert (generation_reason(GenerationConfig(**options)) or "").startswith(reason)


def prompts_of(processor: Any, case: str = "image sizes") -> list[EncodedPrompt]:
    return [encode(processor, to_sample(row)) for row in tiny.rows(case, ("image",))]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "mllama"])
@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1, 1], [1, 0, 1, 1]], ids=["groups", "any order"])
def test_generate_is_the_models_own(family, order, monkeypatch):
    """Sampled from the same random numbers, with an end that rows reach at different steps."""
    model, processor = tiny.build(family)
    encodings = prompts_of(processor, "image one" if family == "mllama" else "image sizes")[:2]
    install(model)
    prompts, _ = unique([e.input_ids for e in encodings], encodings)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=12, eos_token_id=[tiny.EOS, *range(20, 60)], pad_token_id=tiny.PAD, top_k=50
    )
    inputs, index = prompts.inputs(tiny.PAD, "cpu"), torch.tensor(order)
    features = Features(model, family_of(model.config), nullcontext)
    calls: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    attended = SharedLayer.attend
    decoded: list[int] = []

    def counted(self: Any, *args: Any) -> Tensor:
        decoded.append(1)
        return attended(self, *args)

    monkeypatch.setattr(SharedLayer, "attend", counted)
    torch.manual_seed(0)
    with torch.no_grad(), features.of([]):
        out = generate(model, features, inputs, prompts.tokens, index, config)
    torch.manual_seed(0)
    expected = model.generate(**prompts.inputs(tiny.PAD, "cpu", order), generation_config=config)
    assert torch.equal(out, expected)
    steps = out.shape[1] - inputs["input_ids"].shape[1]
    assert len(calls) == steps + 1 + steps, "one pass more, over the prompts without their last tokens"
    layers = {"qwen2_5_vl": 2, "gemma3": 1, "mllama": 2}[family]
    assert len(decoded) == (steps * layers if order[0] == 0 else 0)


def test_places_are_the_models_own():
    model, processor = tiny.build("qwen2_5_vl")
    encoded = prompts_of(processor)[0]
    prompts, _ = unique([encoded.input_ids], [encoded])
    inputs = prompts.inputs(tiny.PAD, "cpu")
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    places = positions(model, ids, mask, inputs)
    assert places is not None and places.shape[1:] == ids.shape
    with torch.no_grad():
        placed = model(input_ids=ids, attention_mask=mask, position_ids=places, **inputs).logits
        assert torch.allclose(placed, model(input_ids=ids, attention_mask=mask, **inputs).logits, atol=1e-6)
    assert positions(nn.Linear(1, 1), ids, mask, {}) is None, "a model that takes no places"


# ---- features --------------------------------------------------------------------------------------------------------


def test_outputs_of_an_encoder_are_joined():
    a, b = torch.ones(2, 3), torch.full((1, 2), 2.0)
    assert joined([a, b]).tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 0]]
    assert [len(x) for x in joined([[a, b], [a]])] == [2, 1, 2] and isinstance(joined([(a,), (b,)]), tuple)
    outputs = []
    for rows in (1, 2):
        output = BaseModelOutputWithPooling(pooler_output=[torch.full((rows, 4), float(rows))])
        output["deepstack_features"] = [torch.full((rows, 4), float(rows)), torch.full((rows, 4), 10.0 * rows)]
        outputs.append(output)
    out = joined(outputs)
    assert [x.shape[0] for x in out.pooler_output] == [1, 2] and out.last_hidden_state is None
    assert [x[:, 0].tolist() for x in out.deepstack_features] == [[1, 2, 2], [10, 20, 20]]
    with pytest.raises(TypeError, match="an encoder returned a dict"):
        joined([{}])


def features_of(model: Any) -> Features:
    return Features(plain_model(model), family_of(model.config), nullcontext)


def forward(model: Any, features: Features, encodings: list[EncodedPrompt]) -> Tensor:
    prompts, _ = unique([e.input_ids for e in encodings], encodings)
    with torch.no_grad(), features.of(encodings):
        return model(**prompts.inputs(tiny.PAD, "cpu")).logits


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "llava_next"])
def test_a_frozen_tower_encodes_a_prompt_once(family):
    model, processor = tiny.build(family)
    encodings = prompts_of(processor, "image sizes in a row")
    prompts, _ = unique([e.input_ids for e in encodings], encodings)
    with torch.no_grad():
        expected = model(**prompts.inputs(tiny.PAD, "cpu")).logits
    model.requires_grad_(False)
    features, runs = features_of(model), []
    tower = next(m for n, m in model.named_modules() if n.endswith(family_of(model.config).vision))
    tower.register_forward_hook(lambda *_: runs.append(1))
    features.encode(encodings, lambda row: prompts.inputs(tiny.PAD, "cpu", [row]))
    assert features.encodes == len(encodings) and len(features.known) == len(encodings)
    before = len(runs)
    for _ in range(2):  # the model may write on what it gets
        found = forward(model, features, encodings)
        real = prompts.inputs(tiny.PAD, "cpu")["attention_mask"].bool()
        assert torch.allclose(found[real], expected[real], atol=1e-5)
    turned = forward(model, features, encodings[::-1])[-1, -len(encodings[0].input_ids) :]
    assert torch.allclose(turned, expected[0, -len(encodings[0].input_ids) :], atol=1e-5)
    features.encode(encodings, lambda row: pytest.fail("known already"))
    assert len(runs) == before and features.encodes == len(encodings)
    assert not any(name.startswith("get_") for name in vars(model.base_model)), "the methods are the model's own again"


def test_features_are_kept_as_long_as_their_prompt():
    model, processor = tiny.build("qwen2_5_vl")
    model.requires_grad_(False)
    features, encodings = features_of(model), prompts_of(processor)
    for encoded in encodings:
        forward(model, features, [encoded])
    assert len(features.known) == len(encodings)
    del encoded, encodings[1:]
    gc.collect()
    assert len(features.known) == 1


def test_a_trained_tower_answers_for_itself():
    model, processor = tiny.build("qwen2_5_vl")
    features, encoded = features_of(model), prompts_of(processor)[0]
    assert features.frozen() == ()
    before = forward(model, features, [encoded])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visual" in name:
                parameter.mul_(1.1)
    assert (forward(model, features, [encoded]) - before).abs().max() > 1e-3
    assert features.encodes == 0 and not features.known


@pytest.mark.parametrize("trained", ["visual.blocks.0", "visual.merger", "language_model.layers", "lm_head"])
def test_towers_are_frozen_by_their_parameters(trained):
    model, _ = tiny.build("qwen2_5_vl")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    expected = () if "visual" in trained else ("get_image_features", "get_video_features")
    assert features_of(model).frozen() == expected, "it has no tower that hears"


def test_adapters_in_a_tower_are_no_frozen_tower():
    """Switched off, as for the reference, they would give other features."""
    for target, frozen in ((r".*visual.*attn\.qkv", False), (r".*language_model.*q_proj", True)):
        model, _ = tiny.build("qwen2_5_vl")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target)).requires_grad_(False)
        assert bool(features_of(adapted).frozen()) == frozen


def test_one_tower_may_be_trained_beside_a_frozen_one():
    model, _ = tiny.build("qwen2_5_omni_thinker")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("audio_tower.layers" in name)
    assert set(features_of(model).frozen()) == {"get_image_features", "get_video_features"}


def test_an_error_leaves_the_encoders_as_they_were():
    model, processor = tiny.build("qwen2_5_vl")
    model.requires_grad_(False)
    own = model.base_model.get_image_features
    with pytest.raises(ZeroDivisionError), features_of(model).of(prompts_of(processor)):
        assert model.base_model.get_image_features != own
        raise ZeroDivisionError
    assert model.base_model.get_image_features == own
    with pytest.raises(AttributeError, match="get_smells"), answered_by(model, "get_smells", print):
        pass


# ---- reasons ---------------------------------------------------------------------------------------------------------


def test_reasons_against_sharing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    assert reason_against(model, aux_loss=False) is None
    assert "auxiliary loss" in (reason_against(model, aux_loss=True) or "")
    model[1].p = 0.25
    assert reason_against(model, False) == "1 has dropout 0.25, drawn anew for every completion (set disable_dropout)"
    model[1].p = 0.0
    model[0].attention_dropout = 0.5
    assert (reason_against(model, False) or "").startswith("0 has dropout 0.5")
    model[0].attention_dropout = 0.0
    model[0].layerdrop = 0.1
    assert reason_against(model, False) == "0 drops layers with a chance of 0.1, drawn anew for every completion"


# ---- sharing ---------------------------------------------------------------------------------------------------------


def sharing_of(model: Any, mode: Any = True, **options: Any) -> GroupSharing:
    return GroupSharing(family_of(model.config), mode, placeholder_ids(model.config), nullcontext, **options)


def headed(family: str = "qwen2_5_vl") -> tuple[Any, Any]:
    model, processor = tiny.build(family)
    LOG_PROBS.ensure()
    add_fused_head(model, 1.0, outputs=("log_probs", "entropy"))
    return model, processor


COMPLETIONS = torch.arange(40, 52).view(4, 3)


def shared_logps(sharing: GroupSharing, model: Any, rows: list[EncodedPrompt], plain: Any, idle: Any = None) -> Any:
    assert sharing.on(model, rows)
    mask = torch.ones_like(COMPLETIONS)
    return sharing.logps(model, COMPLETIONS, mask, rows, idle or [False] * 4, plain, 4)


def off_by(gap: float):
    """A plain path that differs from the shared one by so much in one figure."""
    model, _ = headed()
    rows = [EncodedPrompt([5, 6, 7], {}, {})] * 4
    truth = shared_logps(unchecked(model), model, rows, zeros)[0].detach()

    def plain(own: Any, few: list[int]) -> Tensor:
        out = truth[few].clone()
        out[-1, 1] += gap
        return out

    return model, rows, plain


@pytest.mark.parametrize(("gap_of_one", "passes"), [(0.0, True), (9e-5, True), (2e-4, False), (float("nan"), False)])
def test_what_rounding_may_explain(gap_of_one, passes):
    model, rows, plain = off_by(gap_of_one)
    sharing = sharing_of(model)
    if passes:
        assert shared_logps(sharing, model, rows, plain) is not None
        return
    with pytest.raises(SharingError, match=r"^group_sharing=True: .* because the log-probabilities of the first group"):
        shared_logps(sharing, model, rows, plain)
    careful = sharing_of(model, "auto")
    assert shared_logps(careful, model, rows, plain) is None and careful.off and not careful.on(model, rows)
    assert careful.saved == {"prompt_tokens": 0, "encodes": 0}


def test_16_bit_may_differ_by_more():
    for apart, passes in ((2e-2, True), (5e-1, False)):
        model, rows, plain = off_by(apart)
        sharing = sharing_of(model, "auto")
        sharing._is_16_bit = lambda model: True
        assert (shared_logps(sharing, model, rows, plain) is not None) == passes


def test_a_fallback_says_its_reason_once(caplog):
    model, _ = tiny.build("qwen2_5_vl")
    sharing = sharing_of(model, "auto")
    for _ in range(2):
        sharing.refuse("it is Monday", forever=False)
        sharing.refuse("it rains", generation=True)
    assert [r.getMessage() for r in caplog.records] == [
        "Prompts are processed once per completion, because it is Monday.",
        "Prompts are prefilled once per completion, because it rains.",
    ]
    assert not sharing.off and sharing.off_in_generation
    sharing.refuse("it snows")
    assert sharing.off
    with pytest.raises(
        SharingError,
        match="^group_sharing=True: the work of a prompt cannot be shared by its completions, because it is Monday. "
        'Set group_sharing to "auto" or false.$',
    ):
        sharing_of(model).refuse("it is Monday")


def test_a_prompt_that_ends_in_a_medium_has_no_place_to_split_at(caplog):
    model, _ = tiny.build("qwen2_5_vl")
    encoded = EncodedPrompt([5, placeholder_ids(model.config)[0]], {}, {})
    with pytest.raises(SharingError, match="because a prompt ends in a medium"):
        sharing_of(model).on(model, [encoded] * 2)
    sharing = sharing_of(model, "auto")
    assert not sharing.on(model, [encoded] * 2) and "a prompt ends in a medium" in caplog.text
    assert sharing.on(model, [EncodedPrompt([5, 6], {}, {})] * 2), "other batches share"


def test_a_prompt_of_one_token_is_scored_beside_longer_ones(tmp_path):
    """It has nothing to share, and the others share theirs."""
    model, processor = tiny.build("qwen2_5_vl")
    first, *others = tiny.WORDS[:4]
    data = Dataset.from_list([{"prompt": text} for text in (first, *(f"count {word} and {first}" for word in others))])
    trainer = recorder.Recorder(model, recorder.reward, recorder.config(tmp_path), data, None, processor)
    trainer.train()
    rows = [row for batch in trainer.rows for row in batch]
    assert len(rows) == 8 and trainer.sharing.saved["prompt_tokens"] > 0
    shortest = min(len(row.prompt) for row in rows)
    assert shortest == 1 < max(len(row.prompt) for row in rows)
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(row.prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(row.completion)[:, None])[:, 0]
        assert torch.allclose(row.logps, expected.detach(), atol=1e-5)


def test_false_shares_nothing_and_changes_nothing():
    model, _ = tiny.build("qwen2_5_vl")
    assert not sharing_of(model, False).on(model, [EncodedPrompt([5, 6], {}, {})])
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_groups_are_told_by_their_object():
    one, two = words(5, 6), words(5, 6)
    assert groups_of([one, one, two, one]) == [[0, 1, 3], [2]]


def test_the_plain_model_is_below_all_wrappers():
    model, _ = tiny.build("qwen2_5_vl")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert plain_model(nn.DataParallel(adapted)) is model and plain_model(model) is model
    assert is_peft_model(torch.compile(adapted)) and not is_peft_model(torch.compile(model))
    compiled: Any = torch.compile(tiny.build("qwen2_5_vl")[0])
    assert is_peft_model(get_peft_model(compiled, LoraConfig(target_modules=["q_proj"]))), "an attribute is handed on"


@pytest.mark.parametrize("low", [False, True], ids=["32 bits", "16 bits"])
def test_what_does_not_count_and_equal_infinities_are_no_difference(low):
    """Behind the first token in which two rows differ stands anything, and a model may forbid tokens by itself."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(2, 5, generator=generator).index_fill(1, torch.tensor([0]), -torch.inf) for _ in range(3)]
    shared = [logits.clone() for logits in plain]
    shared[2][1] = torch.nan
    one, other = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[1, 2, 3], [1, 4, 3]])

    def compared(sequences: Tensor) -> None:
        outputs = [SimpleNamespace(logits=x, sequences=y) for x, y in ((shared, sequences), (plain, one))]
        compare("logits", *gap(*outputs, low), low, torch.stack(plain))

    compared(other)
    with pytest.raises(Unshareable, match="differ by nan"):
        compared(one)


def zeros(own: Any, few: list[int]) -> Tensor:
    return torch.zeros(len(few), 3)


def unchecked(model: Any) -> GroupSharing:
    sharing = sharing_of(model)
    sharing._check = lambda *_: None
    return sharing


@pytest.mark.parametrize("most", [1, 4], ids=["one by one", "together"])
def test_completions_of_different_length_and_none_at_all(most):
    """Prompts of different length; a group without a real token is zeros."""
    model, _ = headed()
    sharing = unchecked(model)
    rows = [EncodedPrompt([5, 6, 7], {}, {})] * 2 + [EncodedPrompt([8, 9], {}, {})] * 2
    for mask in ([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]], [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]):
        real = torch.tensor(mask)
        assert sharing.on(model, rows)
        logps, entropies = sharing.logps(model, COMPLETIONS, real, rows, [False] * 4, zeros, most)
        assert torch.equal(logps != 0, real.bool()) and entropies.shape == (4, 3)
        for encoded, completion, own, found in zip(rows, COMPLETIONS.tolist(), mask, logps, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([encoded.input_ids + completion])).logits[0, -4:-1]
            expected = logits.log_softmax(-1)[torch.arange(3), completion] * torch.tensor(own)
            assert torch.allclose(found, expected, atol=1e-5)
    assert sharing.saved["prompt_tokens"] == 2 * (2 + 1)


# ---- groups without a gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("senses", "towers"),
    [((), {"language"}), (("vision",), {"language", "vision", "projector"})]
    + [(("audio",), {"language", "audio", "projector"})],
)
def test_zero_gradients_reach_what_a_forward_would_have_used(senses, towers):
    from vlm_grpo.models.families import tower_of

    model, _ = tiny.build("qwen2_5_omni_thinker")
    family = family_of(model.config)
    zero = zero_gradients(model, family, [EncodedPrompt([5], {}, {}, senses=senses)])
    zero.backward()
    reached = {tower_of(family, name) for name, p in model.named_parameters() if p.grad is not None}
    assert zero == 0 and reached - {"other"} == towers
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_zero_gradients_of_a_frozen_model():
    model, _ = tiny.build("qwen2_5_vl")
    zero = zero_gradients(model.requires_grad_(False), family_of(model.config), [EncodedPrompt([5], {}, {})])
    assert zero == 0 and not zero.requires_grad


def test_idle_groups_are_scored_without_a_graph():
    model, _ = headed()
    rows = [EncodedPrompt([5, 6, 7], {}, {})] * 2 + [EncodedPrompt([8, 9], {}, {})] * 2
    figures, built = [], []
    layer = model.get_decoder().layers[0]
    layer.register_forward_hook(lambda module, args, out: built.extend([out.requires_grad] * len(out)))
    for idle in ([False] * 4, [True, True, False, False], [True, False, False, False], [True] * 4):
        built.clear()
        logps = shared_logps(unchecked(model), model, rows, zeros, idle)[0]
        assert sorted(built) == sorted([not all(idle[:2]), not all(idle[2:])]) and logps.requires_grad
        figures.append(logps.detach())
    assert all(torch.allclose(figures[0], other, atol=1e-6) for other in figures[1:])


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_each_step_for_itself():
    sharing: Any = SimpleNamespace(saved={"prompt_tokens": 99, "encodes": 9})
    watch: Any = SimpleNamespace(start=lambda: None, stop=lambda: {"generate": 2.0, "update": 1.0})
    logged: list[tuple[str, float]] = []
    report = SharingReport(sharing, watch, lambda name, value: logged.append((name, value)))
    report.on_step_begin(None, None, None)
    sharing.saved["prompt_tokens"] += 7
    report.on_step_end(None, None, None)
    assert dict(logged) == {
        "group/prompt_tokens_saved": 7.0,
        "group/encodes_saved": 0.0,
        "seconds/process": 0.0,
        "seconds/generate": 2.0,
        "seconds/logps": 0.0,
        "seconds/update": 1.0,
    }
    report.on_step_begin(None, None, None)
    assert sharing.saved == {"prompt_tokens": 0, "encodes": 0}


def test_a_cache_is_attended_to_only_while_decoding():
    with decoding(None):
        model, _ = tiny.build("qwen2_5_vl")
        install(model)
        assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


# ---- models and settings that are not as expected -------------------------------------------------------------------


def test_a_decoder_that_keeps_its_layers_elsewhere_falls_back(caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    sharing = GroupSharing(family_of(model.config), "auto", (), nullcontext)
    rows = [EncodedPrompt([5, 6], {}, {})] * 2
    model.config._attn_implementation = "sdpa"
    for module in model.modules():
        for dropout in [m for m in module.children() if isinstance(m, nn.Dropout)]:
            dropout.p = 0.0
    assert not sharing.on(model, rows) and "keeps its layers under a name" in caplog.text


def test_another_attention_set_in_between_is_seen():
    model, _ = headed()
    sharing = sharing_of(model)
    rows = [EncodedPrompt([5, 6, 7], {}, {})] * 2
    assert sharing.on(model, rows)
    sharing._checked["kind"] = [1, 2]
    model.set_attn_implementation("eager")
    assert sharing.on(model, rows) and not sharing._checked
    assert model.config.get_text_config()._attn_implementation == "shared_eager"
    sharing.release()
    assert model.config.get_text_config()._attn_implementation == "eager"


def test_what_the_models_own_generation_config_says_counts(tmp_path, caplog):
    model, processor = tiny.build("qwen2_5_vl")
    model.generation_config.cache_implementation = "static"
    data = Dataset.from_list([{"prompt": f"count {word}"} for word in tiny.WORDS[:4]])
    options = recorder.config(tmp_path, group_sharing="auto")
    trainer = recorder.Recorder(model, recorder.reward, options, data, None, processor)
    trainer.train()
    assert trainer.state.global_step == 1 and "cache_implementation='static'" in caplog.text


def test_a_trained_module_of_an_unknown_name_is_not_taken_for_frozen():
    model, _ = tiny.build("llava")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("image_resampler" in name)
    family = family_of(model.config)
    assert Features(model, family, nullcontext).frozen()
    model.model.image_resampler = nn.Linear(2, 2)
    assert not Features(model, family, nullcontext).frozen()
