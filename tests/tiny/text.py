"""An exact tokenizer of few words, and the chat template that all families share."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
            {%- elif part.type == 'audio' %}{{- '@AUDIO@' }}
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


def template(image: str = "", video: str = "", audio: str = "", bos: str = "") -> str:
    """``TEMPLATE`` with a family's placeholders."""
    slots = {"@IMAGE@": image, "@VIDEO@": video, "@AUDIO@": audio, "{{- bos }}": bos}
    filled = TEMPLATE
    for slot, written in slots.items():
        filled = filled.replace(slot, written)
    return filled
