"""A group in one row for layers with a state: the same figures and gradients as of one row a completion."""

import copy
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vlm_grpo import LoraOptions
from vlm_grpo.collate import collate
from vlm_grpo.data import to_sample
from vlm_grpo.encode import EncodedPrompt, encode
from vlm_grpo.errors import SharingError
from vlm_grpo.group import GroupSharing, mixers
from vlm_grpo.group.attention import install
from vlm_grpo.group.layout import Layout, Packed
from vlm_grpo.group.mixers import install_mixers, prepared_masks
from vlm_grpo.group.reasons import Unshareable
from vlm_grpo.models.families import family_of, lora_targets, placeholder_ids
from vlm_grpo.patches.transformers import wrap_method
from vlm_grpo.patches.trl import LOG_PROBS, add_fused_head

HYBRID = ("qwen3_5", "lfm2_vl")
GROUP, LENGTH = 3, 5
CHECKPOINTING = {"none": None, "reentrant": True, "not reentrant": False}


def build(family: str) -> tuple[Any, Any]:
    """Two layers with a state and one with attention."""
    model, processor = tiny.build(family, layers=3)
    LOG_PROBS.ensure()
    add_fused_head(model, 1.0, outputs=("log_probs", "entropy"))
    return model, processor


def prompt_of(processor: Any) -> EncodedPrompt:
    return encode(processor, to_sample(tiny.rows("image one", ("image",))[0]))


def words(length: int) -> EncodedPrompt:
    return EncodedPrompt(list(range(30, 30 + length)), {}, {})


def completions_of(length: int) -> Tensor:
    return torch.arange(40, 40 + GROUP * length).view(GROUP, length)


def sharing_of(model: Any, mode: Any = True) -> GroupSharing:
    return GroupSharing(family_of(model.config), mode, placeholder_ids(model.config), nullcontext)


def apart(model: Any, encoded: EncodedPrompt, completions: Tensor) -> Tensor:
    """(G, T) from the plain logits of one row a completion."""
    rows = []
    for completion in completions:
        ids = torch.tensor([[*encoded.input_ids, *completion.tolist()]])
        inputs = collate([encoded], extra=[len(completion)])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, use_cache=False).logits
        own = logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        rows.append(own.gather(-1, completion[:, None])[:, 0])
    return torch.stack(rows)


def together(model: Any, encoded: EncodedPrompt, completions: Tensor, sharing: GroupSharing | None = None) -> Any:
    """(G, T) from one packed row."""
    sharing = sharing_of(model) if sharing is None else sharing
    rows = [encoded] * len(completions)
    if not sharing.on(model, rows):
        return None

    def plain(own: Any, few: list[int]) -> Tensor:
        return apart(own, encoded, completions[few])

    out = sharing.logps(model, completions, torch.ones_like(completions), rows, [False] * len(rows), plain, len(rows))
    return None if out is None else out[0]


def gradient(model: Any, logps: Tensor) -> Tensor:
    """Of all trained parameters, for a weighted sum over the group; all of them must have one."""
    weights = torch.linspace(-1.0, 1.0, logps.numel()).view_as(logps) + 0.1
    model.zero_grad()
    (logps * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    in_mixers = {n for n in found if ".linear_attn." in n or ".conv." in n}
    assert in_mixers, "the layers under test are trained"
    return torch.cat([found[name].flatten() for name in sorted(found)]).clone()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def mixers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ in ("Qwen3_5GatedDeltaNet", "Lfm2ShortConv")]


