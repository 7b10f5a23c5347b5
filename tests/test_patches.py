"""The ledger as a whole, then each patch; Unsloth's on functions that behave as its releases did, and on the real."""

import dataclasses
import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import reference
import test_exact
import tiny
import torch
from peft import LoraConfig, get_peft_model
from real_unsloth import REPLACE_TRL, run_script
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from vlm_grpo.errors import UnsupportedError
from vlm_grpo.patches import bitsandbytes as bnb_patch
from vlm_grpo.patches import ledger
from vlm_grpo.patches import transformers as transformers_patch
from vlm_grpo.patches import trl as trl_patch
from vlm_grpo.patches import unsloth as patch_file
from vlm_grpo.patches import unsloth_hooks as hooks
from vlm_grpo.patches.unsloth import apply_unsloth_patch, undo_unsloth_patch, unsloth_patch

README = Path(ledger.__file__).parent / "README.md"
RECORDS = ledger.patches()


# ---- the ledger ------------------------------------------------------------------------------------------------------


def test_the_table_in_the_readme_is_the_ledger():
    assert ledger.table() in README.read_text(encoding="utf-8"), "python -m vlm_grpo.patches.ledger prints the table"
    names = [patch.name for _, patch in RECORDS]
    assert len(set(names)) == len(names) >= 3
    files = {path.name for path in README.parent.glob("[!_]*.py")} - {"ledger.py"}
    without = {file for file in files if f"`{file}` holds no patch" in README.read_text(encoding="utf-8")}
    assert {file for file, _ in RECORDS} == files - without


@pytest.mark.parametrize("patch", [patch for _, patch in RECORDS], ids=lambda patch: patch.name)
def test_a_record_is_complete_and_its_patch_heals_what_its_probe_finds(patch):
    assert all(len(text) > 10 for text in (patch.name, patch.why, patch.reference, patch.remove_when))
    assert "\n" not in patch.why + patch.reference + patch.remove_when
    now = patch.probe()
    patch.undo()
    if patch.probe() is None:
        pytest.skip("cannot be tried on this machine")
    if not patch.probe():
        pytest.skip("the installed library does not show the fault here")
    try:
        assert patch.ensure() is True and patch.probe() is False
        assert patch.ensure() is False  # healed: nothing to do
        patch.apply()
        assert patch.probe() is False
        patch.undo()
        assert patch.probe() is True  # once is enough, also after two calls of apply
        patch.undo()
        assert patch.probe() is True
    finally:
        if now is False:
            patch.apply()


def generated(base: type) -> type:
    """As Unsloth's: of the same name and module, written elsewhere, and not derived from the one it replaces."""
    return type(base.__name__, (object,), {"__module__": base.__module__, "train": lambda self: None})


# covers U5
@pytest.mark.parametrize("name", ["trl-own-classes", "transformers-own-steps"])
def test_a_replaced_class_is_found_and_its_own_taken(name, monkeypatch):
    import transformers.trainer
    import trl.trainer.grpo_trainer as trl_file

    patch = next(patch for _, patch in RECORDS if patch.name == name)
    patch.undo()
    assert patch.state() == "not needed"
    if name == "trl-own-classes":
        own = trl_file.GRPOTrainer
        monkeypatch.setattr(trl_file, "GRPOTrainer", generated(own))
    else:
        own = transformers.trainer.Trainer
        monkeypatch.setattr(own, "training_step", lambda self, *args: None)
    try:
        assert patch.state() == "needed"
        assert patch.ensure() and not patch.ensure() and patch.state() == "applied"
        found = trl_patch.own_grpo_trainer() if name == "trl-own-classes" else None
        if found is None:
            step = transformers_patch.own_trainer(lambda: None).training_step.__wrapped__
            assert step is not own.training_step and "loss" in step.__code__.co_varnames
        else:
            assert found is not trl_file.GRPOTrainer and hasattr(found, "_compute_loss")
    finally:
        patch.undo()
    assert patch.state() == "needed"


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def test_the_packing_flag_is_restored_by_undo():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    patch = bnb_patch.CPU_PACKING
    patch.undo()
    before = bitsandbytes.nn.Linear4bit(64, 64)
    own = before.support_avx512bf16_for_cpu
    try:
        patch.apply()
        during = bitsandbytes.nn.Linear4bit(64, 64)
        assert before.support_avx512bf16_for_cpu is False and during.support_avx512bf16_for_cpu is False
    finally:
        patch.undo()
    assert before.support_avx512bf16_for_cpu == during.support_avx512bf16_for_cpu == own
    patch.ensure()


