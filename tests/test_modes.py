"""A model stands exactly as before after it has answered, also where answering failed; Unsloth's and others."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from real_unsloth import run_script

from vlm_grpo.errors import UnsupportedError
from vlm_grpo.models.modes import inference_mode, pinned_forward, restored, without_checkpointing
from vlm_grpo.patches import unsloth_modes


def flags(model) -> dict:
    """What a mode may change."""
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    found = {n: {k: vars(m)[k] for k in names if k in vars(m)} for n, m in model.named_modules()}
    return {**found, "use_cache": model.config.use_cache, "generation": dict(vars(model.generation_config))}


@pytest.fixture
def model():
    model, _ = tiny.build("qwen2_5_vl")
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    model.model.visual.eval()  # a part that is not as the rest
    return model


def test_a_model_stands_as_before_after_it_has_answered(model):
    before = flags(model)
    for end in (None, KeyboardInterrupt):
        try:
            with inference_mode(model):
                assert not model.training and not model.is_gradient_checkpointing
                model.gradient_checkpointing_enable({"use_reentrant": False})  # as TRL does when it is done
                model.train()
                model.config.use_cache = True
                model.generation_config.cache_implementation = "static"
                model.generation_config.new_field = 1
                if end is not None:
                    raise end
        except KeyboardInterrupt:
            pass
        assert flags(model) == before


def test_a_rollout_keeps_the_dropout_that_a_trainer_has(model):
    with inference_mode(model, keep_dropout=True):
        assert model.training and not model.model.visual.training
    with without_checkpointing(model):
        assert model.training and not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing


def test_configs_given_to_generate_are_put_back(model):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=3)
    before = dict(vars(config))
    with restored(model, config):
        config.cache_implementation = "static"
    assert vars(config) == before


# covers U5
def test_unsloths_switches_are_pinned_and_then_as_the_user_set_them(model, monkeypatch):
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "1")
    monkeypatch.delenv("UNSLOTH_RETURN_LOGITS", raising=False)
    with pinned_forward(model):
        assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "1"  # without Unsloth nothing reads it
    monkeypatch.setattr(unsloth_modes, "is_loaded", lambda: True)
    with pytest.raises(ZeroDivisionError), pinned_forward(model):
        assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "0" and os.environ["UNSLOTH_RETURN_LOGITS"] == "1"
        os.environ["UNSLOTH_OF_A_LATER_RELEASE"] = "1"
        raise ZeroDivisionError
    assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "1" and "UNSLOTH_RETURN_LOGITS" not in os.environ
    assert "UNSLOTH_OF_A_LATER_RELEASE" not in os.environ


# covers U5
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_that_are_hidden_states_are_an_error(family, monkeypatch):
    monkeypatch.setattr(unsloth_modes, "is_loaded", lambda: True)
    model, processor = tiny.build(family)
    row = tiny.prompt()
    row[0]["content"][0]["image"] = tiny.image()
    inputs = processor.apply_chat_template([row], tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad(), pinned_forward(model):
        size = model(**inputs).logits.shape[-1]
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden  # as with UNSLOTH_RETURN_HIDDEN_STATES=1
    says = rf"have \d+ values a token, and its vocabulary has {size}: they are hidden states"
    with torch.no_grad(), pytest.raises(UnsupportedError, match=says), pinned_forward(model):
        model(**inputs)
    assert not model._forward_hooks


def test_who_listens_to_generate_goes_on_listening_to_transformers_own():
    heard = []

    def listener():
        heard.append(1)
        return listener.generate()

    listener.generate = lambda: "Unsloth's"
    model = SimpleNamespace(_old_generate=lambda: "transformers'", generate=listener)
    with unsloth_modes.own_generate(model, nullcontext):
        assert model.generate() == "transformers'" and heard == [1]
    assert model.generate() == "Unsloth's" and heard == [1, 1]
    model.generate = lambda: "Unsloth's"
    with unsloth_modes.own_generate(model, nullcontext):
        assert model.generate() == "transformers'"
    assert model.generate() == "Unsloth's"


FAILS = """
import json, os
import recorder, tiny, torch
from datasets import Dataset
from test_exact import rows
from test_modes import flags
from vlm_grpo import LoraOptions, load_model
from vlm_grpo.evaluate import evaluate
from vlm_grpo.models.modes import inference_mode

