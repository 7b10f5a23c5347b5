"""The flow check: every kind of medium is shown to reach the loss, and what keeps it from that is named."""

import logging
import random
import re
import time

import numpy as np
import pytest
import recorder
import tiny
import torch
from datasets import Dataset, IterableDataset
from test_exact import with_adapter

import vlm_grpo.group.forward
import vlm_grpo.group.rollout
import vlm_grpo.scoring
import vlm_grpo.trainer
from vlm_grpo.collate import collate
from vlm_grpo.errors import FlowError, MediaError
from vlm_grpo.flow import FlowCheck

KINDS = ("image", "video", "audio")
LINE = re.compile(
    r"Flow check: (\w+) reaches the loss \(blanking moves log-probs by (\S+) nats, noise (\S+); "
    r"rollout and training agree to (\S+); (?:(\d+) features for (\d+) tokens|features not counted)\)\."
)


def row(text: str = "count one", **media) -> dict:
    """A row with these media by kind, a seed or a medium each."""
    made = {kind: getattr(tiny, kind)(seed) if isinstance(seed, int) else seed for kind, seed in media.items()}
    counts = {f"{kind}s": int(kind in made) for kind in KINDS}
    return {"prompt": tiny.prompt(text, **counts), **{f"{kind}s": [medium] for kind, medium in made.items()}}


def table(*rows: dict) -> Dataset:
    columns = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])


def three(kind: str, family: str = "qwen2_5_vl") -> Dataset:
    """Two rows with different media of a kind, and a text row between them where the family takes one."""
    between = row("count two") if f"{kind} none" in tiny.CASES[family] else row("count two", **{kind: 3})
    return table(row(**{kind: 1}), between, row("count three", **{kind: 2}))


def make(data, path, family="qwen2_5_vl", *, model=None, **options):
    built, processor = tiny.build(family)
    arguments = {name: options.pop(name) for name in ("media", "media_root") if name in options}
    options = {"steps_per_generation": 1, "gradient_accumulation_steps": 1, **options}
    config = checked(path, per_device_train_batch_size=options.pop("rows", 4), **options)
    return recorder.Recorder(model or built, recorder.reward, config, data, processing_class=processor, **arguments)