def test_the_packing_patch_raises_when_its_target_is_gone(monkeypatch):
    monkeypatch.setattr(bnb_patch, "_linear4bit", lambda: nn.Linear)
    with pytest.raises(RuntimeError, match="has no support_avx512bf16_for_cpu any more"):
        bnb_patch.CPU_PACKING.apply()


# ---- Unsloth: functions that behave as its releases did --------------------------------------------------------------


def _function(knows: tuple[str, ...], every_tower: bool, containers: bool = False):
    """A stand-in for ``requires_grad_for_gradient_checkpointing``: which outputs and towers it knows."""

    def requires_grad_for_gradient_checkpointing(model):
        def requires_grad_post_hook(module, inputs, output):
            target = output if isinstance(output, torch.Tensor) else None
            for name in knows:
                target = target if target is not None else getattr(output, name, None)
            if target is None and containers:
                target = next(iter(output.values() if isinstance(output, dict) else output))
            if target is None:
                raise RuntimeError("Failed to make output require gradients")
            target.requires_grad_(True)

        for module in model.modules():  # as the releases do: hooks from an earlier call go by their name
            kept = [h for h in module._forward_hooks.values() if "requires_grad_post_hook" not in h.__qualname__]
            module._forward_hooks.clear()
            for hook in kept:
                module.register_forward_hook(hook)
        children = [c for c in model.children() if any(p.requires_grad for p in c.parameters())]
        for child in children if every_tower else children[:1]:
            getattr(child, "embed", child).register_forward_hook(requires_grad_post_hook)

    return requires_grad_for_gradient_checkpointing


_ALL = ("loss", "logits", "log_probs", "last_hidden_state")
RELEASES = {
    "zoo 2025.6.2": (_function(("loss",), False), True),
    "zoo 2025.6.3": (_function(("loss", "logits"), False), True),
    "zoo 2026.6.1": (_function(("loss", "logits", "last_hidden_state"), True), True),
    "a release without the fault": (_function(_ALL, True, True), False),
}


@pytest.fixture
def install(monkeypatch):
    """``install(function)`` puts modules in place that hold it as Unsloth's do."""

    def put(function):
        zoo, vision = ModuleType("unsloth_zoo.peft_utils"), ModuleType("unsloth.models.vision")
        for module in (zoo, vision):
            module.requires_grad_for_gradient_checkpointing = function  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return zoo, vision

    yield put
    undo_unsloth_patch()


