"""What a run records, shows and obeys, driven by transformers' Trainer on a model of one parameter."""

import io
import json
import logging
import math
import os
import re
import signal
import threading
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vlm_grpo import callbacks
from vlm_grpo.callbacks import (
    CurvesCallback,
    MetricsCallback,
    SamplesCallback,
    SaveEvery,
    StopCallback,
    append_jsonl,
    cut_back,
    graceful_signals,
)
from vlm_grpo.media import Medium
from vlm_grpo.notes import kept_warnings
from vlm_grpo.progress import ProgressCallback, peak_memory


class One(torch.nn.Module):
    """loss = (weight - x)²"""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight - x) ** 2).mean()}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves; every module of ours reads it."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


class Each(TrainerCallback):
    """Calls ``act(step)`` at the end of every step, before the callbacks after it."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act(state.global_step)


def trainer_of(tmp_path: Path, *added, steps: int = 6, **options) -> Trainer:
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1000, "max_steps": steps} | options
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=1, **options
    )
    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor(0)} for i in range(8)]
    trainer = Trainer(One(), args, train_dataset=rows, eval_dataset=rows[:2], callbacks=list(added))
    trainer.remove_callback(PrinterCallback)
    return trainer


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_steps(tmp_path: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_one_object_a_log_and_seconds_go_on_after_a_resume(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"

    def tick(step):
        clock[0] += 2.5

    trainer_of(tmp_path, Each(tick), MetricsCallback(path), steps=4, save_steps=2).train()
    first = lines(path)
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    assert [line["seconds"] for line in first] == [2.5, 5.0, 7.5, 10.0]
    assert list(first[0])[:3] == ["step", "epoch", "seconds"] and first[0]["grad_norm"] > 0
    assert not any("train_runtime" in line for line in first)

    clock[0] += 500  # the run was away; then it goes on from checkpoint 2
    assert cut_back(path, 2) == 2
    trainer_of(tmp_path, Each(tick), MetricsCallback(path), steps=4).train(str(tmp_path / "checkpoint-2"))
    again = lines(path)
    assert [(line["step"], line["seconds"]) for line in again] == [(1, 2.5), (2, 5.0), (3, 7.5), (4, 10.0)]
    assert [line["loss"] for line in again] == [line["loss"] for line in first]


def test_evaluations_are_lines_of_their_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trainer_of(tmp_path, MetricsCallback(path), steps=2, eval_strategy="steps", eval_steps=2).train()
    assert [(line["step"], "eval_loss" in line) for line in lines(path)] == [(1, False), (2, False), (2, True)]


def test_jsonl_has_no_nan_and_keeps_what_json_lacks(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    numbers = {"nan": math.nan, "inf": [math.inf, 1.5], "tensor": torch.tensor([1, 2]), "scalar": torch.tensor(0.5)}
    append_jsonl(path, [numbers, {"path": Path("a/ü.png"), "true": True, "none": None}])
    assert lines(path) == [
        {"nan": None, "inf": [None, 1.5], "tensor": [1, 2], "scalar": 0.5},
        {"path": "a/ü.png", "true": True, "none": None},
    ]
    assert "NaN" not in path.read_text() and "ü" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 2}', "\0\0\0", '[1]\n{"loss": 1}\n{"step": null}\n'])
def test_cut_back_keeps_whole_lines_up_to_the_step(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 0, "eval_loss": 1}\n{"step": 1, "x": "a\\nb"}\n{"step": 2,  "spaces": 0.10}\n'
    path.write_text(good + '{"step": 3}\n{"step": 10}\n' + torn)
    assert cut_back(path, 2) == 2 + len(torn.splitlines())
    assert path.read_text() == good
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert cut_back(path, 2) == 0
    assert cut_back(path, -1) == 3 and path.read_text() == ""
    assert cut_back(tmp_path / "absent.jsonl", 2) == 0


# ---- samples --------------------------------------------------------------------------------------------------------


class Rollouts:
    """The part of TRL's GRPOTrainer that the samples come from: ``_logs``, filled as it fills them."""

    def __init__(self, size: int):
        def column():
            return deque(maxlen=size)

        self.size, self.count = size, 0
        self._logs = {"prompt": column(), "completion": column(), "advantages": column()}
        self._logs |= {"rewards": defaultdict(column), "extra": defaultdict(column), "images": column()}

    def generate(self, size: int | None = None):
        self.count += 1
        image = Medium.of(Image.new("RGB", (56, 56)))
        for index in range(size or self.size):
            parts = [{"type": "image", "image": image}, {"type": "text", "text": "which digit ?"}]
            self._logs["prompt"].append([{"role": "user", "content": parts}])
            self._logs["completion"].append([{"role": "assistant", "content": f"{self.count}.{index}"}])
            self._logs["rewards"]["accuracy"].append(1.0)
            self._logs["rewards"]["format"].append(math.nan)
            self._logs["extra"]["answer"].append(index)
            self._logs["advantages"].extend(torch.zeros(1).tolist())