def check(trainer, caplog) -> dict[str, re.Match]:
    """Make the check as the beginning of training does; its lines by kind."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "vlm_grpo"):
        FlowCheck(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
    found = [LINE.fullmatch(message) for message in caplog.messages if message.startswith("Flow check")]
    assert all(found), caplog.messages
    return {match[1]: match for match in found if match}


# Families that add features to those they make: a line end to each clip, padding to each sound.
ADDED = {"llava_onevision": {"video": 1}, "gemma3n": {"audio": 13}}


def assert_shown(lines: dict[str, re.Match], kinds, family: str = "") -> None:
    assert list(lines) == list(kinds)
    for line in lines.values():
        assert float(line[2]) > 1e-2 and float(line[3]) == 0 and float(line[4]) < 1e-5
        assert line[5] is None or int(line[6]) - int(line[5]) == ADDED.get(family, {}).get(line[1], 0)


# ---- what passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in tiny.KINDS for kind in tiny.KINDS[family]])
def test_every_kind_of_every_family_is_shown(family, kind, tmp_path, caplog):
    # covers Q2 A11
    assert_shown(check(make(three(kind, family), tmp_path, family), caplog), [kind], family)


@pytest.mark.parametrize("family", [family for family, kinds in tiny.KINDS.items() if len(kinds) > 1])
def test_mixed_rows_make_one_line_a_kind(family, tmp_path, caplog):
    kinds = tiny.KINDS[family]
    rows = [row(f"count {tiny.WORDS[i]}", **{kind: i}) for i, kind in enumerate((*kinds, kinds[-1]))]
    assert_shown(check(make(table(row("what"), *rows), tmp_path, family), caplog), kinds, family)


def test_a_row_with_several_kinds_counts_for_each(tmp_path, caplog):
    trainer = make(table(row(image=1, video=2), row(image=3, video=4)), tmp_path, rows=2)
    assert_shown(check(trainer, caplog), ["image", "video"])


@pytest.mark.parametrize(
    "options", [{"rows": 2}, {"rows": 2, "steps_per_generation": 2}, {"temperature": 2.0, "top_k": 3, "min_p": 0.1}]
)
def test_it_follows_the_runs_batches_and_sampling(options, tmp_path, caplog):
    assert_shown(check(make(three("image"), tmp_path, **options), caplog), ["image"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_sixteen_bits_are_no_false_alarm(dtype, tmp_path, caplog):
    model = tiny.build("qwen2_5_vl")[0].to(dtype)
    trainer = make(three("video"), tmp_path, model=model, bf16=dtype is None)
    (line,) = check(trainer, caplog).values()
    assert float(line[2]) > 0.1 and float(line[4]) < 0.05


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_checkpointing_and_a_reference(trained, tmp_path, caplog):
    model = with_adapter(tiny.build("qwen2_5_vl")[0], trained)
    trainer = make(three("image"), tmp_path, model=model, beta=0.1)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_shown(check(trainer, caplog), ["image"])


def test_blank_media_are_replaced_by_noise(tmp_path, caplog):
    data = table(*(row(text, video=np.zeros((4, 56, 56, 3), np.uint8)) for text in ("count one", "count two")))
    assert_shown(check(make(data, tmp_path), caplog), ["video"])


def test_pixel_bounds_keep_the_tokens_of_a_blank(tmp_path, caplog):
    pictures = (tiny.image(1, (113, 87)), tiny.image(2, (87, 113)))
    trainer = make(table(*(row(image=p) for p in pictures)), tmp_path, media={"max_pixels": 5000})
    assert_shown(check(trainer, caplog), ["image"])


def test_a_video_that_is_heard_counts_for_both(tmp_path, caplog, monkeypatch):
    from vlm_grpo.media import Medium

    monkeypatch.setattr(Medium, "open_audio", lambda self, rate, run=None: tiny.audio(len(self.label), 1.0, rate))
    trainer = make(three("video"), tmp_path, "qwen2_5_omni_thinker", media={"audio_in_video": True})
    assert_shown(check(trainer, caplog), ["video", "audio"])


def test_text_alone_needs_no_check(tmp_path, caplog):
    assert not check(make(table(row("one"), row("two")), tmp_path), caplog)


# ---- which rows -------------------------------------------------------------------------------------------------


def test_a_rare_kind_is_found_without_reading_the_others(tmp_path, caplog, monkeypatch):
    rows = [row(f"count {i % 10}") for i in range(3000)]
    rows[2345] = row("what", video=1)
    rows[7] = row("what", image=1)
    data = table(*rows)
    trainer = make(data.shuffle(seed=0), tmp_path)
    read = []
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, i, get=Dataset.__getitem__: read.append(i) or get(self, i))
    assert_shown(check(trainer, caplog), ["image", "video"])
    assert len(read) < 30


def test_media_inside_messages_are_found(tmp_path, caplog):
    path = tmp_path / "p.png"
    tiny.image(1).save(path)
    part = {"type": "image", "image": str(path), "text": None}
    plain = {"type": "text", "image": None, "text": "count one"}
    rows = [{"prompt": [{"role": "user", "content": [plain]}]} for _ in range(60)]
    rows[30] = {"prompt": [{"role": "user", "content": [part, plain]}]}
    assert_shown(check(make(Dataset.from_list(rows), tmp_path), caplog), ["image"])


def test_bad_media_are_passed_over_or_stop(tmp_path, caplog):
    rows = [{"prompt": tiny.prompt(), "image": str(tmp_path / name)} for name in ("a.png", "b.png")]
    tiny.image(1).save(tmp_path / "b.png")
    trainer = make(table(*rows, row("what")), tmp_path, media={"on_bad": "drop"})
    assert_shown(check(trainer, caplog), ["image"])
    assert not trainer.intake.left_out
    with pytest.raises(MediaError, match="a.png"):
        check(make(table(*rows), tmp_path), caplog)


def test_streamed_rows_are_checked_when_they_come(tmp_path, caplog):
    data = three("image")
    trainer = make(IterableDataset.from_generator(lambda: iter(data)), tmp_path)
    flow = FlowCheck(trainer)
    with caplog.at_level(logging.INFO, "vlm_grpo"):
        flow.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert flow.pending and not caplog.messages
        flow.check_rows(list(data))
        flow.check_rows(list(data))
    assert [LINE.fullmatch(message)[1] for message in caplog.messages if "Flow" in message] == ["image"]


# ---- what is caught ---------------------------------------------------------------------------------------------


def break_collate(monkeypatch, change) -> None:
    """``change(inputs, encodings)`` spoils what the trainer's collate returns, for rollout and training alike."""

    def broken(encodings, *args, **kwargs):
        inputs = collate(encodings, *args, **kwargs)
        return change(inputs, encodings) or inputs

    for module in (vlm_grpo.trainer, vlm_grpo.scoring, vlm_grpo.group.forward, vlm_grpo.group.rollout):
        monkeypatch.setattr(module, "collate", broken)


