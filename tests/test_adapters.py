"""Several adapters on one base: roles, what checkpointing recomputes, copies, and checkpoints that hold all of them."""

import copy
import logging
import shutil
from functools import cache
from operator import attrgetter

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from real_unsloth import REPLACE_TRL, run_script
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_grpo import VLMSFTConfig, VLMSFTTrainer, load_model
from vlm_grpo.checkpoint import ExactCheckpoints
from vlm_grpo.errors import CheckpointError, ConfigError, UnsupportedError
from vlm_grpo.models.adapters import (
    adapter_parameters,
    base_of,
    check_policy_adapter,
    copy_adapter,
    kept_flags,
    load_role,
    parameters_by_role,
    remember_roles,
    role,
)
from vlm_grpo.models.heads import add_head, head_of
from vlm_grpo.options import LoraOptions
from vlm_grpo.patches.peft import REMEMBERED_ROLES

ROLES = ("default", "ref", "reward", "value")
LORA = LoraOptions(r=4, alpha=8, vision=True)
TEXT = {"input_ids": torch.tensor([[5, 6, 7, 8]])}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same test on every machine


@pytest.fixture(autouse=True)
def forgotten():
    """What a test has installed in this process is gone behind it."""
    yield
    REMEMBERED_ROLES.undo()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("base") / "model")


@cache
def loaded(base, options):
    return load_model(base, backend="hf", **{"lora": LORA, **dict(options)})


def adapted(base, **options):
    """A policy whose adapter matters, on a copy of a model that is loaded once."""
    model, processor = loaded(base, tuple(options.items()))
    model = copy.deepcopy(model)
    shake(model, 1)
    return model, processor


def shake(model, seed, *names):
    """Every weight of the adapters (all, or those named) and of the heads anew."""
    generator = torch.Generator().manual_seed(seed)
    own = [p for name in names or model.peft_config for p in adapter_parameters(model, name)]
    for parameter in [*own, *(model._modules["scalar_heads"].parameters() if hasattr(model, "scalar_heads") else ())]:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise * 0.3 * (parameter.shape[-1] ** -0.5)).to(parameter.dtype)


def four(base, **options):
    """A policy, its reference, a reward model with other layers and another rank, values; heads for two."""
    model, processor = adapted(base, **options)
    copy_adapter(model, "default", "ref")
    with kept_flags(model):
        model.add_adapter("reward", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    copy_adapter(model, "reward", "value", trainable=True)
    add_head(model, "reward").requires_grad_(False)
    add_head(model, "value", zero=True)
    shake(model, 2)
    return model, processor


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model):
    return {name for name in model.peft_config if all(p.requires_grad for p in adapter_parameters(model, name))}


def inputs(processor, seed=0):
    row = tiny.prompt()
    row[0]["content"][0]["image"] = tiny.image(seed, (84, 56))
    return processor.apply_chat_template([row], tokenize=True, return_dict=True, return_tensors="pt")


def logits(model, encoded):
    return model(**encoded, use_cache=False).logits


def outputs(model, encoded):
    """What each role says, by an independent way: the weights of PEFT's own switch on a deep copy."""
    found = {}
    with torch.no_grad():
        for name in (*model.peft_config, None):
            other = copy.deepcopy(model).eval()
            if name is None:
                found[None] = logits(other.unload(), encoded)
            else:
                other.set_adapter(name)
                found[name] = logits(other, encoded)
    return found


# ---- a role ----------------------------------------------------------------------------------------------------------


def test_a_role_computes_with_its_adapter_and_changes_no_flag(base):  # covers L5
    model, processor = four(base)
    model.eval()
    encoded, before = inputs(processor), flags(model)
    expected = outputs(model, encoded)
    assert min((expected[a] - expected[b]).abs().max() for a in expected for b in expected if a != b) > 1e-2
    assert trained(model) == {"default", "value"}
    with torch.no_grad():
        for name, own in expected.items():
            with role(model, name):
                assert flags(model) == before
                torch.testing.assert_close(logits(model, encoded), own, atol=1e-6, rtol=0)
            assert flags(model) == before and model.active_adapters == ["default"]
            torch.testing.assert_close(logits(model, encoded), expected["default"], atol=1e-6, rtol=0)


