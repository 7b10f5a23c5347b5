"""FlexAttention over a packed row is the reference's attention: outputs, gradients, and a whole training run."""

import logging
from types import SimpleNamespace

import pytest
import recorder
import tiny
import torch
from test_exact import rows, table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vlm_grpo import VLMGRPOConfig
from vlm_grpo.errors import ConfigError
from vlm_grpo.group import attention, flex
from vlm_grpo.group.attention import packed_attention
from vlm_grpo.group.flex import flex_packed_attention, fuses
from vlm_grpo.group.layout import Layout, Packed

LAYOUTS = [Layout(37, 3, 11), Layout(300, 4, 33), Layout(256, 2, 64), Layout(0, 3, 50), Layout(129, 1, 1)]


def causal(n: int) -> None:
    return None


def sliding(n: int) -> Tensor:
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril().triu(-9)


def image_block(n: int) -> Tensor:
    """Causal, but for the tokens of a picture, which see each other."""
    picture = (torch.arange(n) >= 4) & (torch.arange(n) < 30)
    return (torch.ones(n, n, dtype=torch.bool).tril() | (picture[:, None] & picture))[None, None]


def inputs(layout: Layout, heads: int = 6, shared: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, count, layout.length, 16, generator=generator) for count in (heads, shared, shared)]


MASKS = {"causal": causal, "sliding": sliding, "image block": image_block}
CASES = [(layout, mask, 2) for layout in LAYOUTS for mask in MASKS if layout.prefix >= 30 or mask != "image block"]
CASES += [(LAYOUTS[1], mask, shared) for mask in MASKS for shared in (6, 1)]  # no grouping, one key head for all


@pytest.mark.parametrize(("layout", "mask", "shared"), CASES)
def test_outputs_and_gradients_are_the_references(layout, mask, shared):
    packed, values = Packed.of(layout, MASKS[mask]), inputs(layout, shared=shared)
    with torch.no_grad():
        fused = flex_packed_attention(*values, packed, 0.3)  # FlexAttention itself
    own, expected = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    out, true = flex_packed_attention(*own, packed, 0.3), packed_attention(*expected, packed, 0.3)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (true * weights).sum().backward()
    for found in (fused, out):
        assert found.shape == values[0].shape and float((found - true).detach().abs().max()) <= 1e-5
    for a, b in zip(own, expected, strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5


@pytest.mark.parametrize("mask", [causal, sliding, image_block])
def test_each_completion_has_the_attention_of_a_row_of_its_own(mask):
    layout = LAYOUTS[0]
    (query, key, value), prefix = inputs(layout), layout.prefix
    with torch.no_grad():
        out = flex_packed_attention(query, key, value, Packed.of(layout, mask))
    own = mask(layout.logical)
    own = torch.ones(layout.logical, layout.logical, dtype=torch.bool).tril() if own is None else own
    for g in range(layout.suffixes):
        start = prefix + g * layout.width
        index = [*range(prefix), *range(start, start + layout.width)]
        alone = scaled_dot_product_attention(*(x[:, :, index] for x in (query, key, value)), own, enable_gqa=True)
        assert float((out[:, :, index] - alone).abs().max()) <= 1e-5


@pytest.mark.parametrize("mask", [causal, sliding, image_block])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_the_blocks_are_those_that_torch_finds(layout, mask):
    length = layout.length
    rule = flex.mask_mod(Packed.of(layout, mask), "cpu")
    found, expected = flex.block_mask(rule, length, "cpu"), create_block_mask(rule, 1, 1, length, length, "cpu")
    assert found.shape == expected.shape
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.sparsity() == expected.sparsity() and (length < 300 or found.sparsity() > 0)


def test_queries_of_32_bits_beside_values_of_16():
    layout = LAYOUTS[0]
    query, key, value = inputs(layout)
    with torch.no_grad():
        exact = packed_attention(query, key, value, Packed(layout))
        out = flex_packed_attention(query, key, value.bfloat16(), Packed(layout))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = flex_packed_attention(query, key, value, Packed(layout))
    for found in (out, mixed):
        assert found.dtype == torch.bfloat16 and float((found - exact).abs().max()) < 5e-2


def test_another_layout_is_not_compiled_anew():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    attend = torch.compile(flex_attention, dynamic=True, backend=count)
    for number in range(12):  # more than torch compiles before it gives up
        for mask in (causal, sliding):
            layout = Layout(120 + 37 * number, 2 + number % 4, 20 + 3 * number)
            packed, values = Packed.of(layout, mask), inputs(layout)
            with torch.no_grad():
                blocks = flex._seen(packed, values[0].device).blocks
                out = attend(*values, block_mask=blocks, enable_gqa=True)
            assert float((out - packed_attention(*values, packed)).abs().max()) <= 1e-5
    assert len(graphs) == 2, "one for each kind of mask"


def test_what_it_cannot_compute_is_left_to_the_reference(monkeypatch, caplog):
    query, _, value = inputs(LAYOUTS[1])
    per_head = Packed.of(LAYOUTS[1], lambda n: sliding(n).expand(1, 6, n, n))
    assert fuses(query, value, Packed(LAYOUTS[1])) and fuses(query, value, Packed.of(LAYOUTS[1], sliding))
    assert not fuses(query, value, Packed(LAYOUTS[1]), dropout=0.1)
    assert not fuses(query, value, per_head)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=query.shape)  # what is decided from
    narrow = SimpleNamespace(device=torch.device("cuda"), shape=(1, 6, LAYOUTS[1].length, 8))
    try:
        for present in (True, False):
            monkeypatch.setattr(flex, "has_triton", lambda present=present: present)
            flex._compiles.cache_clear()
            with caplog.at_level(logging.WARNING, "vlm_grpo"):
                assert [fuses(on_gpu, value, Packed(LAYOUTS[1])) for _ in range(2)] == [present] * 2
            assert not fuses(on_gpu, value, Packed(LAYOUTS[0])) and not fuses(narrow, value, Packed(LAYOUTS[1]))
    finally:
        flex._compiles.cache_clear()
    assert [record.message for record in caplog.records if "triton" in record.message] == [
        'group_attention="flex" needs triton, which is missing or too old here: "reference" is used.'
    ]


