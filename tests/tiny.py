"""Tiny random vision-language models with their real processors, built in code, offline, in a fraction of a second.

The weights are scaled so that media matter: another picture moves the log-probs of a completion by far more than any
tolerance used in these tests. The tokenizer is exact: decoding what it encoded gives the text back.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "smolvlm", "llava", "gemma3")

_LEXICON = (
    "what which color colour is are the this that in picture image images video sound how many squares count answer "
    "question think digit number letter read describe say give only with reply look at first second option correct "
    "red green blue yellow black white zero one two three four five six seven eight nine ten a an and or not yes no "
    "hello world cat dog user assistant system tool name arguments function add sum true false of to you can see"
)
WORDS = tuple(_LEXICON.split())
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<tool_response>")
TURNS = ("<unk>", "<|pad|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS = 1, 2, 3  # their places in TURNS

# A placeholder for each medium, tools, and a generation prompt: what a published template has.
TEMPLATE = """{{- bos }}
{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}\
{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}
            {%- if part.type == 'image' %}{{- '@IMAGE@' }}
            {%- elif part.type == 'video' %}{{- '@VIDEO@' }}
            {%- elif part.type == 'text' %}{{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function if call.function is defined else call %}
        {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# How TRL's tool loop reads a call back out of a completion.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def build(
    family: str, *, seed: int = 0, hidden: int = 32, layers: int = 2, image_scale: float = 1.0
) -> tuple[Any, Any]:
    """A ``(model, processor)`` of ``family`` (one of ``FAMILIES``): fp32, on the CPU, in eval mode.

    ``hidden``: width of the language model; the vision tower has the same, and the feed-forward twice as much. 4-bit
    weights need a multiple of 64. ``image_scale`` multiplies what a picture adds to the language model's input.
    """
    with torch.random.fork_rng(devices=[]):  # reproducible, and the caller's random state stays as it was
        torch.manual_seed(seed)
        return _BUILDERS[family](seed=seed, hidden=hidden, layers=layers, image_scale=image_scale)


def save(family: str, path: Path | str, **options: Any) -> str:
    """Write ``build(family, **options)`` to ``path`` as a published model looks, and return the path."""
    model, processor = build(family, **options)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def image(seed: int = 0, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """A picture of ``size`` (width, height) in pixels: coarse random blocks, so that resizing does not grey it out."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def prompt(text: str = "what color is this", images: int = 1) -> list[dict[str, Any]]:
    """One user turn with ``images`` picture slots in front of ``text``, in TRL's conversational form."""
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


@cache
def _vocabulary() -> dict[str, int]:
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    pieces = [*TURNS, "\n", " ", *letters, *("##" + c for c in letters if c.isalnum())]
    pieces += [space + word for word in WORDS for space in ("", " ")]
    pieces += [" " + c for c in letters if c.isalnum()]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def tokenizer(specials: tuple[str, ...], named: dict[str, str], bos: str | None = None) -> PreTrainedTokenizerFast:
    """Words, single digits and punctuation; an unknown word is spelled in letters. ``specials`` are media tokens."""
    core = Tokenizer(models.WordPiece(dict(_vocabulary()), unk_token="<unk>", continuing_subword_prefix="##"))
    # A word keeps the space in front of it, as byte-level tokenizers do: decoding is plain concatenation.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|\n| |[^\w\s]"), "isolated")
    core.decoder = decoders.Sequence([decoders.Replace(Regex("^##"), ""), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        bos_token=bos,
        extra_special_tokens=named,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([AddedToken(s, special=True, normalized=False) for s in (*TURNS, *specials)], special_tokens=True)
    fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast.response_template = RESPONSE
    return fast


def _template(image_slot: str, video_slot: str = "", bos: str = "") -> str:
    return TEMPLATE.replace("{{- bos }}", bos).replace("@IMAGE@", image_slot).replace("@VIDEO@", video_slot)


def _text(vocabulary: int, hidden: int, layers: int, **more: Any) -> dict[str, Any]:
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


def _vision(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, **more}


def _finish(model: Any, processor: Any, seed: int, image_scale: float, projector: str) -> tuple[Any, Any]:
    """Draw every matrix anew at a width-independent scale: the defaults (0.02) make media all but invisible."""
    generator = torch.Generator().manual_seed(seed)
    words = 1.0 / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)  # some models scale them up again
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:  # biases and norms: away from 0 and 1, so that losing one shows
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
                continue
            fan_in = parameter[0].numel()
            std = words if "embed_tokens" in name else fan_in**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        model.get_parameter(projector).mul_(image_scale)
        head = model.get_output_embeddings().weight
        if head is not model.get_input_embeddings().weight:
            head.mul_(0.7)  # some way from uniform, some way from certain
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model.eval(), processor


def _qwen(family: str, *, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    old = family == "qwen2_vl"
    specials = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    names = ("vision_start_token", "vision_end_token", "image_token", "video_token")
    words = tokenizer(specials, dict(zip(names, specials, strict=True)))
    ids = {f"{n}_id": words.convert_tokens_to_ids(s) for n, s in zip(names, specials, strict=True)}
    eighth = hidden // 32
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2 * eighth, eighth, eighth]}
    vision: dict[str, Any] = {"depth": layers, "num_heads": 2, "patch_size": 14}
    if old:
        vision |= {"embed_dim": hidden, "hidden_size": hidden, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": hidden, "out_hidden_size": hidden, "intermediate_size": 2 * hidden}
        vision |= {"window_size": 56, "fullatt_block_indexes": [layers - 1]}
    prefix = "Qwen2VL" if old else "Qwen2_5_VL"
    config_class, model_class, processor_class = (
        getattr(transformers, prefix + kind) for kind in ("Config", "ForConditionalGeneration", "Processor")
    )
    text = _text(len(words), hidden, layers, rope_parameters=rope)
    model = model_class(config_class(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids))
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    processor = processor_class(
        image_processor=transformers.Qwen2VLImageProcessor(
            **patches, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
        ),
        tokenizer=words,
        video_processor=transformers.Qwen2VLVideoProcessor(
            **patches, size={"shortest_edge": 28 * 28, "longest_edge": 8 * 112 * 112}
        ),
        chat_template=_template(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )
    return _finish(model, processor, seed, image_scale, "model.visual.merger.mlp.2.weight")


def _smolvlm(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    tiles = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
    }
    words = tokenizer((*named.values(), *tiles), named)
    size, patch, shuffle = 64, 16, 2
    config = transformers.SmolVLMConfig(
        text_config=_text(len(words), hidden, layers, model_type="llama"),
        vision_config=_vision(hidden, layers, image_size=size, patch_size=patch),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=shuffle,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    edge = {"longest_edge": size}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(size={"longest_edge": 2 * size}, max_image_size=edge),
        words,
        transformers.SmolVLMVideoProcessor(
            size=edge, max_image_size=edge, video_sampling={"video_size": edge, "max_frames": 4, "fps": 1}
        ),
        image_seq_len=(size // patch) ** 2 // shuffle**2,
        chat_template=_template("<image>", "<video>"),
    )
    model = transformers.SmolVLMForConditionalGeneration(config)
    return _finish(model, processor, seed, image_scale, "model.connector.modality_projection.proj.weight")


def _llava(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<image>",), {"image_token": "<image>"})
    config = transformers.LlavaConfig(
        text_config=_text(len(words), hidden, layers, model_type="llama"),
        # One layer more: LLaVA reads the last but one.
        vision_config=_vision(hidden, layers + 1, model_type="clip_vision_model", projection_dim=hidden),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return _finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")


def _gemma3(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(("<bos>", *named.values()), named, bos="<bos>")
    ids = words.convert_tokens_to_ids
    text = _text(len(words), hidden, layers, head_dim=hidden // 4, sliding_window=64, bos_token_id=ids("<bos>"))
    text["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=_vision(hidden, layers, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        words,
        image_seq_length=4,
        chat_template=_template("<start_of_image>", bos="<bos>"),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    return _finish(model, processor, seed, image_scale, "model.multi_modal_projector.mm_input_projection_weight")


_BUILDERS = {
    "qwen2_vl": partial(_qwen, "qwen2_vl"),
    "qwen2_5_vl": partial(_qwen, "qwen2_5_vl"),
    "smolvlm": _smolvlm,
    "llava": _llava,
    "gemma3": _gemma3,
}