class Tower(nn.Module):
    """A frozen embedding, two frozen layers with a trained adapter each, reentrant checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4).requires_grad_(False)
        self.layers = nn.ModuleList([nn.ModuleDict({"base": nn.Linear(4, 4), "lora": nn.Linear(4, 4)}) for _ in "ab"])
        for layer in self.layers:
            layer["base"].requires_grad_(False)  # pyright: ignore[reportIndexIssue]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = checkpoint(lambda x, layer=layer: layer["base"](x) + layer["lora"](x), hidden, use_reentrant=True)
        return hidden


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = Tower(), Tower()

    def forward(self, ids):
        return CausalLMOutput(logits=self.vision(ids) * self.language(ids))  # pyright: ignore[reportArgumentType]


def trained_adapters(function) -> int:
    torch.manual_seed(0)
    model = TwoTowers()
    function(model)
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    return sum(p.grad is not None and bool(p.grad.abs().sum()) for n, p in model.named_parameters() if "lora.w" in n)


# covers U3, U4
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("function", "needed"), RELEASES.values(), ids=list(RELEASES))
def test_unsloth_patch_is_applied_where_the_behaviour_needs_it(function, needed, install):
    zoo, vision = install(function)
    report = apply_unsloth_patch()
    assert (report.applied, report.needed) == (needed, needed)
    assert trained_adapters(zoo.requires_grad_for_gradient_checkpointing) == 4
    if not needed:
        assert zoo.requires_grad_for_gradient_checkpointing is function
        assert str(report).startswith("Unsloth patch: not applied, because every adapter gets its gradient")
        return
    wrapped = zoo.requires_grad_for_gradient_checkpointing
    assert wrapped is vision.requires_grad_for_gradient_checkpointing is not function
    assert wrapped.__qualname__ == function.__qualname__
    places = ("unsloth.models.vision", "unsloth_zoo.peft_utils")
    assert report.patched == tuple(f"{place}.requires_grad_for_gradient_checkpointing" for place in places)

    again = apply_unsloth_patch()
    assert zoo.requires_grad_for_gradient_checkpointing is wrapped
    assert (again.applied, again.patched, again.reason) == (True, report.patched, "it is already in place")
    undo_unsloth_patch()
    undo_unsloth_patch()
    assert zoo.requires_grad_for_gradient_checkpointing is vision.requires_grad_for_gradient_checkpointing is function


# covers U4
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_without_the_patch_adapters_of_the_second_tower_stay_untrained(install):
    function, _ = RELEASES["zoo 2025.6.3"]
    assert trained_adapters(function) == 2  # the fault, silent
    install(function)
    report = apply_unsloth_patch()
    assert "2 of 6 adapters under checkpointing get a gradient" in report.reason
    first, tried, rebound, installed = str(report).splitlines()
    assert first == f"Unsloth patch: applied, because {report.reason}."
    assert "a tuple: fails" in tried and "adapters with a gradient under checkpointing: 2 of 6" in tried
    assert rebound.count("requires_grad_for_gradient_checkpointing") == 2 and "torch 2" in installed


@pytest.mark.parametrize(
    "output",
    [
        CausalLMOutput(logits=torch.zeros(1, 2)),  # pyright: ignore[reportArgumentType]
        BaseModelOutput(last_hidden_state=torch.zeros(1, 2)),  # pyright: ignore[reportArgumentType]
        (torch.zeros(1, dtype=torch.long), torch.zeros(1, 2)),
        {"ids": torch.zeros(1, dtype=torch.long), "logits": torch.zeros(1, 2)},
        torch.zeros(1, 2),
    ],
    ids=["logits", "last_hidden_state", "tuple", "dict", "tensor"],
)
def test_patched_hook_marks_the_float_output_of_any_forward(install, output):
    zoo, _ = install(RELEASES["zoo 2025.6.2"][0])
    apply_unsloth_patch()
    inner = nn.Linear(2, 2)
    inner.forward = lambda: output  # pyright: ignore[reportAttributeAccessIssue]
    zoo.requires_grad_for_gradient_checkpointing(nn.Sequential(inner))
    tensors = [output] if isinstance(output, torch.Tensor) else list(getattr(output, "values", lambda: output)())
    for tensor in tensors:
        tensor.requires_grad_(False)
    with torch.no_grad():
        inner()
    assert not any(tensor.requires_grad for tensor in tensors)  # a rollout records nothing
    inner()
    assert [tensor.requires_grad for tensor in tensors] == [tensor.is_floating_point() for tensor in tensors]


def test_patched_hook_still_raises_where_there_is_nothing_to_mark(install):
    zoo, _ = install(RELEASES["zoo 2025.6.2"][0])
    apply_unsloth_patch()
    inner = nn.Linear(2, 2)
    inner.forward = lambda: ("no", "tensor")  # pyright: ignore[reportAttributeAccessIssue]
    zoo.requires_grad_for_gradient_checkpointing(nn.Sequential(inner))
    with pytest.raises(RuntimeError, match="Failed to make output require gradients"):
        inner()


def test_hooking_a_model_twice_leaves_one_hook(install):
    zoo, _ = install(RELEASES["zoo 2026.6.1"][0])
    apply_unsloth_patch()
    model = TwoTowers()
    for _ in range(3):
        zoo.requires_grad_for_gradient_checkpointing(model)
    assert [len(m._forward_hooks) for m in model.modules() if m._forward_hooks] == [1, 1]
    frozen = TwoTowers()
    frozen.vision.requires_grad_(False)
    zoo.requires_grad_for_gradient_checkpointing(frozen)
    assert not frozen.vision.embed._forward_hooks  # a frozen tower needs no backward pass through it


def test_unsloth_patch_from_many_threads_wraps_once(install):
    zoo, _ = install(RELEASES["zoo 2025.6.2"][0])
    threads = [threading.Thread(target=apply_unsloth_patch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    undo_unsloth_patch()
    assert zoo.requires_grad_for_gradient_checkpointing is RELEASES["zoo 2025.6.2"][0]


def test_unsloth_patch_reaches_modules_that_are_imported_later(install, monkeypatch):
    function, _ = RELEASES["zoo 2025.6.2"]
    zoo, _ = install(function)
    apply_unsloth_patch()
    late = SimpleNamespace(__name__="unsloth.late", requires_grad_for_gradient_checkpointing=function)
    monkeypatch.setitem(sys.modules, "unsloth.late", late)
    assert "unsloth.late.requires_grad_for_gradient_checkpointing" in apply_unsloth_patch().patched
    assert late.requires_grad_for_gradient_checkpointing is zoo.requires_grad_for_gradient_checkpointing


def test_unsloth_patch_raises_when_its_target_is_gone(install):
    zoo, _ = install(RELEASES["zoo 2025.6.2"][0])
    del zoo.requires_grad_for_gradient_checkpointing
    with pytest.raises(UnsupportedError, match="has no requires_grad_for_gradient_checkpointing any more"):
        apply_unsloth_patch()


def hooks_of(model) -> list:
    return [hook for m in model.modules() for hook in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]]


# covers U3, U4
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_hooked_before_the_patch_is_hooked_on_request_and_as_before_after_undo(install):
    function, _ = RELEASES["zoo 2025.6.3"]
    install(function)
    model = TwoTowers()
    function(model)
    own = hooks_of(model)
    with unsloth_patch(model) as report:
        assert report.applied and report.hooks == 2  # the one that was there, mended, and the other tower's
        assert "hooks set or mended on the model: 2" in str(report)
        model(torch.tensor([[1, 2]])).logits.sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora.w" in n)
        assert apply_unsloth_patch(model).hooks == 0  # once is enough
    assert hooks_of(model) == own and len(own) == 1
    with pytest.raises(ZeroDivisionError), unsloth_patch():
        raise ZeroDivisionError
    assert not hasattr(sys.modules["unsloth.models.vision"].requires_grad_for_gradient_checkpointing, hooks.ORIGINAL)


def test_the_context_manager_leaves_in_place_what_was(install):
    zoo, _ = install(RELEASES["zoo 2025.6.2"][0])
    apply_unsloth_patch()
    with unsloth_patch() as report:
        assert report.reason == "it is already in place" and report.probed["logits without a loss"] == "fails"
    assert hasattr(zoo.requires_grad_for_gradient_checkpointing, hooks.ORIGINAL)


def test_hooks_hold_no_model(install):
    import gc
    import weakref

    zoo, _ = install(RELEASES["zoo 2025.6.3"][0])
    apply_unsloth_patch()
    model = TwoTowers()
    zoo.requires_grad_for_gradient_checkpointing(model)
    holder = weakref.ref(model)
    del model
    gc.collect()
    assert holder() is None
    undo_unsloth_patch()  # and there is nothing to trip over


@pytest.mark.parametrize("state", ["needed", "not needed", "applied", "cannot be tried here"])
def test_a_record_says_how_things_stand(state):
    found = {"needed": True, "not needed": False, "applied": True, "cannot be tried here": None}[state]
    record = dataclasses.replace(RECORDS[0][1], probe=lambda: found, in_place=lambda: state == "applied")
    assert record.state() == state


def test_records_say_so_where_their_library_does_not_work(monkeypatch):
    def broken(name, *rest):
        raise RuntimeError("no library for this machine")

    monkeypatch.setattr(bnb_patch.importlib, "import_module", broken)
    assert bnb_patch.CPU_PACKING.state() == "cannot be tried here"
    bnb_patch.CPU_PACKING.undo()


# Layers by their names, in towers for vision and sound as well: a patch embedding's own projection too.
_LAYERS = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|qkv|proj|up_proj|down_proj|linear_1|ffw_layer_1)"


def reached(model, processor, kinds) -> set[str]:
    """The adapters that get a gradient from one prompt of each kind."""
    model.zero_grad()
    for kind in kinds:
        logits = model(**reference.encode(processor, test_exact.row("count one", (kind, 0, 0)))).logits
        weights = torch.sin(torch.arange(logits.numel()).float()).reshape(logits.shape)
        if logits.requires_grad:
            (logits * weights).sum().backward()
    return {n for n, p in model.named_parameters() if "lora_" in n and p.grad is not None and p.grad.any()}


# covers U4
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("family", tiny.KINDS)
def test_under_checkpointing_hooks_reach_every_adapter_of_every_tower(family):
    model, processor = tiny.build(family)
    config = LoraConfig(r=2, target_modules=_LAYERS, exclude_modules=r".*\.experts\..*")
    model = get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = reached(model, processor, tiny.KINDS[family])
    assert len(expected) >= 20
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for module in model.modules():  # transformers' own hooks for this, which Unsloth removes
        for key, hook in list(module._forward_hooks.items()):
            if "make_inputs_require_grads" in hook.__qualname__:
                del module._forward_hooks[key]
    others = hooks_of(model)
    hooks.hook_model(model)
    assert reached(model, processor, tiny.KINDS[family]) == expected
    hooks.unhook_models()
    assert hooks_of(model) == others


# ---- Unsloth: this machine -------------------------------------------------------------------------------------------


# covers U3
def test_without_unsloth_the_report_says_so(monkeypatch):
    real = importlib.util.find_spec
    absent = lambda name, *rest: None if name.startswith("unsloth") else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    report = apply_unsloth_patch()
    assert (report.applied, report.needed, report.patched) == (False, False, ())
    assert str(report).startswith("Unsloth patch: not applied, because Unsloth is not installed")


# covers U3
def test_without_a_gpu_nothing_is_imported_or_changed(monkeypatch):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("UNSLOTH_ALLOW_CPU", raising=False)
    modules, environment = set(sys.modules), dict(os.environ)
    report = apply_unsloth_patch()
    assert str(report).startswith("Unsloth patch: not applied, because there is no CUDA device, which Unsloth needs.")
    assert set(sys.modules) == modules and dict(os.environ) == environment
    undo_unsloth_patch()


def test_an_unsloth_that_cannot_be_imported_is_reported(monkeypatch):
    monkeypatch.setattr(patch_file, "why_not_unsloth", lambda: "")
    for error in (NotImplementedError("no accelerator\nsecond line"), ImportError("no triton"), RuntimeError("odd")):

        def fails(name, error=error):
            raise error

        monkeypatch.setattr(patch_file.importlib, "import_module", fails)
        assert apply_unsloth_patch().reason == f"Unsloth cannot be imported here ({str(error).splitlines()[0]})"


# ---- Unsloth: the real one, in processes of its own ------------------------------------------------------------------

LOADS = """
    import json
    import torch
    from vlm_grpo import LoraOptions, apply_unsloth_patch, load_model, undo_unsloth_patch, unsloth_patch
    from vlm_grpo.patches.unsloth import ADAPTER_GRADIENTS

    states = [ADAPTER_GRADIENTS.state()]
    with unsloth_patch() as report:
        states.append(ADAPTER_GRADIENTS.state())
    states.append(ADAPTER_GRADIENTS.state())

    import tiny
    from vlm_grpo.models.families import family_of, is_target, lora_targets

    def step(model, processor):
        row = tiny.prompt()
        row[0]["content"][0]["image"] = tiny.image()
        inputs = processor.apply_chat_template([row], tokenize=True, return_dict=True, return_tensors="pt")
        logits = model.train()(**inputs).logits
        logits.float().log_softmax(-1)[0, -1, 7].backward()
        named = [(n, p) for n, p in model.named_parameters() if "lora_B" in n]
        return [n for n, p in named if p.grad is None or not p.grad.abs().sum()], logits.detach()

    lora = LoraOptions(r=2, alpha=4, vision=True)
    options = dict(backend="unsloth", dtype="float32", gradient_checkpointing=True)
    torch.manual_seed(11)
    model, processor = load_model(tiny.save("qwen2_5_vl", "model"), lora=lora, max_seq_length=512, **options)
    base = model.get_base_model()
    targets = lora_targets(family_of(model.config), base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    untrained, logits = step(model, processor)
    model.save_pretrained("run")
    processor.save_pretrained("run")
    again, again_processor = load_model("run", **options)
    untrained_again, logits_again = step(again, again_processor)

    undo_unsloth_patch()
    hooked_late = apply_unsloth_patch(again).hooks
    again.zero_grad()
    untrained_late, _ = step(again, again_processor)
    print(json.dumps({
        "applied": report.applied, "needed": report.needed, "patched": report.patched, "states": states,
        "probed": report.probed, "text": str(report),
        "untrained": untrained, "untrained_again": untrained_again, "seed": torch.initial_seed(),
        "adapted": sorted(n for n, m in base.named_modules() if hasattr(m, "lora_A")),
        "chosen": sorted(n for n, _ in base.named_modules() if is_target(n, targets)),
        "reload": (logits - logits_again).abs().max().item(), "checkpointing": again.is_gradient_checkpointing,
        "scaling": next(m.scaling["default"] for m in base.modules() if hasattr(m, "lora_A")),
        "hooked_late": hooked_late, "untrained_late": untrained_late,
    }))
"""


# covers U2, U3, U4
@pytest.mark.slow
def test_the_real_unsloth_loads_trains_and_reloads_every_adapter(tmp_path):
    seen = run_script(LOADS, tmp_path, UNSLOTH_RETURN_LOGITS="1")
    assert seen["applied"] and seen["needed"] and len(seen["patched"]) == 2
    assert seen["states"] == ["needed", "applied", "needed"]
    assert seen["probed"]["logits without a loss"] == "fine" and seen["probed"]["a tuple"] == "fails"
    assert "unsloth_zoo 20" in seen["text"].splitlines()[-1]
    assert seen["adapted"] == seen["chosen"] and len(seen["adapted"]) == 2 * (4 + 3) + 2 * (2 + 3)
    assert seen["untrained"] == [] and seen["untrained_again"] == []
    assert seen["reload"] == 0 and seen["checkpointing"] and seen["scaling"] == 2.0
    assert seen["seed"] == 11  # the caller's seed survives
    assert seen["hooked_late"] >= 2 and seen["untrained_late"] == []  # adapters that were there before the patch


TRAINS = (
    REPLACE_TRL
    + """
import json
import trl
import recorder, tiny
from datasets import Dataset
from test_exact import differences, rows
from vlm_grpo import LoraOptions, VLMGRPOTrainer, load_model

lora = LoraOptions(r=4, alpha=8, vision=True)
model, processor = load_model(
    tiny.save("qwen2_5_vl", "model"), backend="unsloth", lora=lora, dtype="float32", max_seq_length=512,
    gradient_checkpointing=True)
data = rows("mixed")
trainer = recorder.Recorder(
    model, recorder.reward, recorder.config("out", max_steps=2, beta=0.1, gradient_checkpointing=True),
    Dataset.from_list(data), None, processor)
trainer.train()
base = trainer.model.get_base_model()
modes = {layer.training for name, layer in base.named_modules() if name.endswith(("layers.0", "blocks.0"))}
print(json.dumps({
    "replaced": trl.GRPOTrainer.__module__,
    "own": [cls.__module__ for cls in VLMGRPOTrainer.__mro__ if cls.__name__ == "GRPOTrainer"],
    "modes": sorted(modes),
    "difference": max(differences(trainer, processor, data)),
    "steps": trainer.state.global_step,
    "norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
    "kl": [log["kl"] for log in trainer.state.log_history if "kl" in log],
}))
"""
)


@pytest.mark.slow
def test_the_trainer_runs_on_the_real_unsloth(tmp_path):
    # covers U2 U5; Unsloth has replaced trl.GRPOTrainer, and its generate leaves a model in inference mode
    seen = run_script(TRAINS, tmp_path)
    assert "trl.trainer" not in seen["replaced"] and seen["own"][0].startswith("trl.trainer")
    assert seen["modes"] == [True], "layers in inference mode are not checkpointed"
    assert seen["difference"] <= 1e-4
    assert seen["steps"] == 2 and all(norm > 0 for norm in seen["norms"])
    assert seen["kl"][0] == pytest.approx(0, abs=1e-6)