def test_an_unknown_implementation_is_refused(tmp_path):
    assert VLMGRPOConfig(output_dir=str(tmp_path)).group_attention == "reference"
    with pytest.raises(ConfigError, match='group_attention="flexx" is none of its 2 values.*flex'):
        VLMGRPOConfig(output_dir=str(tmp_path), group_attention="flexx")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_run_is_the_references(family, tmp_path, monkeypatch):
    used, made = [], []

    def spy(query, key, value, packed, scaling=None):
        used.append(packed)
        return flex_packed_attention(query, key, value, packed, scaling)

    def blocks(rule, *args):
        made.append(rule)
        return original(rule, *args)

    original = flex.block_mask
    monkeypatch.setattr(attention, "flex_packed_attention", spy)
    monkeypatch.setattr(flex, "block_mask", blocks)
    data, runs = rows("sizes"), {}
    for name in ("reference", "flex"):
        model, processor = tiny.build(family)
        if family == "gemma3":
            model.config.text_config.sliding_window = 8
        # With Adam, rounding would decide the direction of a gradient that is nearly zero.
        options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0, "max_steps": 2, "beta": 0.04}
        options["gradient_checkpointing"] = True
        args = recorder.config(tmp_path / name, group_attention=name, group_sharing=True, **options)
        trainer = recorder.Recorder(model, recorder.reward, args, table(data), None, processor)
        trainer.train()
        assert bool(used) == (name == "flex")
        runs[name] = trainer
    if family == "gemma3":
        assert any(packed.prompt is not None for packed in used), "image blocks and windows"
    packs = len({id(packed) for packed in used})
    assert len(made) == packs < len(used), "layers and their recomputation share the blocks"
    ours, theirs = ([row for batch in runs[name].rows for row in batch] for name in ("flex", "reference"))
    assert len(ours) == len(theirs) == 16
    for a, b in zip(ours, theirs, strict=True):
        assert a.completion == b.completion
        assert float((a.logps - b.logps).abs().max()) <= 1e-5
        assert float((a.ref - b.ref).abs().max()) <= 1e-5
    start = dict(tiny.build(family)[0].named_parameters())
    theirs = dict(runs["reference"].model.named_parameters())
    moved = 0.0
    for key, value in runs["flex"].model.named_parameters():
        assert float((value - theirs[key]).abs().max()) <= 1e-5, key
        moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 1e-4
