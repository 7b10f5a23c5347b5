"""A scalar head's numbers: in any batch, with sharing and without, those of one row by itself."""

import copy
from contextlib import nullcontext

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm_grpo.collate import collate
from vlm_grpo.data import to_sample
from vlm_grpo.encode import EncodedPrompt, encode
from vlm_grpo.errors import CheckpointError
from vlm_grpo.group import GroupSharing
from vlm_grpo.judging.scores import Scores
from vlm_grpo.models.families import family_of, placeholder_ids, tower_of
from vlm_grpo.models.heads import (
    HEAD_FILE,
    ScalarHead,
    add_head,
    head_of,
    heads_of,
    last_hidden_state,
    load_head,
    remove_head,
    save_heads,
)

QUICK = ("qwen2_5_vl", "qwen2_audio", "gemma3", "qwen2_5_omni_thinker")
FAMILIES = [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in tiny.KINDS]
UNSHARED = ()
SUFFIXES = [[5, 6, 7, 8], [9, 4], [6, 6, 6], [3, 9, 9, 4, 7]]


def encoded(processor, kind: str, seed: int = 0) -> list[EncodedPrompt]:
    """Two prompts with a medium, the first one twice, and one of text alone."""
    maker = {"image": tiny.image, "video": tiny.video, "audio": tiny.audio}[kind]
    rows = [
        {"prompt": tiny.prompt(text, **{"images": 0, f"{kind}s": 1}), f"{kind}s": [maker(seed + number)]}
        for number, text in enumerate(("what color is this", "count"))
    ]
    if "PaliGemma" in type(processor).__name__:  # takes no row without a picture
        rows.append(rows[0])
    else:
        rows.append({"prompt": tiny.prompt("count", images=0)})
    first, second, text = [encode(processor, to_sample(row)) for row in rows]
    return [first, first, second, text]


def by_itself(model, head, encoding: EncodedPrompt, suffix: list[int]) -> Tensor:
    """Independent: one row, no padding, the whole model's forward, and what its output head is given."""
    ids = torch.tensor([[*encoding.input_ids, *suffix]])
    inputs = collate([encoding], ids.size(1), [len(suffix)])
    given: list[Tensor] = []
    door = model.get_base_model().get_output_embeddings()
    handle = door.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
    handle.remove()
    return given[0][0, -1].float() @ head.weight[0] + head.bias[0]


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(family: str):
        if family not in made:
            model, processor = tiny.build(family)
            adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            made[family] = adapted.eval(), add_head(adapted), processor
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["auto", False], ids=["shared", "plain"])
def test_any_batch_gives_the_score_of_one_row_by_itself(built, family, mode, largest):
    # covers A3, L3, hold 3, hold 4
    model, head, processor = built(family)
    kind = tiny.KINDS[family][-1]
    rows = encoded(processor, kind)
    ids = placeholder_ids(model.config, processor)
    sharing = GroupSharing(family_of(model.config), mode, ids, nullcontext)
    scores = Scores(model, head, sharing=sharing, batch_size=2)
    with torch.no_grad():
        assert bool(sharing.on(model, rows)) is (mode == "auto" and family not in UNSHARED)
        expected = torch.stack([by_itself(model, head, *pair) for pair in zip(rows, SUFFIXES, strict=True)])
        found = scores(rows, SUFFIXES)
        order = [3, 1, 0, 2]
        shuffled = scores([rows[i] for i in order], [SUFFIXES[i] for i in order])
        alone = torch.cat([scores([row], [suffix]) for row, suffix in zip(rows, SUFFIXES, strict=True)])
        seen = scores(encoded(processor, kind, seed=7), SUFFIXES)
    largest(f"score of {family}", "shared" if mode else "plain", (found - expected).abs().max())
    for other in (found, shuffled[torch.tensor(order).argsort()], alone):
        assert torch.allclose(other, expected, atol=1e-5), (other, expected)
    with_media = torch.tensor([bool(row.media) for row in rows])
    moved = ~torch.isclose(seen, expected, atol=1e-5)
    assert torch.equal(moved, with_media), "other media, other scores"