def test_roles_nest_and_end_with_an_exception(base):  # covers L5
    model, _ = four(base)
    model.eval()
    encoded, before = TEXT, flags(model)
    expected = outputs(model, encoded)

    def says(name):
        with torch.no_grad():
            assert torch.equal(logits(model, encoded), expected[name]) or name is None
        assert flags(model) == before

    with role(model, "value"):
        with pytest.raises(ZeroDivisionError), role(model, None), role(model, "reward"):
            says("reward")
            raise ZeroDivisionError
        says("value")
        with role(model, None):
            torch.testing.assert_close(logits(model, encoded), expected[None])
            with role(model, "ref"):
                says("ref")
            torch.testing.assert_close(logits(model, encoded), expected[None])
        says("value")
    says("default")


def test_the_trap_is_real_and_kept_flags_mends_it(base):
    """PEFT's and TRL's own ways of switching leave ``value`` frozen."""
    from trl.trainer.utils import use_adapter

    model, _ = four(base)
    before = flags(model)
    for switch in (lambda: use_adapter(model, "ref"), lambda: use_adapter(model, None), model.disable_adapter):
        with kept_flags(model), switch():
            pass
        assert flags(model) == before
    with kept_flags(model):
        model.set_adapter("reward")
        model.base_model.disable_adapter_layers()
    assert flags(model) == before and model.active_adapters == ["default"]
    assert model.get_model_status().enabled is True
    with use_adapter(model, "ref"):
        pass
    assert trained(model) == {"default"}, "what TRL leaves behind"


def test_several_active_adapters_come_back(base):
    model, processor = four(base)
    model.eval()
    encoded = inputs(processor)
    model.base_model.set_adapter(["default", "ref"])
    before, said = flags(model), logits(model, encoded).detach()
    with role(model, "reward"):
        assert model.active_adapters == ["reward"]
    with kept_flags(model):
        model.set_adapter("value")
    assert model.active_adapters == ["default", "ref"] and flags(model) == before
    assert torch.equal(logits(model, encoded), said)


