"""The demos' models: random weights in Qwen2.5-VL's and Qwen2-Audio's own classes, and tokenizers of a few words."""

from pathlib import Path
from typing import Any

from .digits import DIGITS, QUESTION, SIDE
from .motion import FRAMES

_SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
_VISION_TOKENS = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_AUDIO_TOKENS = {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>", "audio_token": "<|AUDIO|>"}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in part %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
_WIDTH, _WIDE = 64, 128
# The usual 0.02 hardly learns at this width.
_SPREAD: dict[str, Any] = {"initializer_range": 0.08}
_MELS, _HOP, _SECONDS = 40, 160, 1


def save_tiny_model(
    folder: Path, seed: int, question: str = QUESTION, answers: tuple[str, ...] = DIGITS, words: tuple[str, ...] = ()
) -> None:
    """A Qwen2.5-VL with random weights, its processor and a tokenizer of the few words it needs.

    ``words``: what is said to it beside the question.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    processor = tiny_processor(question, answers, words)
    token = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**_text_config(processor.tokenizer), "rope_parameters": rope},
        vision_config={
            **_SPREAD,
            "depth": 2,
            "hidden_size": _WIDTH,
            "out_hidden_size": _WIDTH,
            "num_heads": 4,
            "intermediate_size": _WIDE,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        **_SPREAD,
    )
    _save(Qwen2_5_VLForConditionalGeneration(config), processor, folder)


def tiny_processor(question: str, answers: tuple[str, ...], words: tuple[str, ...] = ()) -> Any:
    """Qwen2.5-VL's own processor classes around a word-level tokenizer."""
    import transformers

    hf: Any = transformers  # its lazy names are invisible to type checkers
    patches: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    area = SIDE * SIDE
    return hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**patches, size={"shortest_edge": area, "longest_edge": area}),
        _tokenizer(_VISION_TOKENS, question, (*answers, *words)),
        hf.Qwen2VLVideoProcessor(**patches, size={"shortest_edge": area, "longest_edge": FRAMES * area}),
        chat_template=_TEMPLATE,
    )


def save_tiny_audio_model(folder: Path, seed: int, question: str, answers: tuple[str, ...] = DIGITS) -> None:
    """A Qwen2-Audio with random weights that hears one second, its processor and a tokenizer."""
    import torch
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(seed)
    processor = tiny_audio_processor(question, answers)
    config = Qwen2AudioConfig(
        text_config={**_text_config(processor.tokenizer), "model_type": "qwen2"},
        audio_config={
            **_SPREAD,
            "model_type": "qwen2_audio_encoder",
            "d_model": _WIDTH,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": _WIDE,
            "num_mel_bins": _MELS,
            "max_source_positions": _SECONDS * 16000 // _HOP // 2,
        },
        audio_token_index=processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        **_SPREAD,
    )
    _save(Qwen2AudioForConditionalGeneration(config), processor, folder)


def tiny_audio_processor(question: str, answers: tuple[str, ...]) -> Any:
    """Qwen2-Audio's own processor classes, 40 bands of one second, around a word-level tokenizer."""
    import transformers

    hf: Any = transformers
    bands = hf.WhisperFeatureExtractor(feature_size=_MELS, chunk_length=_SECONDS, hop_length=_HOP, sampling_rate=16000)
    return hf.Qwen2AudioProcessor(bands, _tokenizer(_AUDIO_TOKENS, question, answers), chat_template=_TEMPLATE)


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        **_SPREAD,
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.eos_token_id,
    }


def _tokenizer(media_tokens: dict[str, str], question: str, answers: tuple[str, ...]) -> Any:
    """One token a word; pads at the left."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    specials = [*_SPECIALS, *media_tokens.values()]
    words = ["<unk>", *specials, "user", "assistant", *question.split(), *answers]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    hf: Any = transformers
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=media_tokens,
    )
    fast.add_tokens([AddedToken(word, special=True, normalized=False) for word in specials], special_tokens=True)
    return fast


def _save(model: Any, processor: Any, folder: Path) -> None:
    assert model.generation_config is not None, "a model that generates has one"
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