def pairwise(scores: Tensor) -> Tensor:
    return -logsigmoid(scores[0] - scores[1])


def test_shared_gradients_are_those_of_single_rows(built):
    model, head, processor = built("qwen2_5_vl")
    model = copy.deepcopy(model)
    head = head_of(model)
    encoding = encoded(processor, "image")[0]
    sharing = GroupSharing(family_of(model.config), True, placeholder_ids(model.config), nullcontext)

    def gradients(scores: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        pairwise(scores).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    shared = gradients(Scores(model, head, sharing=sharing)([encoding, encoding], SUFFIXES[:2]))
    single = gradients(torch.stack([by_itself(model, head, encoding, suffix) for suffix in SUFFIXES[:2]]))
    assert shared.keys() == single.keys() and {"scalar_heads.default.weight"} < shared.keys()
    towers = {tower_of(family_of(model.config), name) for name in shared}
    assert {"vision", "language"} <= towers
    whole = torch.cat([single[name].flatten() for name in sorted(single)])
    gap = torch.cat([(shared[name] - single[name]).flatten() for name in sorted(single)])
    assert gap.norm() <= 1e-5 * whole.norm()


def test_a_model_that_is_its_own_backbone_computes_no_logits(built):
    model, _, _ = built("qwen2_5_omni_thinker")
    plain = model.get_base_model()
    rows: list[int] = []
    handle = plain.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    hidden = last_hidden_state(plain, input_ids=torch.tensor([[5, 6, 7]]))
    handle.remove()
    assert hidden.shape[:2] == (1, 3) and rows == [0]


def test_a_head_is_saved_beside_its_adapter_and_comes_back(tmp_path, built):
    # covers A10, L10
    model = copy.deepcopy(built("qwen2_5_vl")[0])
    own, value = head_of(model), add_head(model, "value", zero=True)
    assert float(value.weight.detach().abs().sum()) == 0 and float(own.bias.detach()) == 0
    assert {"scalar_heads.value.weight", "scalar_heads.value.bias"} <= dict(model.named_parameters()).keys()
    with torch.no_grad():
        value.weight.normal_()
    save_heads(model, tmp_path)
    assert (tmp_path / HEAD_FILE).is_file() and (tmp_path / "value" / HEAD_FILE).is_file()
    kept = {role: copy.deepcopy(head.state_dict()) for role, head in heads_of(model).items()}
    with torch.no_grad():
        for head in (own, value):
            head.weight.zero_()
    assert load_head(model, "default", tmp_path) is own and load_head(model, "value", tmp_path) is value
    for role, values in kept.items():
        assert all(torch.equal(heads_of(model)[role].state_dict()[name], v) for name, v in values.items())
    assert torch.equal(load_head(model, "reward", tmp_path).weight, kept["default"]["weight"]), "under another name"
    for role in ("default", "value", "reward"):
        remove_head(model, role)
    assert not heads_of(model) and "scalar_heads" not in model._modules


def test_a_head_in_half_precision_surroundings_computes_in_float32():
    head, hidden = ScalarHead(8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden).dtype == torch.float32
    assert torch.equal(head(hidden.bfloat16()), head(hidden.bfloat16().float()))


def test_a_head_that_is_missing_or_of_another_size_is_one_sentence(tmp_path, built):
    model = copy.deepcopy(built("qwen2_5_vl")[0])
    with pytest.raises(CheckpointError, match="head.safetensors is missing. Give the folder of a reward model"):
        load_head(model, "reward", tmp_path)
    (tmp_path / HEAD_FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_head(model, "reward", tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    remove_head(model, "default")
    model.add_module("scalar_heads", torch.nn.ModuleDict({"default": ScalarHead(8)}))
    save_heads(model, tmp_path)
    remove_head(model, "default")
    with pytest.raises(CheckpointError, match=r"weight \[1, 8\], but a head of this model is weight \[1, \d+\]"):
        load_head(model, "reward", tmp_path)
