"""The models of each modality with random weights, their processors, and a tokenizer of one token a word."""

from typing import Any

from .options import BenchOptions

MELS, RATE, LONGEST = 128, 16000, 30  # bands, samples a second, seconds: as Qwen2-Audio hears
PATCH, MERGE, FRAMES = 14, 2, 16
_SPECIALS = ("<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
_VISION_TOKENS = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_AUDIO_TOKENS = {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>", "audio_token": "<|AUDIO|>"}
_SLOTS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}
# The usual 0.02 leaves the logits of so narrow a model almost flat, whatever it sees.
_SPREAD: dict[str, Any] = {"initializer_range": 0.03}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
_LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build_processor(options: BenchOptions, pixels: int = 0) -> Any:
    """The modality's processor; ``pixels`` is what every picture or frame is resized to."""
    import transformers

    hf: Any = transformers  # its lazy names are invisible to type checkers
    if options.modality == "audio":
        features = hf.WhisperFeatureExtractor(feature_size=MELS, chunk_length=LONGEST, sampling_rate=RATE)
        words = _tokenizer(_AUDIO_TOKENS, options.vocab_size)
        return hf.Qwen2AudioProcessor(features, words, chat_template=_template("audio"))
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    patches: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    return hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**patches),
        _tokenizer(_VISION_TOKENS, options.vocab_size),
        hf.Qwen2VLVideoProcessor(**patches, cap_pixels_per_frame=False),
        chat_template=_template(options.modality),
    )


def build_model(options: BenchOptions, processor: Any) -> Any:
    """The modality's model; the same options give the same weights."""
    import torch

    torch.manual_seed(options.seed)
    model = (_hears if options.modality == "audio" else _sees)(options, processor.tokenizer)
    assert model.generation_config is not None, "a model that generates has one"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(processor.tokenizer, name))
    return model.to(dtype=torch.bfloat16 if options.bf16 else torch.float32)


def lora_config(options: BenchOptions) -> Any:
    """Adapters on the language model's linear layers, and on the vision tower's where it is trained."""
    from peft import LoraConfig

    targets = rf"({_LINEAR}|.*visual.*\.(qkv|proj))" if options.train_vision else _LINEAR
    return LoraConfig(**LORA, target_modules=targets)


def describe(options: BenchOptions) -> str:
    """``Qwen2.5-VL, hidden 384 x 6 layers, …``."""
    name = "Qwen2-Audio" if options.modality == "audio" else "Qwen2.5-VL"
    tower = "audio tower" if options.modality == "audio" else "vision"
    text = (
        f"{name} (random weights), hidden {options.hidden_size} x {options.num_hidden_layers} layers, "
        f"vocabulary {options.vocab_size}, {tower} {options.vision_hidden_size} x {options.vision_depth}"
    )
    return f"{text}, LoRA r {LORA['r']}{' (vision too)' if options.train_vision else ''}"


def _sees(options: BenchOptions, words: Any) -> Any:
    import transformers

    hf: Any = transformers
    token = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = hf.Qwen2_5_VLConfig(
        text_config={**_text_config(options, words), "rope_parameters": rope},
        vision_config={
            **_SPREAD,
            "depth": options.vision_depth,
            "hidden_size": options.vision_hidden_size,
            "out_hidden_size": options.hidden_size,
            "num_heads": options.vision_hidden_size // 64,
            "intermediate_size": options.vision_hidden_size * 8 // 3 // 16 * 16,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 112,
            "fullatt_block_indexes": [options.vision_depth - 1],
            "tokens_per_second": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        **_SPREAD,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _hears(options: BenchOptions, words: Any) -> Any:
    import transformers

    hf: Any = transformers
    config = hf.Qwen2AudioConfig(
        text_config={**_text_config(options, words), "model_type": "qwen2"},
        audio_config={
            **_SPREAD,
            "model_type": "qwen2_audio_encoder",
            "d_model": options.vision_hidden_size,
            "encoder_layers": options.vision_depth,
            "encoder_attention_heads": options.vision_hidden_size // 64,
            "encoder_ffn_dim": 4 * options.vision_hidden_size,
            "num_mel_bins": MELS,
            "max_source_positions": LONGEST * 50,
        },
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
        **_SPREAD,
    )
    return hf.Qwen2AudioForConditionalGeneration(config)


def _text_config(options: BenchOptions, words: Any) -> dict[str, Any]:
    heads = options.hidden_size // 64
    return {
        **_SPREAD,
        "vocab_size": len(words),
        "hidden_size": options.hidden_size,
        "intermediate_size": options.hidden_size * 11 // 4 // 32 * 32,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(n for n in range(1, max(1, heads // 3) + 1) if heads % n == 0),
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }


def _template(modality: str) -> str:
    return (
        "{% for message in messages %}<|im_start|> {{ message['role'] }} "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == '{modality}' %}}{_SLOTS[modality]}"
        "{% elif 'text' in part %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )


def _tokenizer(media_tokens: dict[str, str], size: int) -> Any:
    """``size`` tokens: the special ones, the roles, and words that are numbers."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    specials = [*_SPECIALS, *media_tokens.values()]
    named = [*specials, "user", "assistant"]
    vocabulary = [*named, *(f"w{number}" for number in range(size - len(named)))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    hf: Any = transformers
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=media_tokens,
    )
    fast.add_tokens([AddedToken(word, special=True, normalized=False) for word in specials], special_tokens=True)
    return fast