def step(callback, number: int, log: bool = True):
    state = SimpleNamespace(global_step=number, max_steps=10, is_world_process_zero=True)
    callback.on_step_end(None, state, None)
    if log:
        callback.on_log(None, state, None, logs={"loss": 0.0})


def test_every_rollout_is_written_once(tmp_path):  # covers Q9
    path, rollouts = tmp_path / "samples.jsonl", Rollouts(4)
    callback = SamplesCallback(path, rollouts, per_step=3)
    for number in range(1, 7):  # a rollout serves two steps (num_iterations=2)
        if number % 2:
            rollouts.generate()
        step(callback, number)
    assert [(line["step"], line["completion"]) for line in lines(path)] == [
        (step, f"{rollout}.{index}") for rollout, step in ((1, 1), (2, 3), (3, 5)) for index in range(3)
    ]
    line = lines(path)[1]
    (kept,) = line.pop("media_files")
    assert kept["kind"] == "image" and Image.open(tmp_path / kept["file"]).size == (56, 56)
    assert line == {
        "answer": 1,
        "step": 1,
        "prompt": "[<image 56x56>] which digit ?",
        "completion": "1.1",
        "rewards": {"accuracy": 1.0, "format": None},
        "advantage": 0.0,
        "media": ["<image 56x56>"],
    }


def test_an_evaluation_is_never_written_as_training(tmp_path):
    path, rollouts = tmp_path / "samples.jsonl", Rollouts(2)
    callback = SamplesCallback(path, rollouts)
    rollouts.generate()
    step(callback, 1, log=False)
    rollouts.generate()  # an evaluation, before step 1 was logged
    callback.on_evaluate(None, None, None)
    step(callback, 2)
    step(callback, 3)
    assert [(line["step"], line["completion"]) for line in lines(path)] == [(1, "1.0"), (1, "1.1")]


def test_nothing_is_written_before_the_first_rollout(tmp_path):
    step(SamplesCallback(tmp_path / "samples.jsonl", Rollouts(2)), 1)
    assert list(tmp_path.iterdir()) == []


def test_the_media_of_samples_are_kept_once_and_small(tmp_path):  # covers Q9
    picture = tmp_path / "photo.jpg"
    Image.effect_noise((900, 600), 80).convert("RGB").save(picture)
    rollouts = Rollouts(4)

    def roll(number: int, *media: Medium):
        rollouts.generate()
        parts = [{"type": medium.kind, medium.kind: medium} for medium in media]
        for index in range(4):
            rollouts._logs["prompt"][index] = [{"role": "user", "content": parts}]
        step(SamplesCallback(tmp_path / "samples.jsonl", rollouts), number)

    roll(1, Medium.of(picture), Medium.of(picture))
    roll(2, Medium.of(picture))  # as after a resume: another callback, other objects
    (kept,) = (tmp_path / "media").iterdir()
    assert Image.open(kept).size == (256, 171) and kept.stat().st_size < 100_000
    files = [line["media_files"] for line in lines(tmp_path / "samples.jsonl")]
    here = {"kind": "image", "file": f"media/{kept.name}"}
    assert files == [[here, here]] * 4 + [[here]] * 4


def test_a_medium_that_cannot_be_kept_stops_nothing_and_is_said_once(tmp_path, caplog):
    (tmp_path / "media").write_text("a file where the folder would be")
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n")
    rollouts = Rollouts(2)
    callback = SamplesCallback(tmp_path / "samples.jsonl", rollouts)
    for number in (1, 2):
        rollouts.generate()
        parts = [{"type": "image", "image": Medium.of(torn)}, {"type": "image", "image": Medium.of(b"")}]
        rollouts._logs["prompt"][0] = [{"role": "user", "content": parts}]
        step(callback, number)
    assert [line["media_files"] for line in lines(tmp_path / "samples.jsonl")] == [[]] * 4
    said = [record.message for record in caplog.records if "Left out of the samples" in record.message]
    assert sum("torn.png" in text for text in said) == 1 and len(said) == len(set(said))