@pytest.fixture
def double(monkeypatch):
    """These layers compute in 32 bits by name. With 64 in their place no rounding is left, only mistakes."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


# ---- figures and gradients -------------------------------------------------------------------------------------------


# covers U1 U10 A1
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the blocks of a frozen tower
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", HYBRID)
def test_gradients_of_a_group_are_those_of_its_rows(family, checkpointing, adapters, double):
    model, processor = build(family)
    model.double()
    encoded, completions = prompt_of(processor), completions_of(LENGTH)
    if adapters:
        targets = lora_targets(family_of(model.config), model, LoraOptions(vision=False))
        options = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(model, options, autocast_adapter_dtype=False)
    expected = gradient(model, apart(model, encoded, completions))
    model.train()
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    logps = together(model, encoded, completions)  # its check runs forwards too
    assert (logps - apart(model, encoded, completions)).abs().max() <= 1e-6, "themselves kept in 32 bits"
    runs: list[int] = []
    handle = mixers_of(model)[0].register_forward_hook(lambda *_: runs.append(1))
    found = gradient(model, logps)
    handle.remove()
    assert len(runs) == (0 if reentrant is None else 1), "run once more in the backward pass, outside of all contexts"
    assert distance(found, expected) <= 1e-12


# covers U1
@pytest.mark.parametrize("family", HYBRID)
def test_rounding_adds_little(family, largest):
    model, processor = build(family)
    encoded, completions = prompt_of(processor), completions_of(LENGTH)
    plain, packed = apart(model, encoded, completions), together(model, encoded, completions)
    assert (packed - plain).abs().max() <= 1e-5
    found = distance(gradient(model, packed), gradient(model, plain))
    largest(f"{family}, gradient of a group", "relative", found)
    assert found <= 1e-5


# covers U1
@pytest.mark.parametrize("length", [1, 2], ids=["one token", "two tokens"])
@pytest.mark.parametrize("tokens", [2, 3, 6])  # the convolutions reach over four tokens and three
@pytest.mark.parametrize("family", HYBRID)
def test_short_prompts_and_single_tokens(family, tokens, length, double):
    model, _ = build(family)
    model.double()
    encoded, completions = words(tokens), completions_of(length)
    plain, packed = apart(model, encoded, completions), together(model, encoded, completions)
    assert (packed - plain).abs().max() <= 1e-6, "themselves kept in 32 bits"
    assert distance(gradient(model, packed), gradient(model, plain)) <= 1e-12


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("family", HYBRID)
def test_a_row_without_a_prompt_is_its_completions(family, width):
    model, _ = build(family)
    install_mixers(model)
    layer, rows = mixers_of(model)[0], torch.randn(GROUP, width, 32)
    out = layer(rows.flatten(0, 1)[None], attention_mask=Packed(Layout(0, GROUP, width)))
    assert out.shape == (1, GROUP * width, 32)
    assert torch.allclose(out[0].view_as(rows), layer(rows), atol=1e-6)


@pytest.mark.parametrize("family", HYBRID)
def test_no_layer_takes_a_step_of_generation(family, monkeypatch):
    """One token and a state go to kernels without a gradient, where there are any."""
    model, processor = build(family)
    module = sys.modules[type(mixers_of(model)[0]).__module__]
    for name in ("causal_conv1d_update", "torch_recurrent_gated_delta_rule"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a step of generation"))
    assert together(model, prompt_of(processor), completions_of(1)) is not None


# ---- outside of a packed row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRID)
def test_outside_of_a_packed_row_nothing_changes(family):
    model, processor = build(family)
    encoded, completions = prompt_of(processor), completions_of(LENGTH)
    inputs = {"input_ids": torch.tensor([encoded.input_ids]), **collate([encoded])}
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def everything() -> list[Tensor]:
        logps = apart(model, encoded, completions)
        return [logps, gradient(model, logps), *model.generate(**inputs, **options).logits]

    before = everything()
    install_mixers(model)
    wrapped = [layer.forward for layer in mixers_of(model)]
    assert all(map(torch.equal, before, everything()))
    install_mixers(model)
    assert [layer.forward for layer in mixers_of(model)] == wrapped, "a second time changes nothing"


@pytest.mark.parametrize("family", HYBRID)
def test_a_copy_of_an_installed_model_runs_its_own_weights(family):
    model, processor = build(family)
    encoded, completions = prompt_of(processor), completions_of(LENGTH)
    expected = together(model, encoded, completions).detach()
    other = copy.deepcopy(model)
    add_fused_head(other, 1.0)
    with torch.no_grad():
        for layer in mixers_of(other):
            layer.out_proj.weight.mul_(-1.0)
    found = together(other, encoded, completions)
    assert (found - apart(other, encoded, completions)).abs().max() <= 1e-5
    assert (found - expected).abs().max() > 1e-3
    assert torch.equal(together(model, encoded, completions).detach(), expected)
    install_mixers(other)
    layer = mixers_of(other)[0]
    assert layer.forward.owner is layer and layer.forward.__wrapped__.__self__ is layer


def test_wrapping_a_method_can_be_undone():
    class Counter:
        def add(self, number: int) -> int:
            """Adds."""
            return number + 1

    def twice(method: Any, owner: Any, *args: Any) -> int:
        return 2 * method(*args)

    one, other = Counter(), Counter()
    undo = wrap_method(one, "add", twice)
    wrap_method(one, "add", twice)
    assert (one.add(1), other.add(1), copy.deepcopy(one).add(1)) == (4, 2, 4)
    assert one.add.__doc__ == "Adds."
    undo()
    undo()
    assert one.add(1) == 2 and vars(one) == {}
    one.add = lambda number: number + 10
    undo = wrap_method(one, "add", twice)
    assert one.add(1) == 22
    undo()
    assert one.add(1) == 11
    with pytest.raises(AttributeError):
        wrap_method(one, "subtract", twice)


# ---- what is not exact is found out ----------------------------------------------------------------------------------


def forgotten(self: Any, count: int) -> None:
    for states in (self.conv_states, self.recurrent_states):
        rows = {i: torch.cat([torch.zeros_like(state)] * count) for i, state in states.items() if state is not None}
        states.update(rows)


def one_behind_the_other(forward: Any, mixer: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    return forward(*args, attention_mask=None if isinstance(attention_mask, Packed) else attention_mask, **kwargs)


@pytest.mark.parametrize("fault", ["forgets the prompt", "leaks from completion to completion"])
@pytest.mark.parametrize("family", HYBRID)
def test_a_wrong_state_is_found_out(family, fault, monkeypatch, caplog):
    if fault == "forgets the prompt":
        monkeypatch.setattr(mixers._State, "repeat", forgotten)
    else:
        monkeypatch.setattr(mixers, "_forward", one_behind_the_other)
    model, processor = build(family)
    encoded, completions = prompt_of(processor), completions_of(LENGTH)
    with pytest.raises(SharingError, match="the log-probabilities of the first groups differ by"):
        together(model, encoded, completions)
    sharing = sharing_of(model, "auto")
    assert together(model, encoded, completions, sharing) is None
    assert sharing.off and "differ by" in caplog.text


# ---- other models ----------------------------------------------------------------------------------------------------


def test_models_without_such_layers_take_their_usual_mask():
    model, _ = tiny.build("qwen2_5_vl")
    install_mixers(model)
    assert prepared_masks(model, Layout(4, 2, 3)) is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_windows_beside_such_layers_stay():
    model, _ = build("lfm2_vl")
    install(model)
    text = model.config.get_text_config()
    text.layer_types, text.sliding_window = ["conv", "sliding_attention", "full_attention"], 2
    masks = prepared_masks(model, Layout(4, 2, 3))
    assert masks is not None and set(masks) == {"conv", "sliding_attention", "full_attention"}
    assert all(isinstance(mask, Packed) for mask in masks.values())
    window = torch.ones(7, 7, dtype=torch.bool).tril().triu(-1)
    assert torch.equal(masks["sliding_attention"].suffix[0, 0], window[4:])
    assert torch.equal(masks["sliding_attention"].prompt[0, 0], window[:4, :4])
    assert masks["conv"].suffix is None and masks["full_attention"].suffix is None


def test_layers_that_cannot_be_run_in_two_parts_are_refused():
    model, _ = build("lfm2_vl")
    text = model.config.get_text_config()
    own = text.layer_types
    text.layer_types = ["hybrid", *own[1:]]
    with pytest.raises(Unshareable, match="of type hybrid have attention and a state side by side"):
        install_mixers(model)
    text.layer_types = own
    install_mixers(model)
    with pytest.raises(Unshareable, match=r"a tensor of shape \(1, 3\)"):
        layer, row = mixers_of(model)[0], torch.randn(1, 10, 32)
        layer(row, attention_mask=Packed(Layout(4, 2, 3)), seq_idx=torch.zeros(1, 3))
    del layer.layer_idx
    with pytest.raises(Unshareable, match=r"its layer 0 \(conv\) keeps a state in a way of its own"):
        install_mixers(model)


def test_a_language_model_that_takes_no_masks_by_type_is_refused():
    class Own(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids * attention_mask

    model, _ = build("lfm2_vl")
    model.get_decoder = Own
    with pytest.raises(Unshareable, match="takes no masks by type of layer"):
        install_mixers(model)
