"""What a token may read: through a state or a convolution with padding in front, and in a prompt read both ways."""

import re
import sys
from typing import Any

import pytest
import reference
import tiny
import torch
from torch import Tensor, nn

from vlm_grpo import LoraOptions
from vlm_grpo.collate import collate, model_inputs, pack_rollout, unpack_rollout
from vlm_grpo.data import to_sample
from vlm_grpo.encode import EncodedPrompt, encode
from vlm_grpo.models.families import family_of, lora_targets

HYBRID = ("qwen3_5", "lfm2_vl")
COMPLETION = [40, 50, 60, 70]


def encoded_rows(processor: Any, case: str = "sizes") -> list[EncodedPrompt]:
    """Prompts of different lengths."""
    rows = [encode(processor, to_sample(row)) for row in tiny.rows(f"image {case}", ("image",))]
    assert len({len(row.input_ids) for row in rows}) > 1
    return rows


def batch_logps(model: Any, encodings: list[EncodedPrompt], pad: int, completion: list[int]) -> Tensor:
    """(B, T) log-probabilities of one completion after every prompt, prompts padded on the left."""
    inputs = model_inputs(encodings, pad)
    tail = torch.tensor([completion]).expand(len(encodings), -1)
    ids = torch.cat([inputs["input_ids"], tail], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tail)], 1)
    extras = collate(encodings, ids.size(1), [len(completion)] * len(encodings))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **extras, use_cache=False).logits
    logits = logits[:, -len(completion) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tail[..., None])[..., 0]


# ---- states and convolutions -----------------------------------------------------------------------------------------


# covers U1
@pytest.mark.parametrize("family", HYBRID)
def test_padding_never_enters_a_state(family, monkeypatch):
    model, processor = tiny.build(family)
    rows, pad = encoded_rows(processor), processor.tokenizer.pad_token_id
    alone = torch.cat([batch_logps(model, [row], pad, COMPLETION) for row in rows])
    assert torch.allclose(batch_logps(model, rows, pad, COMPLETION), alone, atol=1e-5, rtol=0)
    # The equality above is the mask's work, not that of layers which forget.
    module = sys.modules[type(model.model.language_model).__module__]
    monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda hidden, mask: hidden)
    assert (batch_logps(model, rows, pad, COMPLETION) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("family", HYBRID)
def test_what_the_first_token_was_reaches_the_last_one_through_such_layers_alone(family):
    """Their weights would not be trained, nor the tests above see them, were they to forget at once."""
    model, processor = tiny.build(family, layers=4)
    for layer in model.model.language_model.layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))
    ids = torch.arange(30, 38)[None]
    other = ids.clone()
    other[0, 4] = 99
    with torch.no_grad():
        found = [model(input_ids=row, use_cache=False).logits[0, -1] for row in (ids, other)]
    assert (found[0] - found[1]).abs().max() > 1e-2


# covers U2 U10
@pytest.mark.parametrize("family", HYBRID)
def test_lora_reaches_every_linear_layer_of_every_block(family):
    model, _ = tiny.build(family)
    regex = lora_targets(family_of(model.config), model, LoraOptions())
    blocks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".language_model.layers." in name
    }
    assert {name for name in blocks if not re.fullmatch(regex, name)} == set()
    assert len({name.split(".layers.")[1].split(".")[1] for name in blocks}) == 3, "both mixers and the feed-forward"


# ---- prompts read both ways ------------------------------------------------------------------------------------------


# covers U1
def test_what_follows_a_prompt_has_the_type_that_the_processor_gives_an_answer():
    _, processor = tiny.build("paligemma")
    row = tiny.rows("image one", ("image",))[0]
    sample = to_sample(row)
    prompt = encode(processor, sample)
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    own = processor(text=text, images=[row["images"]], suffix="red green blue", return_tensors="pt")
    answer = own["input_ids"].size(1) - len(prompt.input_ids)
    assert answer == 4, "three words and the end"
    types = collate([prompt], extra=[answer])["token_type_ids"]
    assert types.tolist() == own["token_type_ids"].tolist() == [[0] * len(prompt.input_ids) + [1] * answer]
    assert "labels" not in prompt.tokens | prompt.media, "the trainer has its own"
    stored = pack_rollout([{"encodings": [prompt]}])
    assert unpack_rollout(stored, "cpu")[0]["encodings"][0].after == {"token_type_ids": 1}


@pytest.mark.parametrize("family", [family for family in tiny.KINDS if "image" in tiny.KINDS[family]])
def test_no_token_of_an_answer_reads_a_later_one(family):
    model, processor = tiny.build(family)
    row = encode(processor, to_sample(tiny.rows("image one", ("image",))[0]))
    pad = processor.tokenizer.pad_token_id
    first = batch_logps(model, [row], pad, COMPLETION)
    other = batch_logps(model, [row], pad, [*COMPLETION[:-1], 71])
    assert torch.equal(first[:, :-1], other[:, :-1])
    assert bool(row.after) == (family == "paligemma")


def test_a_prompt_reads_itself_in_both_directions_and_an_answer_does_not_change_it():
    model, processor = tiny.build("paligemma")
    row = encode(processor, to_sample(tiny.rows("image one", ("image",))[0]))
    other = EncodedPrompt([*row.input_ids[:-1], 99], row.tokens, row.media, after=row.after)

    def hidden(encoded: EncodedPrompt, completion: list[int]) -> Tensor:
        ids = torch.tensor([[*encoded.input_ids, *completion]])
        inputs = collate([encoded], extra=[len(completion)])
        with torch.no_grad():
            return model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).last_hidden_state[0]

    length = len(row.input_ids)
    assert (hidden(row, [])[0] - hidden(other, [])[0]).abs().max() > 1e-3, "the first token sees the last"
    assert torch.allclose(hidden(row, [])[:length], hidden(row, COMPLETION)[:length], atol=1e-5)


# covers U1
@pytest.mark.parametrize("family", ["paligemma", *HYBRID])
def test_generation_sees_what_training_sees(family):
    """The distribution that each sampled token was drawn from, prompts of other lengths beside it, is the trained."""
    model, processor = tiny.build(family)
    rows, pad = encoded_rows(processor, "counts"), processor.tokenizer.pad_token_id
    inputs = model_inputs(rows, pad)
    options = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    drawn = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    answers = drawn.sequences[:, inputs["input_ids"].size(1) :]
    sampled = torch.stack(drawn.logits, 1).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    for row, answer, found in zip(rows, answers.tolist(), sampled, strict=True):
        trained = batch_logps(model, [row], pad, answer)[0]
        assert torch.allclose(found, trained, atol=1e-5, rtol=0)


# covers U1 A1
def test_a_reference_that_knows_no_types_agrees():
    """The mask written out: True where a query (rows) reads a key (columns)."""
    model, processor = tiny.build("paligemma")
    row = tiny.rows("image one", ("image",))[0]
    encoded = reference.encode(processor, row)
    length, total = encoded["input_ids"].size(1), encoded["input_ids"].size(1) + len(COMPLETION)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[:length, :length] = True
    ids = torch.cat([encoded["input_ids"], torch.tensor([COMPLETION])], 1)
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=mask[None, None], pixel_values=encoded["pixel_values"], use_cache=False
        ).logits[0, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(COMPLETION)[:, None])[:, 0]
    ours = batch_logps(model, [encode(processor, to_sample(row))], processor.tokenizer.pad_token_id, COMPLETION)[0]
    assert torch.allclose(ours, expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(reference.logps(model, encoded, COMPLETION), expected, atol=1e-6)