def test_transcript_of_plain_text_tools_and_several_turns():
    assert callbacks.transcript("already templated") == ("already templated", [])
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": Medium.of("a/b.png")}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3"},
    ]
    text, labels = callbacks.transcript(conversation)
    assert labels == ["a/b.png"]
    assert text.splitlines() == [
        "system: Be brief.",
        "user: [a/b.png] ?",
        'assistant: [{"function": {"name": "add", "arguments": {"a": 1}}}]',
        "tool: 3",
    ]


# ---- saving, stopping, curves ---------------------------------------------------------------------------------------


def test_save_every_counts_from_the_last_save(tmp_path, clock):
    def tick(step):
        clock[0] += 50

    trainer_of(tmp_path, Each(tick), SaveEvery(seconds=120), steps=8, save_steps=4).train()
    assert saved_steps(tmp_path) == [3, 4, 7, 8]  # 3: after 150 s; 4: the Trainer's own; 7: 150 s after 4


def test_time_limit_saves_logs_and_stops(tmp_path, clock):
    def tick(step):
        clock[0] += 40

    path = tmp_path / "metrics.jsonl"
    stop = StopCallback(max_minutes=2)
    assert stop.seconds_left() == 120
    trainer = trainer_of(tmp_path, Each(tick), MetricsCallback(path), stop, logging_steps=50)
    trainer.train()
    assert trainer.state.global_step == 3 and stop.reason == "time limit" and stop.seconds_left() == 0
    assert saved_steps(tmp_path) == [3]
    assert [line["step"] for line in lines(path)] == [3]


def test_time_limit_counts_earlier_processes_by_the_metrics_clock(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 0, "seconds": 100.0}])

    def tick(step):
        clock[0] += 15

    metrics = MetricsCallback(path)
    stop = StopCallback(max_minutes=2, clock=metrics.seconds)
    trainer = trainer_of(tmp_path, metrics, Each(tick), stop)
    trainer.train()
    assert trainer.state.global_step == 2 and stop.reason == "time limit"


def test_a_run_that_ends_at_the_limit_is_complete(tmp_path, clock):
    def tick(step):
        clock[0] += 60

    stop = StopCallback(max_minutes=2)
    trainer = trainer_of(tmp_path, Each(tick), stop, steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and stop.reason is None and StopCallback().seconds_left() == math.inf


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, capfd, number, reason):
    def send(step):
        if step == 2:
            os.kill(os.getpid(), number)

    stop = StopCallback()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = trainer_of(tmp_path, Each(send), stop)
    with graceful_signals(stop):
        trainer.train()
    assert trainer.state.global_step == 2 and saved_steps(tmp_path) == [2] and stop.reason == reason
    assert f"{reason}: saving after this step" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_interrupts_at_once(capfd):
    stop = StopCallback()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), graceful_signals(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "Ctrl-C"
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was swallowed")
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with graceful_signals(StopCallback()):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_curves_are_drawn_at_saves_but_not_too_often(tmp_path, clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(callbacks, "draw_curves", lambda source, out: drawn.append((source.name, out.name)))

    def tick(step):
        clock[0] += 10

    curves = CurvesCallback(tmp_path / "metrics.jsonl", tmp_path / "curves.png", every=30)
    trainer_of(tmp_path, Each(tick), curves, save_steps=1, save_total_limit=1).train()
    assert drawn == [("metrics.jsonl", "curves.png")] * 3  # at steps 1 and 4, and at the end


def test_all_processes_follow_the_first(monkeypatch):
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda wishes: [True])
    control = SimpleNamespace(should_save=False)
    SaveEvery(seconds=1e9).on_step_end(SimpleNamespace(world_size=2), None, control)
    assert control.should_save


# ---- progress -------------------------------------------------------------------------------------------------------


def shown(tmp_path, clock, seconds: float, steps: int, live: bool = False, **options) -> str:
    console = Console(file=io.StringIO(), force_terminal=live, width=100)

    def tick(step):
        clock[0] += seconds

    progress = ProgressCallback("digits", console, **options)
    trainer_of(tmp_path, Each(tick), progress, steps=steps).train()
    return console.file.getvalue()


def test_plain_lines_every_tenth_of_a_quick_run(tmp_path, clock):
    text = shown(tmp_path, clock, 0.5, 40).splitlines()
    assert text[0] == "digits: 40 steps" and "\x1b" not in "".join(text)
    assert [line.split(" ·")[0] for line in text[1:]] == [f"step {s}/40 ({s / 40:.0%})" for s in range(4, 41, 4)]
    assert re.match(r"step 4/40 \(10%\) · 0:02 · 0:18 left · memory \d+\.\d GiB · loss \d", text[1])


def test_plain_lines_every_ten_seconds_of_a_slow_run(tmp_path, clock):
    text = shown(tmp_path, clock, 4, 100, seconds_left=lambda: 75.0).splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in text[1:4]] == [3, 6, 9]
    assert " · 1:15 left · " in text[1]  # the time limit comes before the last step