def lacking(*keys: str):
    def drop(inputs, encodings):
        for key in keys:
            inputs.pop(key, None)

    return drop


def swapping(key: str):
    def swap(inputs, encodings):
        if key in inputs:
            inputs[key] = torch.cat([encoded.media[key] for encoded in reversed(encodings) if encoded.media])

    return swap


@pytest.mark.parametrize("sharing", [True, False])
def test_a_collate_that_drops_videos_is_caught(sharing, tmp_path, caplog, monkeypatch):
    # covers Q2 A11
    break_collate(monkeypatch, lacking("pixel_values_videos"))
    message = (
        r"^The video of row 0 of train_dataset does not reach the loss whole: the model makes 0 video features .* 8 of"
    )
    with pytest.raises(FlowError, match=message) as caught:
        check(make(three("video"), tmp_path, group_sharing=sharing), caplog)
    assert "qwen2_5_vl" in str(caught.value) and "flow_check=False" in str(caught.value)
    break_collate(monkeypatch, lacking("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"))
    with pytest.raises(FlowError, match=r"row 0 of train_dataset"):
        check(make(three("video"), tmp_path, group_sharing=sharing), caplog)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_collate_that_drops_sound_is_caught(sharing, tmp_path, caplog, monkeypatch):
    # covers Q2 A11
    break_collate(monkeypatch, lacking("input_features"))
    with pytest.raises(
        FlowError, match=r"^The audio of row 0 of train_dataset does not reach the loss: blanking .* 0\.0e\+00"
    ):
        check(make(three("audio"), tmp_path, "qwen2_audio", group_sharing=sharing), caplog)


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2_5_vl", "image"), ("qwen2_5_vl", "video"), ("qwen2_audio", "audio")]
)
def test_a_collate_that_swaps_media_is_caught(family, kind, tmp_path, caplog, monkeypatch):
    # covers Q2 A11
    keys = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
    break_collate(monkeypatch, swapping(keys[kind]))
    with pytest.raises(
        FlowError, match=rf"^A training batch reads the {kind} of row 0 of train_dataset differently.* mixes"
    ):
        check(make(three(kind), tmp_path, family, group_sharing=False), caplog)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_hide_no_swap(dtype, tmp_path, caplog, monkeypatch):
    break_collate(monkeypatch, swapping("pixel_values"))
    with pytest.raises(FlowError, match="A training batch reads the image"):
        model = tiny.build("qwen2_5_vl")[0].to(dtype)
        check(make(three("image"), tmp_path, model=model, group_sharing=False), caplog)


def test_generation_that_sees_something_else_is_caught(tmp_path, caplog):
    class Blind(recorder.Recorder):
        def _generate_single_turn(self, prompt_ids, images, fields, *args, **kwargs):
            blind = [vlm_grpo.trainer.EncodedPrompt(e.input_ids, e.tokens, {}) for e in fields["encodings"]]
            return super()._generate_single_turn(prompt_ids, images, {"encodings": blind}, *args, **kwargs)

    trainer = make(three("image"), tmp_path, "llava")
    trainer.__class__ = Blind
    with pytest.raises(FlowError, match=r"^Generation and training disagree on the image of row 0 of train_dataset"):
        check(trainer, caplog)


