"""Prompts to tensors and back: one rule for all families, and what a row may not hold."""

import copy

import pytest
import reference
import tiny
import torch

from vlm_grpo.collate import collate, model_inputs, pack_rollout, unpack_rollout
from vlm_grpo.data import to_sample
from vlm_grpo.encode import EncodedPrompt, encode
from vlm_grpo.errors import EncodingError


def row(images: int = 1, text: str = "what is it") -> dict:
    return {"prompt": tiny.prompt(text, images), "images": [tiny.image(i, (56 + 28 * i, 56)) for i in range(images)]}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_one_prompt_is_what_the_processor_makes_of_it(family, images):
    _, processor = tiny.build(family)
    expected = reference.encode(processor, row(images))
    messages = encode(processor, to_sample(row(images)))
    text = processor.apply_chat_template(row(images)["prompt"], tokenize=False, add_generation_prompt=True)
    templated = encode(processor, to_sample({**row(images), "prompt": text}))
    for encoded in (messages, templated):
        assert encoded.input_ids == expected["input_ids"][0].tolist()
        found = {**encoded.tokens, **encoded.media}
        assert found.keys() == expected.keys() - {"input_ids", "attention_mask"}
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert bool(encoded.media) == bool(images)
        assert all(value.shape[:2] == (1, len(encoded.input_ids)) for value in encoded.tokens.values())
    assert copy.deepcopy(messages) is messages, "shared by the completions of a group"


def test_a_tokenizer_takes_text_only():
    _, processor = tiny.build("qwen2_5_vl")
    words = copy.deepcopy(processor.tokenizer)
    with pytest.raises(EncodingError, match="The processor refuses a row .*chat_template"):
        encode(words, to_sample(row(0)))
    words.chat_template = processor.chat_template
    assert encode(words, to_sample(row(0))).input_ids == encode(processor, to_sample(row(0))).input_ids
    with pytest.raises(EncodingError, match="The row has 1 image.s. but the processor returned none"):
        encode(words, to_sample(row(1)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_image_tokens_and_images_match_in_number(family):
    _, processor = tiny.build(family)
    token = processor.image_token
    for written in {token, processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)}:  # two in Gemma 3
        for images in (0, 1):
            with pytest.raises(EncodingError, match="A text of the prompt holds the image token"):
                encode(processor, to_sample(row(images, f"is {written} red")))
    for tokens, images in ((2, 1), (1, 2), (1, 0)):
        with pytest.raises(EncodingError, match=f"The prompt has {tokens} image token") as caught:
            encode(processor, to_sample({**row(images), "prompt": f"see {token * tokens}"}))
        assert "\n" not in str(caught.value)


def test_what_a_processor_or_template_refuses_is_one_sentence():
    _, processor = tiny.build("qwen2_5_vl")
    strip = {"prompt": tiny.prompt(), "images": [tiny.image(1, (1, 600))]}
    with pytest.raises(
        EncodingError, match="The processor refuses a row .*aspect ratio.* — row 9. Change or remove it"
    ):
        encode(processor, to_sample(strip, where="row 9"))
    for template in ("{{ raise_exception('roles must alternate') }}", "{{ unclosed"):
        with pytest.raises(EncodingError, match="The processor refuses a row"):
            encode(processor, to_sample(row(0)), chat_template=template)
    with pytest.raises(EncodingError, match="The prompt is empty after tokenization"):
        encode(processor, to_sample(row(0)), chat_template="{{ '' }}")


def prompt(length: int, media: int = 0, **tokens) -> EncodedPrompt:
    media_tensors = {"pixel_values": torch.full((media, 2, 2), float(length))} if media else {}
    return EncodedPrompt(list(range(length)), tokens, media_tensors)


def test_the_collate_rule_by_hand():
    types = torch.tensor([[0, 1, 1]])
    mask = torch.tensor([[[1, 2], [3, 4]]])  # over media: (1, L, N)
    long = EncodedPrompt(
        [7, 8, 9], {"mm_token_type_ids": types}, {"pixels": torch.ones(2, 3), "grid": torch.ones(1, 3)}
    )
    text = EncodedPrompt([5], {}, {})
    wide = EncodedPrompt([5, 6], {"cross_mask": mask}, {"pixels": torch.ones(1, 5)})
    out = collate([long, text, wide], width=6, extra=[1, 2, 3])
    assert out["mm_token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6, [0] * 6]
    assert out["pixels"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert out["grid"].shape == (1, 3)
    assert out["cross_mask"][2].tolist() == [[0, 0], [1, 2], [3, 4], [3, 4], [3, 4], [3, 4]], "the last view stays"
    assert not out["cross_mask"][:2].any()
    assert collate([text, text]) == {}
    inputs = model_inputs([long, text], pad_token_id=99)
    assert inputs["input_ids"].tolist() == [[7, 8, 9], [99, 99, 5]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["mm_token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_a_rollout_is_packed_and_unpacked_with_shared_encodings(tmp_path):
    one, two = prompt(3, 1, ids=torch.ones(1, 3)), prompt(2)
    batches = [
        {"encodings": [one, two, one], "advantages": torch.tensor([1.0, 2.0, 3.0]), "count": 5},
        {"encodings": [two], "advantages": torch.tensor([4.0]), "count": 5},
    ]
    torch.save(pack_rollout(batches), tmp_path / "rollout.pt")
    state = torch.load(tmp_path / "rollout.pt", weights_only=True)
    assert len(state["encodings"]) == 2, "kept once"
    again = unpack_rollout(state, "cpu")
    assert again[0]["encodings"][0] is again[0]["encodings"][2] and again[0]["encodings"][1] is again[1]["encodings"][0]
    assert again[0]["count"] == 5 and torch.equal(again[1]["advantages"], batches[1]["advantages"])
    found = again[0]["encodings"][0]
    assert found.input_ids == one.input_ids and torch.equal(found.media["pixel_values"], one.media["pixel_values"])
