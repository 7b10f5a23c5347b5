"""Published models as their configurations describe them, for tests on the meta device."""

from fractions import Fraction
from typing import Any


def _text(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv, **more}


def _vision(hidden: int, ffn: int, layers: int, heads: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "image_size": image}
    return {**sizes, "num_attention_heads": heads, "patch_size": patch, **more}


MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
QWEN_IDS = {"image_token_id": 151655, "video_token_id": 151656}
QWEN_IDS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
QWEN25_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
QWEN25_VISION |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}

# A quarter of every head turns; three layers of four have a state in the place of keys and values.
QWEN35 = {"head_dim": 256, "linear_num_key_heads": 16}
QWEN35["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000000.0, "mrope_section": [11, 11, 10]}
QWEN35["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": 0.25}
QWEN35_IDS = {"image_token_id": 248056, "video_token_id": 248057}
QWEN35_IDS |= {"vision_start_token_id": 248053, "vision_end_token_id": 248054}

WHISPER = {"encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "d_model": 1280}
WHISPER |= {"num_mel_bins": 128, "max_source_positions": 1500}

# name: class, config as published, published number of parameters (a float where it is published rounded),
# and layers x (attention, MLP) of the vision and the language tower, placeholder ids.
PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": (
        "Qwen2VL",
        {
            "text_config": _text(1536, 8960, 28, 12, 2, 151936, rope_parameters=MROPE),
            "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
            "tie_word_embeddings": True,
            **QWEN_IDS,
        },
        2_208_985_600,
        (32, 2, 2, 28, 4, 3),
        (151655, 151656),
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "Qwen2_5_VL",
        {
            "text_config": _text(2048, 11008, 36, 16, 2, 151936, rope_parameters=MROPE),
            "vision_config": {**QWEN25_VISION, "out_hidden_size": 2048},
            "tie_word_embeddings": True,
            **QWEN_IDS,
        },
        3_754_622_976,
        (32, 2, 3, 36, 4, 3),
        (151655, 151656),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "Qwen2_5_VL",
        {
            "text_config": _text(3584, 18944, 28, 28, 4, 152064, rope_parameters=MROPE),
            "vision_config": {**QWEN25_VISION, "out_hidden_size": 3584},
            "tie_word_embeddings": False,
            **QWEN_IDS,
        },
        8_292_166_656,
        (32, 2, 3, 28, 4, 3),
        (151655, 151656),
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        "Idefics3",
        {
            "text_config": _text(576, 1536, 30, 9, 3, 49280, model_type="llama"),
            "vision_config": _vision(768, 3072, 12, 12, 512, 16),
            "scale_factor": 4,
            "image_token_id": 49190,
            "tie_word_embeddings": False,
        },
        256_484_928,
        (12, 4, 2, 30, 4, 3),
        (49190,),
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        "SmolVLM",
        {
            "text_config": _text(2048, 8192, 24, 32, 32, 49280, model_type="llama"),
            "vision_config": _vision(1152, 4304, 27, 16, 384, 14),
            "scale_factor": 3,
            "image_token_id": 49190,
            "tie_word_embeddings": False,
        },
        2_246_784_880,
        (27, 4, 2, 24, 4, 3),
        (49190,),
    ),
    "llava-hf/llava-1.5-7b-hf": (
        "Llava",
        {
            "text_config": _text(4096, 11008, 32, 32, 32, 32064, model_type="llama"),
            "vision_config": _vision(1024, 4096, 24, 16, 336, 14, model_type="clip_vision_model", projection_dim=768),
            "image_token_index": 32000,
            "tie_word_embeddings": False,
        },
        7_063_427_072,
        (24, 4, 2, 32, 4, 3),
        (32000,),
    ),
    "google/gemma-3-4b-it": (
        "Gemma3",
        {
            "text_config": _text(2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024),
            "vision_config": _vision(1152, 4304, 27, 16, 896, 14, vision_use_head=False),
            "mm_tokens_per_image": 256,
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
        },
        4_300_079_472,
        (27, 4, 2, 34, 4, 3),
        (262144,),
    ),
    "Qwen/Qwen3-VL-4B-Instruct": (
        "Qwen3VL",
        {
            "text_config": _text(
                2560,
                9728,
                36,
                32,
                8,
                151936,
                head_dim=128,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            ),
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "out_hidden_size": 2560,
                "num_heads": 16,
                "intermediate_size": 4096,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            "tie_word_embeddings": True,
            **QWEN_IDS,
        },
        4_437_815_808,
        (24, 2, 2, 36, 4, 3),
        (151655, 151656),
    ),
    "Qwen/Qwen3.5-0.8B": (
        "Qwen3_5",
        {
            "text_config": _text(1024, 3584, 24, 8, 2, 248320, linear_num_value_heads=16, **QWEN35),
            "vision_config": {
                "depth": 12,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_heads": 12,
                "out_hidden_size": 1024,
            },
            "tie_word_embeddings": True,
            **QWEN35_IDS,
        },
        852_985_920,
        (12, 2, 2, 24, Fraction(6 * 4 + 18 * 5, 24), 3),
        (248056, 248057),
    ),
    "Qwen/Qwen3.5-4B": (
        "Qwen3_5",
        {
            "text_config": _text(2560, 9216, 32, 16, 4, 248320, linear_num_value_heads=32, **QWEN35),
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
            },
            "tie_word_embeddings": True,
            **QWEN35_IDS,
        },
        4_539_265_536,
        (24, 2, 2, 32, Fraction(8 * 4 + 24 * 5, 32), 3),
        (248056, 248057),
    ),
    "LiquidAI/LFM2-VL-450M": (
        "Lfm2Vl",
        {
            "text_config": _text(
                1024,
                6656,
                16,
                16,
                8,
                65536,
                model_type="lfm2",
                layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
            ),
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "patch_size": 16,
                "num_patches": 256,
                "vision_use_head": False,
            },
            "projector_hidden_size": 2560,
            "image_token_id": 396,
        },
        450_822_656,
        (12, 4, 2, 16, Fraction(6 * 4 + 10 * 2, 16), 3),
        (396,),
    ),
    "google/paligemma-3b-pt-224": (
        "PaliGemma",
        {
            "text_config": _text(2048, 16384, 18, 8, 1, 257216, model_type="gemma", head_dim=256),
            "vision_config": _vision(
                1152, 4304, 27, 16, 224, 14, model_type="siglip_vision_model", vision_use_head=False
            ),
            "image_token_index": 257152,
        },
        2_923_466_480,
        (27, 4, 2, 18, 4, 3),
        (257152,),
    ),
    "Qwen/Qwen2.5-Omni-3B, its thinker": (
        "Qwen2_5OmniThinker",
        {
            "text_config": _text(2048, 11008, 36, 16, 2, 151936, rope_parameters=MROPE),
            "vision_config": {**QWEN25_VISION, "out_hidden_size": 2048},
            "audio_config": {**WHISPER, "n_window": 100, "output_dim": 2048},
            "vision_start_token_id": 151652,
            "tie_word_embeddings": False,
        },
        4_703_464_448,
        (32, 4, 3, 36, 4, 3),
        (151646, 151647, 151652, 151655, 151656),  # with the two by which the model counts its media
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        "LlavaNext",
        {
            "text_config": _text(4096, 14336, 32, 32, 8, 32064, model_type="mistral"),
            "vision_config": _vision(1024, 4096, 24, 16, 336, 14, model_type="clip_vision_model", projection_dim=768),
            "image_token_index": 32000,
            "tie_word_embeddings": False,
        },
        7_566_747_648,
        (24, 4, 2, 32, 4, 3),
        (32000,),
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        "LlavaOnevision",
        {
            "text_config": _text(896, 4864, 24, 14, 2, 152000, model_type="qwen2", tie_word_embeddings=True),
            "vision_config": _vision(
                1152, 4304, 26, 16, 384, 14, model_type="siglip_vision_model", vision_use_head=False
            ),
            "image_token_index": 151646,
            "video_token_index": 151647,
            "tie_word_embeddings": True,
        },
        0.894e9,
        (26, 4, 2, 24, 4, 3),
        (151646, 151647),
    ),
    "OpenGVLab/InternVL3-1B-hf": (
        "InternVL",
        {
            "text_config": _text(896, 4864, 24, 14, 2, 151674, model_type="qwen2"),
            "vision_config": {
                **_vision(1024, 4096, 24, 16, 448, 14, attention_bias=True),
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
            "image_token_id": 151667,
            "tie_word_embeddings": False,
        },
        0.938e9,
        (24, 4, 2, 24, 4, 3),
        (151667,),
    ),
    "rhymes-ai/Aria": (
        "Aria",
        {
            "text_config": _text(
                2560,
                1664,
                28,
                20,
                20,
                100352,
                model_type="aria_text",
                moe_num_experts=64,
                moe_topk=6,
                moe_num_shared_experts=2,
            ),
            "vision_config": _vision(1152, 4304, 27, 16, 980, 14, model_type="idefics3_vision"),
            "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
            "image_token_index": 9,
            "tie_word_embeddings": False,
        },
        25.3e9,
        (27, 4, 2, 28, 4, 3),
        (9,),
    ),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": (
        "Mllama",
        {
            "text_config": _text(4096, 14336, 40, 32, 8, 128256, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38]),
            "vision_config": {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_global_layers": 8,
                "attention_heads": 16,
                "image_size": 560,
                "patch_size": 14,
                "vision_output_dim": 7680,
                "max_num_tiles": 4,
                "intermediate_layers_indices": [3, 7, 15, 23, 30],
            },
            "image_token_index": 128256,
        },
        10_670_220_835,
        (40, 4, 2, 40, 4, 3),
        (128256,),
    ),
    "Qwen/Qwen2-Audio-7B-Instruct": (
        "Qwen2Audio",
        {
            "text_config": _text(4096, 11008, 32, 32, 32, 156032, model_type="qwen2"),
            "audio_config": {"model_type": "qwen2_audio_encoder", **WHISPER},
            "audio_token_index": 151646,
            "tie_word_embeddings": False,
        },
        8_397_094_912,
        (0, 0, 0, 32, 4, 3),
        (151646,),
    ),
    "mistralai/Voxtral-Mini-3B-2507": (
        "Voxtral",
        {
            "text_config": _text(3072, 8192, 30, 32, 8, 131072, model_type="llama", head_dim=128),
            "audio_config": {
                "model_type": "voxtral_encoder",
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "num_mel_bins": 128,
                "max_source_positions": 1500,
            },
            "audio_token_id": 24,
            "tie_word_embeddings": False,
        },
        4.68e9,
        (0, 0, 0, 30, 4, 3),
        (24,),
    ),
    "google/gemma-3n-E2B-it": (
        "Gemma3n",
        {
            "text_config": _text(
                2048,
                8192,
                30,
                8,
                2,
                262400,
                head_dim=256,
                num_kv_shared_layers=10,
                activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20,
            ),
            "vision_config": {},
            "audio_config": {},
        },
        # Published with keys and values (and a norm) for the ten layers that use others'.
        5_439_438_272 - 10 * (2 * 2048 * 512 + 256),
        (0, 0, 0, 30, Fraction(20 * 4 + 10 * 2, 30), 3),
        (262145, 262273),
    ),
    # Published with adapters inside; these are the figures without.
    "microsoft/Phi-4-multimodal-instruct": (
        "Phi4Multimodal",
        {"tie_word_embeddings": True},
        4.7e9,
        (27, 4, 2, 32, 2, 2),
        (200010, 200011),
    ),
}
