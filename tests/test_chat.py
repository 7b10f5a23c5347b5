"""Conversations: every medium, several turns, streamed, the base beside the trained model; on terminals and pipes."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from vlm_grpo import chat as chats
from vlm_grpo import terminal
from vlm_grpo.cli import app
from vlm_grpo.conversation import Conversation, positions, without_adapter
from vlm_grpo.data import to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import ConfigError, EncodingError, MediaError, OverlongError
from vlm_grpo.evaluate import complete

MEDIA = {
    "image": lambda seed: tiny.image(seed),
    "video": lambda seed: tiny.video(seed),
    "audio": lambda s: tiny.audio(s),
}


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return tiny.build("qwen2_5_vl", seed=3)


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Any]:
    """A model with a shaken adapter, and a head that was trained whole beside it."""
    model, processor = tiny.build("qwen2_5_vl", seed=3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
            elif "lm_head.modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model, processor


@pytest.fixture
def loaded(plain: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(chats, "load_model", lambda run, **how: plain)
    return plain


def picture(folder: Path, seed: int, name: str = "") -> str:
    path = folder / (name or f"{seed}.png")
    tiny.image(seed).save(path)
    return str(path)


def said(role: str, text: str, **media: Any) -> dict[str, Any]:
    parts = [{"type": kind, kind: value} for kind, values in media.items() for value in values]
    return {"role": role, "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}


def expected(model: Any, processor: Any, messages: list[dict[str, Any]], length: int) -> str:
    """The answer to a whole prompt, as evaluation gives it."""
    return complete(model, processor, [encode(processor, to_sample({"prompt": messages}))], length)[0]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: Any, tty: bool = True) -> None:
    """Put lines on the standard input; an exception is raised in place of its line."""
    left = iter(lines)

    def line(prompt: str = "") -> str:
        given = next(left, EOFError())
        if isinstance(given, BaseException):
            raise given
        return given

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: tty, raising=False)


# ---- in Python -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"image": 1}),
        ("qwen2_5_vl", {"image": 3}),
        ("qwen2_5_vl", {"image": 1, "video": 1}),
        ("qwen2_audio", {"audio": 2}),
    ],
)
def test_every_medium_is_asked_about(family: str, counts: dict[str, int]):  # covers U11
    model, processor = tiny.build(family, seed=3)
    answers = set()
    for seed in (1, 20):
        media = {kind: [MEDIA[kind](seed + i) for i in range(count)] for kind, count in counts.items()}
        conversation = Conversation(model, processor, max_new_tokens=8)
        answer = conversation.ask("what is this", **{f"{kind}s": values for kind, values in media.items()})
        assert answer == expected(model, processor, [said("user", "what is this", **media)], 8)
        answers.add(answer)
    assert len(answers) == 1 + bool(counts), "the media matter"


def test_a_text_model_converses(plain: Any):
    conversation = Conversation(plain[0], plain[1].tokenizer, max_new_tokens=4)
    plain[1].tokenizer.chat_template = plain[1].chat_template
    assert conversation.ask("what is this") != "" and conversation.ask("and the color") is not None
    with pytest.raises(EncodingError):
        conversation.ask("what is this", images=[tiny.image(1)])


def test_turns_keep_their_media_and_a_later_turn_may_bring_more(plain: Any):
    first, second = tiny.image(1), tiny.image(2, (84, 56))
    conversation = Conversation(*plain, max_new_tokens=6, system="answer with one digit")
    answers = [
        conversation.ask("what is this", images=[first]),
        conversation.ask("and this", images=[second]),
        conversation.ask("count"),
    ]
    messages = [
        said("system", "answer with one digit"),
        said("user", "what is this", image=[first]),
        said("assistant", answers[0]),
        said("user", "and this", image=[second]),
        said("assistant", answers[1]),
        said("user", "count"),
    ]
    for turn, length in enumerate((2, 4, 6)):
        assert answers[turn] == expected(*plain, messages[:length], 6)
    conversation.reset()
    assert conversation.messages == messages[:1]
    assert conversation.ask("count") == expected(*plain, [messages[0], said("user", "count")], 6)


def test_streaming_gives_the_same_text_in_pieces(plain: Any):
    for seed in range(4):
        pieces: list[str] = []
        conversation = Conversation(*plain, max_new_tokens=12)
        streamed = conversation.ask("read", images=[tiny.image(seed)], show=pieces.append)
        conversation.reset()
        assert "".join(pieces) == streamed == conversation.ask("read", images=[tiny.image(seed)])
        assert len(pieces) > 3 and "" not in pieces


def test_a_character_of_several_tokens_is_shown_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vlm_grpo.conversation import _Pieces

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    text, pieces = "né 语 🙂 a", []
    streamer = _Pieces(words, pieces.append)
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in [*words(" " + text + " \n", add_special_tokens=False)["input_ids"], words.eos_token_id]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["n", "é", " 语", " 🙂", " a"]
    torn: list[str] = []
    streamer = _Pieces(words, torn.append)
    streamer.put(torch.tensor([[5]]))
    for token in words("a语", add_special_tokens=False)["input_ids"][:-1]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(torn) == "a\ufffd", "an answer that ends within a character"


def test_every_end_token_ends_and_no_placeholder_is_said(plain: Any, monkeypatch: pytest.MonkeyPatch):
    model, processor = plain
    shown: list[str] = []
    whole = Conversation(model, processor, max_new_tokens=12).ask("read", images=[tiny.image(1)])
    ids = processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
    # The tokenizer's own end token counts too, where the model's generation config names another.
    monkeypatch.setattr(model.generation_config, "eos_token_id", ids[3])
    cut = Conversation(model, processor, max_new_tokens=12).ask("read", images=[tiny.image(1)], show=shown.append)
    end = ids.index(ids[3]) + 1
    assert cut == processor.tokenizer.decode(ids[:end]).strip() == "".join(shown)
    seen: dict[str, Any] = {}
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: seen.update(options) or generate(**options))
    Conversation(model, processor, max_new_tokens=2).ask("read")
    assert {model.config.image_token_id, model.config.video_token_id} <= set(seen["suppress_tokens"])
    assert set(seen["eos_token_id"]) == {ids[3], tiny.EOS}


def test_a_temperature_draws_from_all_tokens_whatever_the_models_own_config_says(
    plain: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plain[0].generation_config, "top_k", 1)  # as Qwen2-VL is published
    conversation = Conversation(*plain, max_new_tokens=6, temperature=3.0)
    torch.manual_seed(0)
    answers = set()
    for _ in range(3):
        answers.add(conversation.ask("read"))
        conversation.reset()
    assert len(answers) == 3


def test_misuse_is_one_sentence_and_leaves_no_trace(plain: Any, tmp_path: Path):
    conversation = Conversation(*plain, max_new_tokens=2)
    with pytest.raises(MediaError, match="absent.png"):
        conversation.ask("what is this", images=[str(tmp_path / "absent.png")])
    with pytest.raises(EncodingError, match="cannot take an audio part: it has no audio processor"):
        conversation.ask("what is this", audios=[tiny.audio(1)])
    with pytest.raises(ConfigError, match="The question is empty. Give it a text, or a picture"):
        conversation.ask(" ")
    with pytest.raises(ConfigError, match="no adapter that could be switched off"):
        conversation.ask("what is this", of_base=True)
    with pytest.raises(EncodingError, match="holds the image token"):
        conversation.ask("what is <|image_pad|>")
    limit = positions(plain[0])
    assert limit == 4096
    with pytest.raises(OverlongError, match=r"has \d+ tokens, media included, and the model takes 4096 with its"):
        conversation.ask("one " * 4100)
    with pytest.raises(ConfigError, match="temperature=-1"):
        Conversation(*plain, temperature=-1)
    assert conversation.messages == []
    assert conversation.ask("", images=[tiny.image(1)]) == expected(
        *plain, [said("user", "", image=[tiny.image(1)])], 2
    )


def test_an_answer_ends_where_the_positions_end(plain: Any, monkeypatch: pytest.MonkeyPatch):
    length = len(Conversation(*plain).read("count").encoded.input_ids)
    monkeypatch.setattr(plain[0].config.get_text_config(), "max_position_embeddings", length + 3)
    short = Conversation(*plain, max_new_tokens=50).ask("count")
    monkeypatch.undo()
    assert short == Conversation(*plain, max_new_tokens=3).ask("count")


# ---- the base --------------------------------------------------------------------------------------------------------


def test_the_base_answers_as_the_model_before_training(adapted: Any, plain: Any):
    picture_ = tiny.image(1)
    conversation = Conversation(*adapted, max_new_tokens=8)
    trained, base = conversation.compare("what is this", images=[picture_])
    asked = [said("user", "what is this", image=[picture_])]
    assert base == expected(*plain, asked, 8), "the head that was trained whole is the base's own too"
    assert trained == expected(*adapted, asked, 8) and trained != base
    assert conversation.messages[-1] == said("assistant", trained)
    follow = conversation.ask("and the color", of_base=True)
    assert follow == expected(*plain, [*asked, said("assistant", trained), said("user", "and the color")], 8)


def test_an_untrained_adapter_answers_as_its_base():
    model, processor = tiny.build("qwen2_5_vl", seed=3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    trained, base = Conversation(model, processor, max_new_tokens=8).compare("read", images=[tiny.image(1)])
    assert trained == base


def state(model: Any) -> Any:
    layers = [m for m in model.modules() if hasattr(m, "disable_adapters")]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return flags, [layer.disable_adapters for layer in layers], model.active_adapters, model.training


@pytest.mark.parametrize("training", [False, True])
def test_the_adapter_is_as_before_after_a_comparison(adapted: Any, training: bool):
    model, processor = adapted
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)  # a flag that PEFT would set again
    model.train(training)
    before = state(model)
    Conversation(model, processor, max_new_tokens=2).compare("read")
    assert state(model) == before

    def stop(piece: str) -> None:
        assert all(layers for layers in state(model)[1]) and not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Conversation(model, processor, max_new_tokens=6).ask("read", images=[tiny.image(1)], of_base=True, show=stop)
    assert state(model) == before
    with without_adapter(model):
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    assert state(model) == before
    frozen.requires_grad_(True)
    model.eval()


def test_a_run_that_trained_the_model_itself_is_compared_with_what_it_started_from(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
):
    (tmp_path / "config.yaml").write_text("model: before\n")
    other = tiny.build("qwen2_5_vl", seed=4)
    monkeypatch.setattr(chats, "load_model", lambda run, **how: other if run == "before" else plain)
    path = picture(tmp_path, 1)
    with caplog.at_level("INFO", "vlm_grpo"):
        answer = chats.chat(str(tmp_path), [path], "what is this", 6, compare_base=True)
    asked = [said("user", "what is this", image=[path])]
    trained, base = (expected(*built, asked, 6) for built in (plain, other))
    assert answer == trained != base
    assert capsys.readouterr().out == f"trained: {trained}\nbase: {base}\n"
    assert "before is loaded beside it, with as much memory again" in caplog.text
    with pytest.raises(ConfigError, match="owner/name has no adapter, and no config.yaml that names .* ask without"):
        chats.chat("owner/name", [path], "what is this", compare_base=True)


# ---- one question ----------------------------------------------------------------------------------------------------


def test_one_question_is_answered_about_the_picture(loaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, second = picture(tmp_path, 1), picture(tmp_path, 2)
    answers = [chats.chat("runs/x", [path], "what color is this", 8) for path in (first, second)]
    asked = [[said("user", "what color is this", image=[path])] for path in (first, second)]
    assert answers == [expected(*loaded, messages, 8) for messages in asked]
    assert answers[0] != answers[1], "the picture matters"
    whole = chats.chat("runs/x", [second], "what color is this", 8, stream=False)
    assert capsys.readouterr().out == f"{answers[0]}\n{answers[1]}\n{whole}\n" and whole == answers[1]


def test_a_missing_or_broken_file_is_said_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chats, "load_model", lambda run, **how: pytest.fail("loaded"))
    with pytest.raises(MediaError, match='The image ".*absent.png" does not exist. Correct the path'):
        chats.chat("runs/x", [str(tmp_path / "absent.png")], "what is this")
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    with pytest.raises(MediaError, match='The audio ".*torn.wav" cannot be read'):
        chats.chat("runs/x", prompt="what is this", audios=[str(tmp_path / "torn.wav")])


def test_a_run_answers_as_it_was_trained(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = "# vlm-grpo train\nmodel: m\nload_in_4bit: true\nbackend: hf\ntrain: {chat_template_kwargs: {a: 1}}\n"
    (tmp_path / "config.yaml").write_text(written)
    seen: list[Any] = []
    monkeypatch.setattr(chats, "load_model", lambda run, **how: seen.append(how) or plain)
    kinds: list[Any] = []
    monkeypatch.setattr(chats, "Conversation", lambda *a, **k: kinds.append(k) or Conversation(*a, **k))
    (tmp_path / "checkpoint-5").mkdir()
    for run in (tmp_path, tmp_path / "checkpoint-5"):
        (run / "adapter_config.json").write_text("{}")
        chats.chat(str(run), [], "what color is this", 2)
    assert seen == [{"load_in_4bit": True, "dtype": "auto", "backend": "hf"}] * 2
    assert [options["template"] for options in kinds] == [{"a": 1}] * 2
    (tmp_path / "adapter_config.json").unlink()
    chats.chat(str(tmp_path), [], "what color is this", 2)
    assert seen[-1] == {"load_in_4bit": False, "dtype": "float32", "backend": "hf"}, "weights that were trained whole"


# ---- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("what is this", None),
        ("/usr/bin is what?", None),
        ("/image a.png", ("image", ["a.png"])),
        ("  /IMAGE 'my cat.png' b.png", ("image", ["my cat.png", "b.png"])),
        (r"/video my\ clip.mp4", ("video", ["my clip.mp4"])),
        ("/base", ("base", [])),
        ("exit", ("quit", [])),
        ("/quit", ("quit", [])),
    ],
)
def test_commands_are_told_from_questions(line: str, parsed: Any):
    assert terminal.parse(line) == parsed


def test_a_command_that_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match='There is no command /imgae. Did you mean "/image"'):
        terminal.parse("/imgae a.png")
    with pytest.raises(ConfigError, match="/audio needs a file"):
        terminal.parse("/audio ")
    with pytest.raises(ConfigError, match="no closing quotation. Close the quote"):
        terminal.parse('/image "my cat.png')
    monkeypatch.chdir(tmp_path)
    picture(tmp_path, 1, "cat's picture.png")
    assert terminal.parse("/image cat's picture.png") == ("image", ["cat's picture.png"]), "a file's name as it is"


def test_a_session_shows_media_in_any_turn_and_goes_on_after_a_bad_one(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first, second = picture(tmp_path, 1), picture(tmp_path, 2, "a b.png")
    sound = tmp_path / "s.wav"
    sound.write_bytes(b"RIFF....WAVE")
    lines = ["what is this", f"/image {tmp_path}/absent.png", f"/audio {sound}", f'/image "{second}"', "", "/reset"]
    typed(monkeypatch, *lines, KeyboardInterrupt(), "", "count", "/help", "/quit", "never asked")
    answer = chats.chat("runs/x", [first], None, 6)
    asked = [said("user", "what is this", image=[first])]
    one = expected(*loaded, asked, 6)
    asked += [said("assistant", one), said("user", "", image=[second])]
    two, three = expected(*loaded, asked, 6), expected(*loaded, [said("user", "count")], 6)
    out, notes = capsys.readouterr()
    assert answer == three
    assert out == f"model: {one}\nmodel: {two}\nmodel: {three}\n"
    for note in ('absent.png" does not exist', "cannot take an audio part", "With the next question", "/compare"):
        assert note in notes, note


def test_base_and_compare_are_switched_while_talking(
    adapted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(chats, "load_model", lambda run, **how: adapted)
    typed(monkeypatch, "read", "/reset", "/base", "read", "/base", "/reset", "/compare", "read")
    chats.chat("runs/x", None, None, 6)
    trained, base = (expected(*built, [said("user", "read")], 6) for built in (adapted, plain))
    out, notes = capsys.readouterr()
    assert out == f"model: {trained}\nbase: {base}\ntrained: {trained}\nbase: {base}\n"
    assert "before training answers (adapter off)" in notes and "trained model answers (adapter on)" in notes


def test_ctrl_c_stops_an_answer_and_keeps_the_session(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[Any] = []
    read = Conversation.read
    monkeypatch.setattr(
        Conversation, "read", lambda self, *a, **k: seen.append([*self.messages]) or read(self, *a, **k)
    )
    pieces: list[str] = []

    def write(text: str, out: Any = terminal._print) -> None:
        pieces.append(text)
        if len(pieces) == 3:  # the label and two pieces
            raise KeyboardInterrupt
        out(text)

    monkeypatch.setattr(terminal, "_print", write)
    typed(monkeypatch, "read", "count", "/quit")
    answer = chats.chat("runs/x", [picture(tmp_path, 1)], None, 8)
    stopped = "".join(pieces[1:3])
    whole = expected(*loaded, [said("user", "read", image=[picture(tmp_path, 1)])], 8)
    assert whole.startswith(stopped) and whole != stopped
    assert [m["role"] for m in seen[1]] == ["user", "assistant"] and seen[1][1] == said("assistant", stopped)
    assert answer and "Stopped." in capsys.readouterr().err


def test_an_interrupt_before_the_first_word_asks_nothing(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    complete, calls = Conversation.answer, []

    def answer(self: Any, question: Any, **options: Any) -> str:
        calls.append(question)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return complete(self, question, **options)

    monkeypatch.setattr(Conversation, "answer", answer)
    typed(monkeypatch, "read", "read")
    path = picture(tmp_path, 1)
    assert chats.chat("runs/x", [path], None, 4) == expected(*loaded, [said("user", "read", image=[path])], 4)
    typed(monkeypatch, "read", tty=False)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        chats.chat("runs/x", None, None, 4)


# ---- from a pipe, through the command line ---------------------------------------------------------------------------


def test_a_pipe_is_answered_line_by_line(loaded: Any, tmp_path: Path):
    path = picture(tmp_path, 1)
    lines = f"read\n\n/image {tmp_path}/absent.png\n/reset\n/image {path}\nwhat is this\n"
    result = CliRunner().invoke(app, ["chat", "runs/x", "--max-new-tokens", "6", "--system", "look"], input=lines)
    assert result.exit_code == 0, result.output
    system = said("system", "look")
    asked = [[system, said("user", "read")], [system, said("user", "what is this", image=[path])]]
    assert result.stdout.splitlines() == [expected(*loaded, messages, 6) for messages in asked]
    assert result.stderr.count("\n") == 1 and "absent.png" in result.stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_of_another_encoding_end_no_session(loaded: Any, monkeypatch: pytest.MonkeyPatch, errors: str):
    stdin = io.TextIOWrapper(io.BytesIO(b"red\nr\xe9d\nread\n"), "utf-8", errors)
    monkeypatch.setattr("sys.stdin", stdin)
    asked: list[str] = []
    monkeypatch.setattr(Conversation, "answer", lambda self, question, **how: asked.append(question) or "so")
    assert chats.chat("runs/x", as_json=True) == "so" and len(asked) == 3
    assert chats.chat("runs/x", prompt="r\udce9d") == "so"
    assert chats.chat("runs/x", prompt="café 图") == "so"


def test_json_is_a_line_a_question(adapted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chats, "load_model", lambda run, **how: adapted)
    options = ["chat", "runs/x", "--max-new-tokens", "6", "--json"]
    trained, base = (expected(*built, [said("user", "read")], 6) for built in (adapted, plain))
    one = CliRunner().invoke(app, [*options, "--prompt", "read", "--compare-base"])
    assert json.loads(one.stdout) == {"question": "read", "answer": trained, "base_answer": base}
    several = CliRunner().invoke(app, options, input="read\n/reset\n/base\nread\n/image none.png\n")
    assert [json.loads(line) for line in several.stdout.splitlines()] == [
        {"question": "read", "answer": trained, "base_answer": None},
        {"question": "read", "answer": None, "base_answer": base},
        {"question": "/image none.png", "error": 'The image "none.png" does not exist. Correct the path.'},
    ]
    assert CliRunner().invoke(app, [*options, "--temperature", "-1"]).exit_code == 2


def test_help_is_there_without_torch():
    code = (
        "import sys, vlm_grpo.cli\n"
        "try: vlm_grpo.cli.app(['chat', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--compare-base" in done.stdout and "/image PATH" in done.stdout