model, processor = load_model(
    tiny.save("qwen2_5_vl", "model"), backend="unsloth", lora=LoraOptions(r=4, alpha=8, vision=True), dtype="float32",
    max_seq_length=512, gradient_checkpointing=True)
os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.1)

class Watching(recorder.Recorder):
    def _generate_shared(self, *args):
        layer = self.model.get_base_model().model.language_model.layers[0]
        self.modes.append((self.model.training, layer.training, layer.gradient_checkpointing))
        if self.sharing_off:
            return None  # the plain path: Unsloth's own generate
        return super()._generate_shared(*args)

untrained, modes, same, leaked, checkpointed = {}, {}, {}, {}, {}
data = Dataset.from_list(rows("mixed"))
for name, sharing_off in (("shared", False), ("plain", True)):
    Watching.sharing_off, Watching.modes = sharing_off, []
    seen = {}
    args = recorder.config("out", max_steps=1, gradient_checkpointing=True, learning_rate=1e-3)
    trainer = Watching(model, recorder.reward, args, data, None, processor)
    step = trainer.training_step
    def training_step(model, inputs, items):
        out = step(model, inputs, items)
        for n, p in model.named_parameters():
            if "lora_B" in n and p.grad is not None and p.grad.any():
                seen[n] = True
        layer = model.get_base_model().model.language_model.layers[0]
        checkpointed[name] = bool(layer.training and layer.gradient_checkpointing)
        return out
    trainer.training_step = training_step

    # an exception in the middle of generate
    base = model.get_base_model()
    head = base.get_output_embeddings()
    calls = []
    def stop(module, inputs):
        if len(inputs[0].shape) == 3 and not module.training:
            calls.append(1)
            if len(calls) > 2:
                raise KeyboardInterrupt
    handle = head.register_forward_pre_hook(stop)
    model.train()
    before = flags(base)
    try:
        encodings = [row.encoding for row in trainer._encoded_rows(list(data))]
        trainer._generate_single_turn([list(e.input_ids) for e in encodings], None, {"encodings": encodings}, 2)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    handle.remove()
    same[name] = stopped and flags(base) == before
    leaked[name] = trainer.generation_config.cache_implementation
    trainer.train()
    untrained[name] = [n for n, _ in model.named_parameters() if "lora_B" in n and n not in seen]
    modes[name] = sorted(set(Watching.modes))
base.train()
before = flags(base)
with inference_mode(model):
    inside = [base.training, base.is_gradient_checkpointing]
evaluate(model, processor, [{**row, "answer": "x"} for row in rows("mixed")], max_new_tokens=3)
after = flags(base) == before
print(json.dumps({
    "untrained": untrained, "modes": modes, "same": same, "leaked": leaked, "checkpointed": checkpointed,
    "inside": inside, "after": after, "variable": os.environ["UNSLOTH_RETURN_HIDDEN_STATES"],
    "marks": [n for n, m in base.named_modules() if "_flag_for_generation" in vars(m)],
}))
"""


@pytest.mark.slow
def test_training_goes_on_after_unsloths_generate_has_failed(tmp_path):
    # covers U2 U5
    seen = run_script(FAILS, tmp_path)
    assert seen["untrained"] == {"shared": [], "plain": []}
    assert seen["checkpointed"] == {"shared": True, "plain": True}
    assert seen["same"] == {"shared": True, "plain": True} and seen["leaked"] == {"shared": None, "plain": None}
    assert seen["modes"] == {"shared": [[False, False, False]], "plain": [[False, False, False]]}
    assert seen["inside"] == [False, False] and seen["after"]
    assert seen["variable"] == "1" and seen["marks"] == []  # the user's own stays