def test_a_projector_in_full_is_the_policys_alone(base):  # covers L5
    model, processor = adapted(base, projector="full")
    before = flags(model)
    with kept_flags(model):
        model.add_adapter("reward", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shake(model, 3)
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert wrappers and all(set(w.modules_to_save) == {"default"} for w in wrappers)
    assert {name: flag for name, flag in flags(model).items() if ".reward." not in name} == before
    model.eval()
    encoded = inputs(processor)
    with torch.no_grad(), role(model, "reward"):
        said = logits(model, encoded)
    plain = copy.deepcopy(model)
    plain.set_adapter("reward")
    assert torch.equal(said, logits(plain, encoded))
    with torch.no_grad():
        for wrapper in wrappers:
            for parameter in wrapper.modules_to_save["default"].parameters():
                parameter.add_(1.0)
        with role(model, "reward"):
            assert torch.equal(said, logits(model, encoded)), "the original module"
        assert not torch.equal(said, logits(model, encoded))


def test_nothing_but_a_projector_in_full_is_a_role_too(base):
    model, processor = load_model(base, backend="hf", language="off", vision="off", projector="full")
    shake(model, 1)
    copy_adapter(model, "default", "ref")
    shake(model, 2, "default")
    encoded = inputs(processor)
    expected = outputs(model.eval(), encoded)
    for name in ("default", "ref"):
        with torch.no_grad(), role(model, name):
            assert torch.equal(logits(model, encoded), expected[name])
    assert not torch.equal(expected["default"], expected["ref"]) and trained(model) == {"default"}


def test_misused_roles_are_a_sentence(base):
    model, _ = four(base)
    with pytest.raises(ConfigError, match=r"no adapter 'rewrd', it has default, ref.*Did you mean \"reward\""):
        role(model, "rewrd").__enter__()
    with pytest.raises(ConfigError, match="no adapter 'policy' to copy, it has default"):
        copy_adapter(model, "policy", "x")
    with pytest.raises(ConfigError, match=r"an adapter 'value' already. Give another name, or delete_adapter"):
        copy_adapter(model, "default", "value")
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged into the base. Call model.unmerge_adapter\(\) first"):
        role(model, "ref").__enter__()


def test_a_module_with_the_name_of_a_role_is_refused(base):
    """PEFT drops the policy's own weights of such a layer from what it saves, without a word."""
    model, _ = adapted(base)
    model.get_base_model().model.language_model.layers[0].add_module("value", nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"'value' cannot stand on Qwen2_5_VL.*layers.0.value has the same name"):
        copy_adapter(model, "default", "value")
    copy_adapter(model, "default", "ref")


# ---- checkpointing ---------------------------------------------------------------------------------------------------


def gradients(model, encoded, kind, remember=True):
    """Of the sum of two losses, each computed in its role, backpropagated behind both."""
    model.gradient_checkpointing_disable()
    if kind is not None:
        if remember:
            remember_roles(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        model.enable_input_require_grads()
    return two_losses(model, encoded)


def two_losses(model, encoded):
    model.zero_grad()
    model.train()
    losses = []
    for name in ("default", "value"):
        with role(model, name):
            losses.append(logits(model, encoded).log_softmax(-1)[0, :, 7].sum())
    (losses[0] + 3 * losses[1]).backward()
    out = {}
    for name in ("default", "value"):
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in adapter_parameters(model, name)]
        out[name] = torch.cat([gradient.flatten() for gradient in own])
    assert all(p.grad is None for name in ("ref", "reward") for p in adapter_parameters(model, name))
    return out


def distance(one, other):
    return float(max((one[name] - other[name]).norm() / other[name].norm() for name in other))


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_are_computed_again_in_the_role_of_their_forward(base, reentrant, four_bit, largest, tmp_path):
    # covers L5 U7
    if four_bit:
        base = tiny.save("qwen2_5_vl", tmp_path / "wide", hidden=64)
    model, processor = four(base, load_in_4bit=four_bit)
    encoded = inputs(processor)
    expected = gradients(model, encoded, None)
    assert all(vector.norm() > 0.1 for vector in expected.values())
    if reentrant:  # the other kind notices that other tensors are saved
        assert distance(gradients(model, encoded, reentrant, remember=False), expected) > 0.1, "the trap is real"
    else:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            gradients(model, encoded, reentrant, remember=False)
    before = flags(model)
    remember_roles(model)
    found = distance(gradients(model, encoded, reentrant), expected)
    largest("gradients of two roles, checkpointed", "reentrant" if reentrant else "not reentrant", found)
    assert found <= 1e-5
    assert flags(model) == before and model.active_adapters == ["default"]


@pytest.mark.slow
def test_the_trap_without_an_error_where_both_adapters_have_the_same_layers(base):
    """Two adapters alike save as many tensors: the kind that is not reentrant is wrong without a word, too."""
    model, processor = adapted(base)
    for name in ("ref", "reward", "value"):
        copy_adapter(model, "default", name, trainable=name == "value")
    shake(model, 4)
    encoded = inputs(processor)
    expected = gradients(model, encoded, None)
    for reentrant in (True, False):
        try:
            wrong = distance(gradients(model, encoded, reentrant, remember=False), expected)
        except (RuntimeError, torch.utils.checkpoint.CheckpointError):
            wrong = 1.0
        assert wrong > 0.1
        assert distance(gradients(model, encoded, reentrant), expected) <= 1e-5
        REMEMBERED_ROLES.undo()


def test_what_is_remembered_survives_other_switches_copies_and_saving(base, tmp_path):  # covers U7
    from vlm_grpo.models.modes import inference_mode, restored

    model, processor = four(base)
    encoded = inputs(processor)
    expected = gradients(model, encoded, None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    plain = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    remember_roles(model)
    remember_roles(model)
    assert plain == [vars(m).get("_gradient_checkpointing_func") for m in model.modules()], "nothing lies on the model"
    layer = next(m for m in model.modules() if vars(m).get("gradient_checkpointing"))
    read = layer._gradient_checkpointing_func
    assert read.func is torch.utils.checkpoint.checkpoint and read.keywords == {"use_reentrant": True}
    layer._gradient_checkpointing_func = read  # as Unsloth puts one back that it has read
    assert layer._gradient_checkpointing_func.__wrapped__ is read.__wrapped__, "wrapped once"
    with restored(model), inference_mode(model):
        model.gradient_checkpointing_disable()
    assert distance(gradients(model, encoded, True), expected) <= 1e-5
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    del model
    assert distance(gradients(other, encoded, False, remember=False), expected) <= 1e-5
    torch.save(other.get_base_model().model.language_model.layers, tmp_path / "layers.pt")
    REMEMBERED_ROLES.undo()
    assert not hasattr(nn.Module(), "_gradient_checkpointing_func")
    with pytest.raises(AttributeError):
        attrgetter("_gradient_checkpointing_func")(type(layer)(other.config.text_config, 0))


def test_a_model_without_adapters_is_checkpointed_as_ever(base):
    model, _ = load_model(base, backend="hf", gradient_checkpointing=True)
    seen = []
    for module in model.modules():
        if vars(module).get("_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda function, *args: seen.append(function) or function(*args)
    remember_roles(model)
    model.train()(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert seen and all(not hasattr(f, "func") or f.func.__name__ != "_standing" for f in seen)


UNSLOTH = """
import json
import test_adapters
import tiny
import torch
import unsloth_zoo.gradient_checkpointing as checkpointing
from vlm_grpo import LoraOptions, load_model
from vlm_grpo.models.adapters import copy_adapter
from vlm_grpo.patches.peft import REMEMBERED_ROLES

tiny.save("qwen2_5_vl", "model")
found = {}
for kind in (True, "unsloth"):
    lora = LoraOptions(r=4, alpha=8, vision=True)
    options = {"dtype": "float32", "max_seq_length": 512, "gradient_checkpointing": kind}
    model, processor = load_model("model", backend="unsloth", lora=lora, **options)
    for name in ("ref", "reward", "value"):
        copy_adapter(model, "default", name, trainable=name == "value")
    test_adapters.shake(model, 1)
    encoded, before = test_adapters.inputs(processor), test_adapters.flags(model)
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    own = [vars(layer)["_gradient_checkpointing_func"] for layer in layers]

    def gradients(function=None, on=True):
        for layer, as_loaded in zip(layers, own, strict=True):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = on, function or as_loaded
        return test_adapters.two_losses(model, encoded)

    expected = gradients(on=False)
    functions = {"as loaded": None}
    for name in ("unsloth_gradient_checkpoint", "unsloth_offloaded_gradient_checkpoint"):
        functions[name] = getattr(checkpointing, name)
    for name, function in functions.items():
        REMEMBERED_ROLES.undo()
        trap = test_adapters.distance(gradients(function), expected)
        test_adapters.remember_roles(model)
        mended = test_adapters.distance(gradients(function), expected)
        found[f"{kind}, {name}"] = [len(layers), trap, mended, test_adapters.flags(model) == before]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_unsloth_computes_again_in_the_role_of_the_forward(tmp_path):  # covers L5 U7
    found = run_script(REPLACE_TRL + UNSLOTH, tmp_path)
    assert len(found) == 6
    for layers, trap, mended, same_flags in found.values():
        assert layers > 0 and trap > 0.1 and mended <= 1e-5 and same_flags


# ---- another adapter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_copy_is_exact_and_draws_nothing(base, dtype):  # covers L5
    model, processor = load_model(
        base, backend="hf", lora=LoraOptions(r=4, alpha=8, vision=True, dropout=0.5), projector="full", dtype=dtype
    )
    shake(model, 5)
    encoded, before, state = inputs(processor), flags(model), torch.get_rng_state()
    copy_adapter(model, "default", "ref")
    copy_adapter(model, "ref", "value", trainable=True)
    assert torch.equal(state, torch.get_rng_state()), "a run draws the same with and without it"
    own = [adapter_parameters(model, name) for name in ("default", "ref", "value")]
    assert len(own[0]) == len(own[1]) == len(own[2]) > 20
    for parameters in zip(*own, strict=True):
        assert {p.dtype for p in parameters} == {torch.float32}
        assert torch.equal(parameters[0], parameters[1]) and torch.equal(parameters[0], parameters[2])
        assert len({p.data_ptr() for p in parameters}) == 3
    assert {n: f for n, f in flags(model).items() if n in before} == before
    assert trained(model) == {"default", "value"} and model.active_adapters == ["default"]
    model.train()
    with torch.no_grad(), role(model, "ref"):
        first = logits(model, encoded)
        assert torch.equal(first, logits(model, encoded)), "a frozen adapter has no dropout, in training neither"
    model.eval()
    with torch.no_grad():
        assert torch.equal(first, logits(model, encoded)), "what the policy says"
        with role(model, "value"):
            assert torch.equal(first, logits(model, encoded))


def test_values_are_trainable_before_the_optimizer_is_built(base, tmp_path):  # covers L5 U7
    model, processor = adapted(base)
    copy_adapter(model, "default", "reward")
    copy_adapter(model, "reward", "value", trainable=True)
    rows = [{"prompt": tiny.prompt("count one", 0), "completion": "red"}] * 4
    quiet = {"report_to": "none", "disable_tqdm": True, "max_steps": 1, "gradient_check": False}
    args = VLMSFTConfig(str(tmp_path), save_strategy="no", **quiet)
    trainer = VLMSFTTrainer(model, args, Dataset.from_list(rows), processing_class=processor)
    trainer.create_optimizer()
    inside = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, expected in (("default", True), ("value", True), ("reward", False)):
        assert all((id(p) in inside) is expected for p in adapter_parameters(model, name)), name


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_base_weights_are_counted_once(base, four_bit, tmp_path):  # covers L5
    if four_bit:
        base = tiny.save("qwen2_5_vl", tmp_path / "wide", hidden=64)
    plain, _ = load_model(base, backend="hf")
    model, _ = four(base, load_in_4bit=four_bit)
    model.eval()
    with torch.no_grad(), role(model, None):
        said = logits(model, TEXT)
    counts = parameters_by_role(model)
    assert counts["base"] == sum(p.numel() for p in plain.parameters())
    heads = {name: sum(p.numel() for p in head_of(model, name).parameters()) for name in ("reward", "value")}
    for name in ROLES:
        own = adapter_parameters(model, name)
        assert counts[name] == sum(p.numel() for p in own) + heads.get(name, 0) > 0
    assert list(counts) == ["base", *ROLES] and counts["default"] == counts["ref"] > counts["reward"] - heads["reward"]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    alone = model.unload()
    only = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in alone.parameters()}
    added = sum(counts[name] for name in ROLES) * 4
    assert sum(storages.values()) == sum(v for k, v in only.items() if k in storages) + added
    assert len(only) == len([k for k in only if k in storages]), "the base is the one it was"
    assert torch.equal(logits(alone, TEXT), said)


# ---- from a run folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def reward_run(base, tmp_path):
    """A run folder whose adapter has another rank and other layers, and a projector in full."""
    lora = LoraOptions(r=2, alpha=2, vision=False, dropout=0.3)
    model, processor = load_model(base, backend="hf", lora=lora, projector="full")
    shake(model, 7)
    model.save_pretrained(tmp_path / "reward")
    with torch.no_grad():
        said = logits(model.eval(), inputs(processor))
    return tmp_path / "reward", said


def test_a_role_from_a_run_folder(base, reward_run):  # covers A3 L5
    folder, said = reward_run
    model, processor = adapted(base)
    model.train()
    before, modes = flags(model), [m.training for m in model.modules()]
    own = logits(model, inputs(processor)).detach()
    load_role(model, folder, "reward")
    assert {n: f for n, f in flags(model).items() if n in before} == {n: before[n] for n in flags(model) if n in before}
    assert trained(model) == {"default"} and model.active_adapters == ["default"]
    assert model.training and all(modes) and all(m.training for m in model.modules())
    with torch.no_grad():
        assert torch.equal(logits(model, inputs(processor)), own)
        with role(model, "reward"):
            torch.testing.assert_close(logits(model, inputs(processor)), said, atol=1e-6, rtol=0)
    assert base_of(model) == str(base)


def test_a_role_in_half_precision_is_not_rounded(base, reward_run):
    model, _ = adapted(base, dtype="bfloat16")
    load_role(model, reward_run[0], "reward", trainable=True)
    saved = load_file(reward_run[0] / "adapter_model.safetensors")
    state = {n.replace("modules_to_save.reward.", "").replace(".reward.", "."): p for n, p in model.named_parameters()}
    assert any("merger" in name for name in saved)
    for name, value in saved.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], value), name
    assert trained(model) == {"default", "reward"}


def test_folders_that_cannot_be_a_role_are_a_sentence(base, reward_run, tmp_path):
    model, processor = adapted(base)
    before = flags(model)
    with pytest.raises(
        ConfigError, match=r"holds no adapter \(adapter_config.json\). Give the folder of a finished run"
    ):
        load_role(model, tmp_path, "reward")
    other = tiny.save("qwen2_5_vl", tmp_path / "other", seed=1)
    elsewhere, _ = adapted(other)
    with pytest.raises(
        ConfigError, match=rf"was trained on {base}, but this model stands on {other}. Load it with a mo"
    ):
        load_role(elsewhere, reward_run[0], "reward")
    torn = tmp_path / "torn"
    shutil.copytree(reward_run[0], torn)
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"torn: its adapter does not fit this model \(.+\). Check that it is whole."):
        load_role(model, torn, "reward")
    weights = load_file(reward_run[0] / "adapter_model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[1:]}, torn / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="does not fit this model"):
        load_role(model, torn, "reward")
    assert list(model.peft_config) == ["default"], "as if nothing had happened"
    assert {name for name, flag in flags(model).items() if flag} == {name for name, flag in before.items() if flag}
    load_role(model, reward_run[0], "reward")
    with torch.no_grad(), role(model, "reward"):
        torch.testing.assert_close(logits(model.eval(), inputs(processor)), reward_run[1], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="has an adapter 'reward' already"):
        load_role(model, reward_run[0], "reward")


def test_the_base_of_a_run_that_started_from_a_run(base, reward_run, tmp_path):
    """Its base is the other's base with the other's adapter merged: another one."""
    import json

    model, processor = adapted(base)
    (tmp_path / "second").mkdir()
    model.save_pretrained(tmp_path / "second")
    processor.save_pretrained(reward_run[0])
    config = tmp_path / "second" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(reward_run[0])}))
    second, _ = load_model(tmp_path / "second", backend="hf")
    assert base_of(second) == str(reward_run[0])
    with pytest.raises(ConfigError, match="stands on"):
        load_role(second, reward_run[0], "reward")
    model.peft_config["default"].base_model_name_or_path = "../gone"
    assert base_of(model) == str(base)
    model.peft_config["default"].base_model_name_or_path = "owner/name"
    assert base_of(model) == "owner/name"


def test_a_policy_must_be_called_default(base):
    model, _ = tiny.build("qwen2_5_vl")
    other = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), adapter_name="policy")
    with pytest.raises(ConfigError) as error:
        check_policy_adapter(other)
    assert str(error.value) == (
        "The model's adapter is called 'policy', but the policy's must be called 'default'. "
        'Make it by get_peft_model(..., adapter_name="default"), or load it by load_model(FOLDER).'
    )
    good, _ = four(base)
    check_policy_adapter(good)
    good.set_adapter("value")
    with pytest.raises(ConfigError, match=r"active adapter is 'value', but the policy's is 'default'.*set_adapter"):
        check_policy_adapter(good)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def sft(model, processor, folder, **options):
    rows = Dataset.from_list([{"prompt": tiny.prompt("count one", 0), "completion": "red"}] * 4)
    quiet = {"report_to": "none", "disable_tqdm": True, "max_steps": 1, "gradient_check": False}
    args = VLMSFTConfig(str(folder), **{"save_strategy": "no", "learning_rate": 0.0, **quiet, **options})
    return VLMSFTTrainer(model, args, rows, rows, processing_class=processor)


def held(model):
    """Every number of the adapters and heads, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if any(f".{role}." in name for role in ROLES)
    }


@pytest.fixture
def saved(base, tmp_path):
    """A trainer of a model with everything, and its checkpoint."""
    model, processor = four(base, projector="full")
    trainer = sft(model, processor, tmp_path / "run")
    trainer.create_optimizer_and_scheduler(1)
    trainer._save_checkpoint(model, None)
    return trainer, tmp_path / "run" / "checkpoint-0"


def test_every_adapter_and_head_comes_back_bit_for_bit(saved):  # covers L5 L10
    trainer, checkpoint = saved
    model = trainer.model
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.safetensors")}
    folders = ("", "ref/", "reward/", "value/")
    assert files == {f"{f}adapter_model.safetensors" for f in folders} | {f"{f}head.safetensors" for f in folders[2:]}
    expected, before = held(model), flags(model)
    model.eval()
    for restore in (trainer._load_from_checkpoint, lambda folder: trainer._load_best_model()):
        shake(model, 9)
        assert not any(torch.equal(value, expected[name]) for name, value in held(model).items())
        trainer.state.best_model_checkpoint = str(checkpoint)
        restore(str(checkpoint))
        now = held(model)
        assert now.keys() == expected.keys() and len(now) > 100
        assert all(torch.equal(value, expected[name]) for name, value in now.items())
        assert flags(model) == before and model.active_adapters == ["default"] and not model.training
    trainer.optimizer = None
    trainer.create_optimizer()
    inside = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in inside for p in adapter_parameters(model, "value"))
    assert id(head_of(model, "value").weight) in inside
    trainer.save_model(str(checkpoint.parent / "final"))
    final = checkpoint.parent / "final"
    files = {str(path.relative_to(final)) for path in final.rglob("*.safetensors")}
    assert files == {f"{f}adapter_model.safetensors" for f in ("", "value/")} | {"value/head.safetensors"}, "the result"


def test_a_role_of_another_run_is_that_runs_also_behind_a_checkpoint(base, reward_run, tmp_path):  # covers L5 L10
    """It takes no room in checkpoints, and one that lies there, as of another judge, does not take its place."""
    model, processor = adapted(base)
    load_role(model, reward_run[0], "reward")
    add_head(model, "reward").requires_grad_(False)
    trainer = sft(model, processor, tmp_path / "run")
    trainer.create_optimizer_and_scheduler(1)
    trainer._save_checkpoint(model, None)
    checkpoint = tmp_path / "run" / "checkpoint-0"
    assert [path.name for path in checkpoint.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    expected = held(model)
    shake(model, 9, "default")
    model.get_submodule("scalar_heads.reward").load_state_dict(
        {name: expected[f"scalar_heads.reward.{name}"] for name in ("weight", "bias")}
    )
    shutil.copytree(reward_run[0], checkpoint / "reward")
    other = load_file(checkpoint / "reward" / "adapter_model.safetensors")
    save_file({n: v + 1 for n, v in other.items()}, checkpoint / "reward" / "adapter_model.safetensors")
    trainer._load_from_checkpoint(str(checkpoint))
    assert [name for name, value in held(model).items() if not torch.equal(value, expected[name])] == []


@pytest.mark.slow
def test_transformers_alone_would_lose_the_policy(saved):
    trainer, checkpoint = saved
    expected = held(trainer.model)
    shake(trainer.model, 9)
    super(ExactCheckpoints, trainer)._load_from_checkpoint(str(checkpoint))
    lost = {name for name, value in held(trainer.model).items() if not torch.equal(value, expected[name])}
    assert any(".default." in name for name in lost) and any("scalar_heads" in name for name in lost)
    assert not any(p.requires_grad for p in adapter_parameters(trainer.model, "value")), "and freeze the values"


def test_what_a_checkpoint_lacks_is_a_sentence(saved, base, caplog):  # covers L10
    trainer, checkpoint = saved
    load = trainer._load_from_checkpoint

    def refused(text):
        before = held(trainer.model)
        with pytest.raises(CheckpointError, match=text):
            load(str(checkpoint))
        assert all(torch.equal(value, before[name]) for name, value in held(trainer.model).items())

    def hidden(name):
        return moved(checkpoint / name)

    with hidden("value/head.safetensors"):
        refused(r"value: head.safetensors is missing")
    with hidden("value/adapter_model.safetensors"):
        refused(r"the trained adapter 'value' is not in it \(value.adapter_model.safetensors is missing\)")
    with hidden("adapter_model.safetensors"):
        refused("the trained adapter 'default' is not in it")
    with hidden("value/head.safetensors"):
        save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, checkpoint / "value" / "head.safetensors")
        refused(r"bias \[1\], weight \[1, 7\], but a head of this model is weight \[1, 32\]")
    with hidden("ref/adapter_model.safetensors"):
        (checkpoint / "ref" / "adapter_model.safetensors").write_bytes(b"torn")
        refused("ref/adapter_model.safetensors cannot be read")
    with hidden("reward/adapter_model.safetensors"):
        kept = {n: v for n, v in held(trainer.model).items() if ".reward." in n}
        shake(trainer.model, 9, "default", "value")
        with caplog.at_level(logging.WARNING, "vlm_grpo"):
            load(str(checkpoint))
        assert "holds no adapter 'reward': the frozen one stays as this run has loaded it" in caplog.text
        assert all(torch.equal(v, kept[n]) for n, v in held(trainer.model).items() if n in kept and "heads" not in n)


def test_a_checkpoint_of_other_adapters_is_a_sentence(saved, base, tmp_path, caplog):
    _, checkpoint = saved
    model, processor = adapted(base, projector="full")
    trainer = sft(model, processor, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds a trained adapter 'value', which this run has not"):
        trainer._load_from_checkpoint(str(checkpoint))
    shutil.rmtree(checkpoint / "value")
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        trainer._load_from_checkpoint(str(checkpoint))
    assert "holds an adapter 'reward', which this run has not: it is left out" in caplog.text
    assert torch.equal(
        load_file(checkpoint / "adapter_model.safetensors")[
            (name := "base_model.model.model.visual.merger.mlp.0.bias")
        ],
        dict(model.named_parameters())[name.replace("merger.", "merger.modules_to_save.default.")],
    )
    wide, processor = load_model(base, backend="hf", lora=LoraOptions(r=8, alpha=8, vision=True), projector="full")
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \[4, .*\], but \[8, .*lora options"):
        sft(wide, processor, tmp_path / "wide")._load_from_checkpoint(str(checkpoint))
    add_head(model, "default")
    with pytest.raises(CheckpointError, match="head.safetensors is missing"):
        trainer._load_from_checkpoint(str(checkpoint))


def test_a_whole_model_with_a_head_comes_back(base, tmp_path):  # covers L10
    model, processor = load_model(base, backend="hf", dtype="float32")
    head = add_head(model, "default")
    trainer = sft(model, processor, tmp_path / "run")
    trainer.create_optimizer_and_scheduler(1)
    trainer._save_checkpoint(model, None)
    checkpoint = tmp_path / "run" / "checkpoint-0"
    assert not any("scalar_heads" in name for name in load_file(checkpoint / "model.safetensors"))
    expected = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    trainer._load_from_checkpoint(str(checkpoint))
    assert head is head_of(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


class moved:
    """A file that is not there for a while."""

    def __init__(self, file):
        self.file, self.aside = file, file.with_suffix(".aside")

    def __enter__(self):
        self.file.rename(self.aside)

    def __exit__(self, *error):
        self.aside.replace(self.file)
