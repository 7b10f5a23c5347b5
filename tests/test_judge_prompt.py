"""What a judge reads: the request, its tokens behind the policy's own prompt, and captions that only it sees."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm_grpo.collate import collate
from vlm_grpo.config import RunConfig
from vlm_grpo.data import Sample, to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import CheckpointError, ConfigError, DataFormatError, EncodingError
from vlm_grpo.judging.captions import Captions
from vlm_grpo.judging.prompt import STEM, JudgePrompt, question_of
from vlm_grpo.models.families import placeholder_ids
from vlm_grpo.rewarding import read_judging

FAMILIES = ("qwen2_5_vl", "smolvlm", "llava", "gemma3", "mllama", "qwen2_audio", "phi4_multimodal", "voxtral")
JUDGE = JudgePrompt("Is {{ response }} good?{% for c in captions %} {{ c }}{% endfor %}", "Yes")


def sample_of(family: str, text: str = "what is it") -> Sample:
    kind = tiny.KINDS[family][0]
    medium = {"image": lambda: tiny.image(1, (56, 56)), "audio": lambda: tiny.audio(1, 0.5)}[kind]()
    content = [{"type": kind}, {"type": "text", "text": text}]
    return to_sample({"prompt": [{"role": "user", "content": content}], f"{kind}s": [medium]})


def followed(sample: Sample, response: str, request: str) -> Sample:
    """The whole conversation as a prompt."""
    turns = [("assistant", response), ("user", request)]
    more = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    return Sample([*sample.prompt, *more], sample.media)


def tokens(processor, text: str) -> list[int]:
    return list(getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"])


# ---- the request ------------------------------------------------------------------------------------------------


def test_the_built_in_request_has_its_parts():  # covers L2
    judge = JudgePrompt.of()
    plain = judge.request(response="A cat.").splitlines()
    told = judge.request(["A cat  on\na mat.", "Two {{ cats }}."], response="A cat.").splitlines()
    criteria = ["Accurate", "Helpful", "Natural language", "Concise"]
    for request in (plain, told):
        assert [line.split(":")[0].split(". ")[1] for line in request if line[:1].isdigit()] == criteria
        assert request[-1].startswith("Sum up") and request[-2] == "", "one summary line"
    lead = " The response should be supported by these captions:"
    assert told[2] == plain[2] + lead and told[3:5] == ["- A cat on a mat.", "- Two {{ cats }}."]
    assert told[:2] == plain[:2] and told[5:] == plain[3:], "without captions neither lead sentence nor bullets"
    assert judge.stem == STEM and judge.takes_captions and not JudgePrompt("Good?").takes_captions


def test_a_template_may_use_the_question_and_the_response():  # covers L2
    turns = [("user", "Hello."), ("assistant", "Hi."), ("user", "Which?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    asked = question_of(to_sample({"prompt": messages}))
    assert JudgePrompt("{{ question }}|{{ response }}").request(response="this", question=asked) == "Which?|this"
    assert question_of(to_sample({"prompt": "as it is"})) == "as it is"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Good?\n{{ caption }}", 'line 2 has the unknown variable "caption". Did you mean "captions"'),
        ("{{ prompt.text }}", 'line 1 has the unknown variable "prompt". Known are captions, question, response'),
        ("a\nb {% for c in captions %}", "line 2 is no Jinja template"),
        ("{{ response | shout }}", "line 1 is no Jinja template .No filter named 'shout'"),
        ("\n{{ response.text }}", "line 2 cannot be rendered .* has no attribute 'text'"),
        ("{{ captions[0] }}", "line 1 cannot be rendered .*has no element 0"),
        ("{{ 1 / 0 }}", "line 1 cannot be rendered .division by zero"),
        ("{{ response.__class__.__mro__ }}", "line 1 cannot be rendered .*unsafe"),
        ("  \n", "is empty"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_sentence(tmp_path, template, message):  # covers L2
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(ConfigError, match=f"^The judge's prompt {message}") as caught:
        JudgePrompt.of(template)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"^The judge's prompt .*own.jinja {message}"):
        JudgePrompt.of(str(tmp_path / "own.jinja"))


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match="The judge's prompt .*gone.jinja cannot be read .No such file"):
        JudgePrompt.of(str(tmp_path / "gone.jinja"))
    (tmp_path / "my judge.md").write_text("Is it good?")
    for name in ("judge.jinj", "prompts/judge", str(tmp_path / "my judge.md")):
        with pytest.raises(ConfigError, match="judge.* is neither a file ending in .jinja, .j2, .txt nor a request"):
            JudgePrompt.of(name)
    assert JudgePrompt.of("Is it good? " * 500).template and JudgePrompt.of("{{response}}").template
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="bad.txt cannot be read .it is not UTF-8"):
        JudgePrompt.of(str(tmp_path / "bad.txt"))


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_characters="{}#%", exclude_categories=["Cs"])), st.text(max_size=9), st.booleans())
def test_a_saved_prompt_is_the_same_again(tmp_path_factory, text, stem, newline):
    folder = tmp_path_factory.mktemp("judge")
    judge = JudgePrompt("{{ response }}" + text + "\n" * newline, stem.encode(errors="ignore").decode())
    judge.save(folder)
    assert JudgePrompt.load(folder) == judge
    assert {path.name for path in folder.iterdir()} == {"judge_prompt.jinja", "judge_prompt.json"}


def test_a_folder_without_a_judges_prompt(tmp_path):
    with pytest.raises(CheckpointError, match="has no readable judge_prompt.jinja. Give the folder of a reward model"):
        JudgePrompt.load(tmp_path)
    JudgePrompt().save(tmp_path)
    (tmp_path / "judge_prompt.json").write_text("{}")
    with pytest.raises(CheckpointError, match="are not as they were saved"):
        JudgePrompt.load(tmp_path)


# ---- its tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("response", ["a red cat", "", "<answer>2\n</answer>\n"], ids=["text", "empty", "tags"])
def test_prompt_and_suffix_are_the_whole_conversation(family, response):  # covers L2
    _, processor = tiny.build(family)
    sample = sample_of(family)
    encoded = encode(processor, sample)
    suffix = JUDGE.suffix(processor, sample, response, ["black dog"])
    request = f"Is {response} good? black dog"
    end = tokens(processor, "Yes")
    assert suffix[-len(end) :] == end
    if family == "voxtral" and not response:
        assert suffix[0] == processor.tokenizer.eos_token_id, "its own template refuses an empty turn"
        return
    assert encoded.input_ids + suffix == encode(processor, followed(sample, response, request)).input_ids + end


def test_captions_reach_the_judge_only():  # covers L2
    _, processor = tiny.build("qwen2_5_vl")
    sample = sample_of("qwen2_5_vl")
    encoded = encode(processor, sample)
    before = copy.deepcopy(sample.prompt[0]["content"][1]), list(encoded.input_ids), dict(sample.columns)
    told, untold = JUDGE.suffix(processor, sample, "a", ["black dog"]), JUDGE.suffix(processor, sample, "a")
    assert "black dog" in processor.tokenizer.decode(told) and "black dog" not in processor.tokenizer.decode(untold)
    assert before == (sample.prompt[0]["content"][1], encoded.input_ids, sample.columns)
    assert encode(processor, sample).input_ids == encoded.input_ids


def test_a_tokenizer_and_a_templated_prompt_give_the_same():
    _, processor = tiny.build("qwen2_5_vl")
    words = copy.deepcopy(processor.tokenizer)
    words.chat_template = processor.chat_template
    sample = to_sample({"prompt": tiny.prompt("what is it", 0)})
    text = processor.apply_chat_template(sample.prompt, tokenize=False, add_generation_prompt=True)
    whole = encode(processor, followed(sample, "a cat", "Is a cat good?")).input_ids + tokens(words, "Yes")
    for its_processor in (processor, words):
        for its_sample in (sample, to_sample({"prompt": text})):
            prompt = encode(its_processor, its_sample).input_ids
            assert prompt + JUDGE.suffix(its_processor, its_sample, "a cat") == whole
    bare = copy.deepcopy(processor.tokenizer)
    assert JUDGE.suffix(bare, to_sample({"prompt": "what"}), "a cat") == (
        [*tokens(bare, "a cat"), bare.eos_token_id, *tokens(bare, "Is a cat good?\n"), *tokens(bare, "Yes")]
    ), "no template: EOS ends the response"


def llama_like(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before a text, and knows no special token between turns."""
    words = [*("<unk>", "<s>", "</s>", "\n", "a"), *("▁USER:", "▁ASSISTANT:", "▁what", "▁a", "▁cat", "▁Is")]
    words += ["▁good?", "▁Yes"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spaces, lines = pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([spaces, lines])
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content | trim + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content | trim + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("response", ["a cat", "  a cat\n"])
@pytest.mark.parametrize("gap", [" ", "\n"])
def test_a_tokenizer_that_begins_texts_otherwise_than_it_goes_on(response, gap):
    template = VICUNA.replace("'ASSISTANT: ' +", f"'ASSISTANT:' + {gap!r} +")
    if gap == "\n":
        template = template.replace("{{ 'ASSISTANT:' }}", "{{ 'ASSISTANT:\n' }}")
    words = llama_like(template)
    sample = to_sample({"prompt": tiny.prompt("what", 0)})
    suffix = JudgePrompt("Is {{ response | trim }} good?", " Yes").suffix(words, sample, response)
    whole = f"USER: what ASSISTANT:{gap}a cat USER: Is a cat good? ASSISTANT:{gap.strip(' ')} Yes"
    assert encode(words, sample).input_ids + suffix == tokens(words, whole)
    assert words.unk_token_id not in suffix


THINKING = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- set text = m.content if m.content is string else m.content[-1].text %}
{{- text.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else text }}{{ '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}BEGIN{% endif %}"""


@pytest.mark.parametrize("begin", ["", "<think>\n"], ids=["continued", "begins with a thought"])
def test_templates_that_leave_thoughts_out_do_not_leave_them_out_of_what_is_judged(begin):  # covers L2
    _, processor = tiny.build("qwen2_5_vl")
    words = copy.deepcopy(processor.tokenizer)
    words.chat_template = THINKING.replace("BEGIN", f"{{{{ {begin!r} }}}}")
    sample = to_sample({"prompt": tiny.prompt("what", 0)})
    assert words.decode(encode(words, sample).input_ids).endswith(f"<|im_start|>assistant\n{begin}")
    suffix = JUDGE.suffix(words, sample, "two dog</think>\n\na cat")
    asked = "<|im_start|>user\nIs two dog</think>\n\na cat good?<|im_end|>\n"
    assert words.decode(suffix) == f"two dog</think>\n\na cat<|im_end|>\n{asked}<|im_start|>assistant\n{begin}Yes"


def test_a_template_that_takes_no_second_turn():
    _, processor = tiny.build("qwen2_5_vl")
    words = copy.deepcopy(processor.tokenizer)
    words.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + (
        "{{ '<|im_start|>' + messages[0].content + '<|im_end|>' }}"
    )
    suffix = JUDGE.suffix(words, to_sample({"prompt": tiny.prompt("what", 0)}), "a cat")
    assert words.decode(suffix) == "a cat<|im_end|><|im_start|>Is a cat good?<|im_end|>Yes"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_a_response_or_a_caption_spells_is_a_text(family):  # covers L2
    model, processor = tiny.build(family)
    sample = sample_of(family)
    encoded = encode(processor, sample)
    words, ids = processor.tokenizer, placeholder_ids(model.config, processor)
    spelled = " ".join(words.convert_ids_to_tokens(list(ids))) + " <|im_end|>\n<|im_start|>user\n"
    suffix = JUDGE.suffix(processor, sample, f"a {spelled} cat", [spelled])
    assert not set(suffix) & set(ids)
    clean = JUDGE.suffix(processor, sample, "a cat", ["b"])
    special = set(words.all_special_ids)
    assert [token for token in suffix if token in special] == [token for token in clean if token in special]
    whole = torch.tensor([encoded.input_ids + suffix])
    inputs = collate([encoded], whole.size(1), [len(suffix)])
    with torch.no_grad():
        out = model(input_ids=whole, attention_mask=torch.ones_like(whole), **inputs)
    assert out.logits.isfinite().all()


def test_a_stem_with_a_media_token_is_refused():
    _, processor = tiny.build("qwen2_5_vl")
    with pytest.raises(EncodingError, match="The stem '<|image_pad|> is' of the judge's prompt holds a media token"):
        JudgePrompt(stem=f"{processor.image_token} is").suffix(processor, sample_of("qwen2_5_vl"), "a")


# ---- captions ---------------------------------------------------------------------------------------------------


def picture(folder: Path, name: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / name)
    return name


def seen(root: Path, *names: str, kind: str = "image", text: str = "what", where: str = "", **columns) -> Sample:
    parts = [{"type": kind}] * len(names)
    prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return to_sample({"prompt": prompt, f"{kind}s": list(names), **columns}, root, where)


def captions(folder: Path, content) -> Captions:
    (folder / "image_to_caption.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Captions.read(folder / "image_to_caption.json")


@pytest.mark.parametrize(
    "key", ["a.jpg", "a", "train/a.jpg", "train/a", "./train/a.jpg", "train\\a.jpg", "coco/a.jpg", "ROOT/train/a.jpg"]
)
def test_a_medium_is_found_by_its_name(tmp_path, key):  # covers L2
    found = captions(tmp_path, {key.replace("ROOT", str(tmp_path)): ["one", "two"], "b.jpg": ["other"]})
    assert sorted(found.of(seen(tmp_path, "train/a.jpg"))) == ["one", "two"]
    assert found.of(seen(tmp_path, "train/c.jpg")) == []
    assert found.of(to_sample({"prompt": tiny.prompt("what", 1), "images": [tiny.image(1)]})) == [], "no file"


@pytest.mark.parametrize(("kind", "name"), [("image", "a.png"), ("video", "a.mp4"), ("audio", "a.wav")])
def test_captions_of_every_kind(tmp_path, kind, name):  # covers L2
    assert captions(tmp_path, {name: "only one"}).of(seen(tmp_path, name, kind=kind)) == ["only one"]
    assert captions(tmp_path, {"a.jpg": "a picture's"}).of(seen(tmp_path, name, kind=kind)) == []


def test_the_longest_name_wins_and_what_could_be_two_is_refused(tmp_path):  # covers L2
    found = captions(tmp_path, {"a.jpg": "short", "train/a.jpg": "train", "test/a.jpg": "test"})
    assert [found.of(seen(tmp_path, f"{name}/a.jpg")) for name in ("train", "test", "x")] == [
        ["train"],
        ["test"],
        ["short"],
    ]
    two = captions(tmp_path, {"train/a.jpg": "train", "test/a.jpg": "test"})
    with pytest.raises(
        DataFormatError, match='both "train/a.jpg" and "test/a.jpg" could mean the image .*x/a.jpg — row 3'
    ):
        two.of(seen(tmp_path, "x/a.jpg", where="row 3"))


def test_all_media_contribute_in_order_and_a_rows_own_captions_win(tmp_path):  # covers L2
    found = captions(tmp_path, {"a.jpg": ["a1", "a2", " "], "b.jpg": ["b1", "b2"]})
    for seed in range(6):
        told = found.of(seen(tmp_path, "b.jpg", "a.jpg", "b.jpg"), seed)
        assert sorted(told[:2]) == ["b1", "b2"] and sorted(told[2:]) == ["a1", "a2"]
    assert found.of(seen(tmp_path, "a.jpg", captions=["own"])) == ["own"]
    assert found.of(seen(tmp_path, "a.jpg", captions=[])) == []
    assert sorted(found.of(seen(tmp_path, "a.jpg", captions=None))) == ["a1", "a2"]
    assert Captions().of(seen(tmp_path, "a.jpg", captions="own")) == ["own"]
    with pytest.raises(DataFormatError, match='row 2: "captions" holds 7. Give a list of texts'):
        found.of(seen(tmp_path, "a.jpg", captions=["own", 7], where="row 2"))


ORDERS = """
import sys; sys.path.insert(0, sys.argv[1])
from vlm_grpo.data import to_sample
from vlm_grpo.judging.captions import Captions
from pathlib import Path
found = Captions({"a.jpg": [str(i) for i in range(8)]})
for text in ("one", "two"):
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    row = {"prompt": prompt, "image": "a.jpg", "chosen": "yes", "rejected": "no"}
    print("".join(found.of(to_sample(row, Path(sys.argv[2])), 3)))
"""


def test_one_order_a_pair_in_every_process(tmp_path):  # covers L2: captions shuffled differently for the two outputs
    texts = [str(i) for i in range(8)]
    found = Captions({"a.jpg": texts})
    pairs = [seen(tmp_path, "a.jpg", text=f"question {i}", chosen="yes", rejected="no") for i in range(6)]
    orders = ["".join(found.of(sample, 3)) for sample in pairs]
    assert orders == ["".join(found.of(sample, 3)) for sample in pairs], "both outputs of a pair"
    assert orders[::-1] == ["".join(found.of(sample, 3)) for sample in pairs[::-1]], "wherever the row stands"
    assert len(set(orders)) == 6 and all(sorted(order) == texts for order in orders)
    assert orders != ["".join(found.of(sample, 4)) for sample in pairs], "another seed"
    swapped = seen(tmp_path, "a.jpg", text="question 0", chosen="no", rejected="yes")
    assert "".join(found.of(swapped, 3)) == orders[0], "the order says nothing about which answer is better"
    root = str(Path(__file__).parents[1])
    said = {
        subprocess.run(
            [sys.executable, "-c", ORDERS, root, str(tmp_path / f"elsewhere{hash_seed}")],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    here = [seen(tmp_path, "a.jpg", text=text, chosen="yes", rejected="no") for text in ("one", "two")]
    assert said == {"".join("".join(found.of(sample, 3)) + "\n" for sample in here)}


def test_how_many_rows_have_captions(tmp_path):  # covers L2
    found = captions(tmp_path, {"a.jpg": "a", "b.jpg": []})
    rows = [seen(tmp_path, name) for name in ("a.jpg", "b.jpg", "c.jpg")] + [
        seen(tmp_path),
        seen(tmp_path, captions=["own"]),
    ]
    coverage = found.check(rows)
    assert (coverage.found, coverage.missing) == (2, 2)
    assert str(coverage) == f"2 of 4 rows have no caption (first: {tmp_path / 'b.jpg'})"
    assert str(found.check(rows[:1])) == ""
    with pytest.raises(
        DataFormatError, match='No row has a caption: .* has those of "a.jpg", "b.jpg", and the first .*c.jpg'
    ):
        found.check(rows[2:4])
    with pytest.raises(DataFormatError, match='"a.jpg" is the name of both .*train/a.jpg and .*test/a.jpg — row 2'):
        found.check([seen(tmp_path, "train/a.jpg"), seen(tmp_path, "test/a.jpg", where="row 2")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "are no JSON"),
        ("[" * 100_000, "are no JSON"),
        ('["a.jpg"]', "are a list. Give a JSON object such as"),
        ('{"a.jpg": 7}', 'a caption of "a.jpg" is 7. Give a text'),
        ('{"a.jpg": ["x", null]}', 'a caption of "a.jpg" is None'),
        ('{"a.jpg": {"text": "x"}}', 'a caption of "a.jpg" is '),
        ('{"a.jpg": "x", "a.jpg": "y"}', '"a.jpg" stands there twice'),
        ('{"a.jpg": "x", "./a.jpg": "y"}', '"a.jpg" and "./a.jpg" name the same file'),
        ('{"": "x"}', "'' is no name of a file"),
    ],
)
def test_a_file_that_holds_no_captions(tmp_path, content, message):  # covers L2
    with pytest.raises(DataFormatError, match=message) as caught:
        captions(tmp_path, content)
    assert "image_to_caption.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataFormatError, match="gone.json cannot be read .No such file"):
        Captions.read(tmp_path / "gone.json")


def test_a_long_request_in_one_line_is_no_file_of_the_run():
    # covers L2
    """A name of so many letters is one that the system refuses to look for."""
    request = "How good is this response, " + "really, " * 60 + "as a number?"
    config = RunConfig.model_validate({"model": "m", "judge": {"prompt": request}})
    judging = read_judging(config)
    assert judging.judge.template == request and judging.files == ()
