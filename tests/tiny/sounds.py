"""Families that hear; two of them see as well."""

import base64
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from .parts import MELS, WHISPER_FEATURES, finish, text_config, vision_config, whisper_config
from .text import WORDS, template, tokenizer


def qwen2_audio(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    words = tokenizer(tuple(named.values()), named)
    config = transformers.Qwen2AudioConfig(
        text_config=text_config(len(words), hidden, layers, model_type="qwen2"),
        audio_config=whisper_config(hidden, layers, model_type="qwen2_audio_encoder"),
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
        tie_word_embeddings=False,
    )
    processor = transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor(**WHISPER_FEATURES),
        words,
        chat_template=template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>"),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear.weight")


def phi4(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
    words = tokenizer(tuple(named.values()), named)
    ids = words.convert_tokens_to_ids
    hearing = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_blocks": layers, "num_attention_heads": 2}
    hearing |= dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), hidden)
    # One layer more: it reads the last but one. Its processor counts on 32 x 32 patches a crop.
    seeing = vision_config(hidden, layers + 1, image_size=64, crop_size=64, patch_size=2)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    config = transformers.Phi4MultimodalConfig(
        **text_config(len(words), hidden, layers, rope_parameters=rope),
        vision_config=seeing | {"image_token_id": ids("<|image|>")},
        audio_config=hearing | {"input_size": MELS, "bias_max_distance": 100, "audio_token_id": ids("<|audio|>")},
        tie_word_embeddings=False,
    )
    processor = transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(size={"height": 64, "width": 64}, patch_size=2, dynamic_hd=4),
        transformers.Phi4MultimodalFeatureExtractor(feature_size=MELS),
        words,
        chat_template=template("<|image|>", audio="<|audio|>"),
    )
    model = transformers.Phi4MultimodalForCausalLM(config)
    tower = model.model.embed_tokens_extend.audio_embed.encoder.encoder_embedding
    tower.global_mean.fill_(8.0)  # as published: not 0, so a padded frame of zeros is not silence
    tower.global_invstd.fill_(0.25)
    media = "model.embed_tokens_extend"
    projectors = [f"{media}.audio_embed.down_proj_for_{mode}.weight" for mode in ("speech", "vision_speech")]
    return finish(model, processor, seed, image_scale, f"{media}.image_embed.img_projection_down.weight", *projectors)


def gemma3n(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    # Ids rise from text to pictures to sounds: the model tells them apart by that.
    ends = {"boa": "<start_of_audio>", "boi": "<start_of_image>"}
    named = {f"{name}_token": token for name, token in ends.items()}
    named |= {"eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    named |= {"eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    words = tokenizer(("<bos>", *named.values()), named, bos="<bos>")
    ids = words.convert_tokens_to_ids
    seen, heard = ids("<end_of_image>"), ids("<end_of_audio>")
    text = text_config(len(words), hidden, 2 * layers, head_dim=hidden // 4, sliding_window=64)
    text |= {"layer_types": (["sliding_attention"] * (layers - 1) + ["full_attention"]) * 2}
    text |= {"num_kv_shared_layers": layers, "vocab_size_per_layer_input": seen, "hidden_size_per_layer_input": 8}
    text |= {"altup_num_inputs": 2, "laurel_rank": 8, "bos_token_id": ids("<bos>"), "tie_word_embeddings": False}
    hearing = {"hidden_size": hidden, "input_feat_size": MELS, "vocab_offset": heard, "vocab_size": len(words) - heard}
    hearing |= {"conf_num_hidden_layers": layers, "conf_num_attention_heads": 2, "sscp_conv_channel_size": [16, 8]}
    # Its tower comes from timm; another one of timm's, of a few thousand weights, stands in for the 300 million.
    seeing = {"architecture": "test_convnext", "hidden_size": hidden, "vocab_offset": seen, "vocab_size": heard - seen}
    seeing["model_args"] = {"depths": [1] * 4, "dims": [hidden // 2] * 3 + [hidden], "ls_init_value": 1.0}
    config = transformers.Gemma3nConfig(
        text_config=text,
        vision_config=seeing,
        audio_config=hearing,
        audio_soft_tokens_per_image=16,
        vision_soft_tokens_per_image=4,
        tie_word_embeddings=False,
        **{f"{name}_id": ids(token) for name, token in named.items()},
    )
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(feature_size=MELS),
        transformers.SiglipImageProcessor(size={"height": 64, "width": 64}),
        words,
        chat_template=template("<image_soft_token>", audio="<audio_soft_token>", bos="<bos>"),
        audio_seq_length=16,
        image_seq_length=4,
    )
    model = transformers.Gemma3nForConditionalGeneration(config)
    # No media scale: a norm follows the projectors.
    return finish(model, processor, seed, image_scale)


def voxtral(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = transformers.MistralCommonBackend(Path(_tekken().name, "tekken.json"))
    text = text_config(words.vocab_size, hidden, layers, model_type="llama", head_dim=hidden // 4)
    text |= {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id}
    # A clip is 30 s, whatever the model: four frames of the encoder's 1500 make a token.
    hearing = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    hearing |= {"num_attention_heads": 2, "num_mel_bins": MELS, "model_type": "voxtral_encoder"}
    config = transformers.VoxtralConfig(
        text_config=text | {"eos_token_id": words.eos_token_id},
        audio_config=hearing,
        audio_token_id=words.convert_tokens_to_ids("[AUDIO]"),
        tie_word_embeddings=False,
    )
    processor = transformers.VoxtralProcessor(transformers.WhisperFeatureExtractor(feature_size=MELS), words)
    model = transformers.VoxtralForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")


_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


@cache
def _tekken() -> tempfile.TemporaryDirectory[str]:
    """A folder with a tokenizer file in Mistral's format: the bytes, and our words as whole pieces."""
    pieces = [bytes([i]) for i in range(256)]
    pieces += [(space + word).encode() for word in dict.fromkeys(WORDS) for space in ("", " ") if len(space + word) > 1]
    named = dict(enumerate(_CONTROL)) | {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    specials = [{"rank": i, "token_str": named.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(40)]
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
        for i, piece in enumerate(pieces)
    ]
    spectrogram = {"num_mel_bins": MELS, "hop_length": 160, "window_size": 400}
    content = {
        "config": {
            "pattern": r" ?[A-Za-z]+|[0-9]|[\s\S]",
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": len(pieces) + len(specials),
            "default_num_special_tokens": len(specials),
            "version": "v7",
        },
        "vocab": vocabulary,
        "special_tokens": specials,
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "audio_encoding_config": spectrogram,
            "chunk_length_s": 30.0,
        },
    }
    folder = tempfile.TemporaryDirectory(prefix="tekken-")
    Path(folder.name, "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    return folder  # gone with the process
