"""What the configurations of all families have in common, and weights that let media matter."""

from typing import Any

import torch

from .text import BOS, EOS, PAD


def text_config(vocabulary: int, hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **more,
    }


def vision_config(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, **more}


def whisper_config(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    """An encoder of the Whisper kind for ``MELS`` bins and 2 s: 200 mel frames, 100 positions."""
    sizes = {"d_model": hidden, "encoder_layers": layers, "encoder_ffn_dim": 2 * hidden}
    return {**sizes, "encoder_attention_heads": 2, "num_mel_bins": MELS, "max_source_positions": 100, **more}


MELS = 16
WHISPER_FEATURES = {"feature_size": MELS, "chunk_length": 2, "sampling_rate": 16_000}


def finish(model: Any, processor: Any, seed: int, media_scale: float, *projectors: str) -> tuple[Any, Any]:
    """Draw every matrix anew at a width-independent scale: the defaults (0.02) make media all but invisible.

    ``projectors`` are the last matrices that media pass on their way in, scaled by ``media_scale``.
    """
    generator = torch.Generator().manual_seed(seed)
    words = 1.0 / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)  # some models scale them up again
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:  # biases and norms: away from 0 and 1, so that losing one shows
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
                continue
            # Matrices of several experts are (experts, in, out).
            fan_in = parameter.shape[1] if ".experts." in name else parameter[0].numel()
            std = words if "embed_tokens" in name else fan_in**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for projector in projectors:
            model.get_parameter(projector).mul_(media_scale)
        head = model.get_output_embeddings().weight
        if head is not model.get_input_embeddings().weight:
            head.mul_(0.7)  # some way from uniform, some way from certain
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model.eval(), processor