def test_what_the_model_raises_is_one_sentence(tmp_path, caplog, monkeypatch):
    def cut(inputs, encodings):
        if "pixel_values" in inputs:
            inputs["pixel_values"], inputs["image_grid_thw"] = inputs["pixel_values"][:4], torch.tensor([[1, 2, 2]])

    break_collate(monkeypatch, cut)
    with pytest.raises(
        FlowError, match=r"the training forward fails on row 0 of train_dataset with image \(.*(tokens|shape mismatch)"
    ) as caught:
        check(make(three("image"), tmp_path), caplog)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_a_projector_of_zeros_is_named_as_a_reason(tmp_path, caplog):
    with pytest.raises(FlowError, match="projector is untrained and lets nothing through"):
        check(make(three("image"), tmp_path, "llava", model=tiny.build("llava", image_scale=0.0)[0]), caplog)


def test_nan_is_named(tmp_path, caplog):
    model = tiny.build("qwen2_5_vl")[0]
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(FlowError, match=r"row 0 of train_dataset are NaN or infinite before the first step"):
        check(make(three("image"), tmp_path, model=model), caplog)


# ---- what it leaves behind, and what it costs -------------------------------------------------------------------


def checked(path, **options):
    """A run's arguments, with the check."""
    return recorder.config(path, **{"flow_check": True, **options})


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "disable_dropout": False, "beta": 0.1}])
def test_training_is_bit_identical_with_and_without(options, tmp_path, caplog):
    def run(flow_check: bool):
        torch.manual_seed(0)
        model = with_adapter(tiny.build("qwen2_5_vl")[0], False)
        config = checked(tmp_path, max_steps=2, learning_rate=0.01, flow_check=flow_check, **options)
        data = table(row(video=1), row("count two"), row(image=2), row(image=3), row("four"), row("five", video=6))
        trainer = recorder.Recorder(model, draw, config, data, processing_class=tiny.build("qwen2_5_vl")[1])
        caplog.clear()
        with caplog.at_level(logging.INFO, "vlm_grpo"):
            trainer.train()
        assert len([message for message in caplog.messages if "Flow check" in message]) == 2 * flow_check
        return trainer

    def draw(completions, **columns):  # every random state matters
        return [random.random() + np.random.random() + torch.rand(()).item() for _ in completions]

    one, other = run(True), run(False)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    pairs = [(a, b) for x, y in zip(one.rows, other.rows, strict=True) for a, b in zip(x, y, strict=True)]
    assert pairs and all(a.completion == b.completion and torch.equal(a.logps, b.logps) for a, b in pairs)
    assert one.state.log_history[0]["reward"] == other.state.log_history[0]["reward"]


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(mode, tmp_path, caplog):
    trainer = make(three("image"), tmp_path)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    layer = trainer.model.model.language_model.layers[0]
    checkpoint = vars(layer)["_gradient_checkpointing_func"]
    trainer.model.train(mode)
    trainer.model.lm_head.train(not mode)
    trainer.model.model.rope_deltas = before = torch.tensor([[5]])
    names = [set(vars(module)) for module in trainer.model.modules()]
    check(trainer, caplog)
    assert trainer.model.model.rope_deltas is before
    assert layer.gradient_checkpointing and vars(layer)["_gradient_checkpointing_func"] is checkpoint
    assert trainer.model.training is mode and trainer.model.lm_head.training is not mode
    assert [set(vars(module)) for module in trainer.model.modules()] == names
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    "options",
    [{"rows": 8, "num_generations": 4, "max_completion_length": 32}, {"rows": 2, "max_completion_length": 16}],
)
def test_it_costs_less_than_two_steps(options, tmp_path, caplog):
    data = table(row(image=1), row(video=2), row("count two"), row("three", image=4))
    trainer = make(data, tmp_path, max_steps=6, flow_check=False, **options)
    trainer.train()
    steps = [record["step_time"] for record in trainer.state.log_history if "step_time" in record]
    trainer.args.flow_check, spent = True, []
    for _ in range(3):
        start = time.perf_counter()
        assert set(check(trainer, caplog)) == {"image", "video"}
        spent.append(time.perf_counter() - start)
    assert min(spent) < 2 * sorted(steps)[len(steps) // 2]