def test_one_live_bar(tmp_path, clock):
    text = shown(tmp_path, clock, 3, 5, live=True)
    assert "digits" in text and re.search(r"5/5 · 0:\d\d · 0:00 left · memory \d+\.\d GiB · loss \d", text)
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h")  # the cursor is given back


def test_values_are_named_and_kept_between_logs():
    progress = ProgressCallback(console=Console(file=io.StringIO()))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=10)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 0.0123456, "reward": 0.84211, "completions/mean_length": 213.4})
    progress.on_log(None, state, None, logs={"reward": None, "loss": 0.5, "kl": 0.01234})
    status = re.sub(r"memory \d+\.\d GiB", "memory M", progress._status(state))
    assert status == " · reward 0.842 · length 213 · KL 0.012 · memory M · loss 0.5"


def test_memory_is_the_most_that_this_process_took():
    status = Path("/proc/self/status")
    if torch.cuda.is_available() or not status.exists():
        pytest.skip("compared with what Linux says of a process on a CPU")
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    assert peak_memory() == pytest.approx(int(peak.split()[1]) / 2**20, rel=0.05)  # kB


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (
            140,
            ["train ━", "770/1500 · ", " left · reward 0.842 · length 213 · KL 0.012 · memory ", " GiB · loss 0.0123"],
        ),
        (
            120,
            ["train ━", "770/1500 · ", " left · reward 0.842 · length 213 · KL 0.012 · memory ", " GiB · loss 0.0123"],
        ),
        (80, ["━", "770/1500 · 4:44 left · reward 0.842 · length 213 · KL 0.012 · ", " GiB"]),
        (50, ["━", "770/1500 · 4:44 left · reward 0.842", "…"]),
    ],
)
def test_one_line_at_any_width_the_most_telling_first(width, expected, clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    progress = ProgressCallback("train", console)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1500)
    progress.on_train_begin(None, state, None)
    clock[0] += 300
    state.global_step = 770
    progress.on_step_end(None, state, None)
    logs = {"reward": 0.8421, "completions/mean_length": 213.4, "loss": 0.0123, "kl": 0.01234}
    progress.on_log(None, state, None, logs=logs)
    page = Console(file=io.StringIO(), width=width)
    page.print(progress._progress.get_renderable())
    progress.close()
    line = page.file.getvalue().rstrip("\n")
    assert "\n" not in line and len(line) <= width
    position = 0
    for part in expected:
        position = line.index(part, position) + len(part)


# ---- notes ----------------------------------------------------------------------------------------------------------


def test_warnings_of_a_run_are_kept_once_with_their_step(tmp_path):
    path, trainer = tmp_path / "notes.jsonl", SimpleNamespace(state=SimpleNamespace(global_step=3))
    log = logging.getLogger("vlm_grpo.somewhere")
    with kept_warnings(path, trainer):
        log.info("no warning")
        log.warning("%d%% of the groups are tied", 38)
        trainer.state.global_step = 4
        log.warning("%d%% of the groups are tied", 38)
        log.warning("x" * 9000)
    log.warning("after the run")
    assert lines(path) == [{"step": 3, "text": "38% of the groups are tied"}, {"step": 4, "text": "x" * 2000}]
    assert cut_back(path, 3) == 1, "a run that continues from step 3 says the rest again"
    with kept_warnings(path, trainer):
        log.warning("38% of the groups are tied")
        log.warning("x" * 9000)
    assert [note["text"][:3] for note in lines(path)] == ["38%", "xxx"], "and what it had said by then once"
