"""Numbers that explode: the run stops before an update or a checkpoint, and says where they first did."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import recorder
import test_sft
import tiny
import torch
from datasets import Dataset
from test_exact import with_adapter
from test_group_ddp import finished
from test_trainer import logged, rows, train
from torch import nn
from transformers import TrainerCallback
from typer.testing import CliRunner

from vlm_grpo.checkpoint import is_whole
from vlm_grpo.cli import app
from vlm_grpo.errors import ConfigError, NumbersError, RewardError
from vlm_grpo.origin import broken_weight, first_in_backward, first_in_forward
from vlm_grpo.precision import float32_adapters, leave_float16
from vlm_grpo.trainer_config import resolve_precision

LAYER = "model.language_model.layers.1.mlp.down_proj"


class At(TrainerCallback):
    """Does something to the model at the beginning of a step, counted from 1."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.act(model)


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def infinite_gradient(model, layer: str = LAYER):
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: _Infinite.apply(output))


def nan_at(word: str):
    """What spoils the rows that hold a word."""
    spoilt = tiny.build("qwen2_5_vl")[1].tokenizer(f"count {word}")["input_ids"][-1]

    def act(model):
        def look(module, args, output):
            return output.masked_fill((args[0] == spoilt)[..., None], torch.nan) if InLoss.now else None

        model.get_input_embeddings().register_forward_hook(look)

    return act


def infinite_output(model):
    def hook(module, args, output):
        return output * math.inf if InLoss.now else None

    model.get_submodule(LAYER).register_forward_hook(hook)


class InLoss(recorder.Recorder):
    """Lets what is to explode do so in the loss only, and not in generation."""

    now = True

    def __init__(self, *args, **kwargs):
        InLoss.now = False
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        InLoss.now = True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            InLoss.now = False


@pytest.fixture(autouse=True)
def _anywhere():
    InLoss.now = True


def message(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the search -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.divide = self.root = False

    def forward(self, x):
        x = self.first(x)
        x = x / 0 if self.divide else x
        x = self.norm(x)
        x = (x - x).sqrt() if self.root else x
        return self.last(x)


def test_the_first_module_of_a_forward_pass():
    model, x = Small(), torch.randn(3, 4)
    assert first_in_forward(model, lambda: model(x)) is None
    model.norm.weight.data[0] = math.inf
    assert first_in_forward(model, lambda: model(x)) == "in the output of norm (LayerNorm)"
    model.divide = True
    assert first_in_forward(model, lambda: model(x)) == "in front of norm (LayerNorm)"
    assert not model.norm._forward_hooks and not model.last._forward_hooks


def test_the_module_nearest_to_the_loss_in_a_backward_pass():
    model, x = Small(), torch.randn(3, 4)
    assert first_in_backward(model, lambda: model(x).square().sum()) is None
    model.root = True  # a finite value, whose derivative is not
    found = first_in_backward(model, lambda: model(x).square().sum())
    assert found == "behind norm (LayerNorm), in what its output goes into"
    model.root = False
    infinite_gradient(model, "norm")
    assert first_in_backward(model, lambda: model(x).square().sum()) == "in norm (LayerNorm)"
    assert first_in_backward(model, lambda: (model(x) * 0).sqrt().sum()).startswith("behind last (Linear)")


def test_a_broken_weight_is_counted():
    model = Small()
    assert broken_weight(model) is None
    model.last.weight.data[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert broken_weight(model) == '"last.weight" (3 of 8 values)'
    model.last.requires_grad_(False)
    assert broken_weight(model, trainable=True) is None
    half = nn.Linear(300, 300).half()
    half.weight.data.fill_(60000)  # whose norm a float16 cannot hold
    assert broken_weight(half) is None


# ---- the loss and its gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_infinite_loss_stops_before_the_update(tmp_path, sharing):
    model, _ = tiny.build("qwen2_5_vl")
    before, at_step = {}, []

    def spoil(model):
        before.update({name: weight.clone() for name, weight in model.state_dict().items()})
        infinite_output(model)

    class Counting(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            at_step.append(state.global_step + 1)

    options = {"learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "cls": InLoss}
    callbacks = [At(3, spoil), Counting()]
    with pytest.raises(NumbersError, match="Step 3: the loss is (nan|inf)") as caught:
        train(rows(), tmp_path, model=model, callbacks=callbacks, group_sharing=sharing, **options)
    said = message(caught)
    assert f"first seen in the output of {LAYER} (Linear)" in said
    assert "Lower learning_rate (0.001) or lower max_grad_norm (1)." in said
    assert at_step == [1, 2]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert is_whole(tmp_path / "checkpoint-2") and not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"group_sharing": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_infinite_gradient_of_a_finite_loss(tmp_path, options):
    model = with_adapter(tiny.build("qwen2_5_vl")[0], trained=True)
    name = f"base_model.model.{LAYER}"
    with pytest.raises(NumbersError, match="Step 2: the gradient norm is (nan|inf)") as caught:
        train(
            rows(),
            tmp_path,
            model=model,
            callbacks=[At(2, lambda m: infinite_gradient(m, name))],
            max_steps=2,
            **options,
        )
    assert f"first seen in {name} (" in message(caught)


def test_the_row_alone_is_named(tmp_path):
    data, word = rows(), tiny.WORDS[2]
    with pytest.raises(NumbersError, match="the loss is nan") as caught:
        train(data, tmp_path, callbacks=[At(1, nan_at(word))], shuffle_dataset=False, cls=InLoss)
    said = message(caught)
    assert "first seen in the output of model.language_model.embed_tokens" in said
    assert f"count {word}" in said and "image" in said and "leave that row out" in said
    assert not any(f"count {other}" in said for other in tiny.WORDS[:4] if other != word)


def test_in_the_warm_start_too(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    infinite_output(model)
    with pytest.raises(NumbersError, match="Step 1: the loss is nan") as caught:
        test_sft.train(tmp_path, model=model)
    assert f"first seen in the output of {LAYER} (Linear)" in message(caught)
    model, _ = tiny.build("qwen2_5_vl")
    nan_at(tiny.WORDS[1])(model)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(NumbersError, match=f'the row of the prompt ".*count {tiny.WORDS[1]}') as caught:
        test_sft.train(tmp_path, model=model, **options)
    model, _ = tiny.build("qwen2_5_vl")
    model.get_submodule(LAYER).weight.data.mul_(1e38)  # finite, and a norm behind it hides that from the loss
    with pytest.raises(NumbersError, match="Step 1: the gradient norm is nan, first seen in model.language_model.norm"):
        test_sft.train(tmp_path, model=model)


@pytest.mark.parametrize("sharing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_generation_stops_before_it_samples(tmp_path, sharing):
    word = tiny.WORDS[3]
    options = {"group_sharing": sharing, "max_steps": 2, "shuffle_dataset": False}
    with pytest.raises(NumbersError, match="Step 2: the logits of the generation are NaN or infinite") as caught:
        train(rows(), tmp_path, callbacks=[At(2, nan_at(word))], **options)
    assert "embed_tokens" in message(caught) and f"count {word}" in message(caught)


def test_weights_that_are_broken_already(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    model.get_submodule(LAYER).weight.data[0, 0] = math.nan
    with pytest.raises(NumbersError, match=rf'The weights "{LAYER}.weight" \(1 of .* before step 1.*loaded from'):
        train(rows(), tmp_path, model=model)
    spoil = At(2, lambda model: model.get_submodule(LAYER).weight.data.fill_(math.inf))
    with pytest.raises(NumbersError, match=rf'Step 2: the .* because the weights "{LAYER}.weight" .* since an update'):
        train(rows(), tmp_path, callbacks=[spoil], max_steps=2)


def test_weights_that_an_update_breaks_are_not_saved(tmp_path):
    class Breaking(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 2:
                model.get_submodule(LAYER).weight.data[0, 0] = math.inf

    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(NumbersError, match=rf'The update of step 2 made the weights "{LAYER}.weight"'):
        train(rows(), tmp_path, callbacks=[Breaking()], **options)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# ---- rewards ----------------------------------------------------------------------------------------------------


def spoilt_reward(value: float):
    def judge(completions, **columns):
        return [None, value] * (len(completions) // 2)

    async def judge_later(completions, **columns):
        return [None, value] * (len(completions) // 2)

    return judge, judge_later


@pytest.mark.parametrize("value", [math.nan, pytest.param(-math.inf, marks=pytest.mark.slow)])
def test_a_reward_that_is_no_number_is_named_with_its_row(tmp_path, value):
    for function in spoilt_reward(value):
        with pytest.raises(RewardError, match=f'The reward "{function.__name__}" returned {value}. ') as caught:
            train(rows(), tmp_path, reward=[recorder.reward, function])
        said = message(caught)
        assert "or None for the completion" in said and "of the prompt" in said and "count" in said


# ---- float16 ----------------------------------------------------------------------------------------------------


def half(trainer, scale: float = 65536.0):
    """The trainer as on a GPU without bf16: accelerate keeps autocast to float16 and the loss scale from a CPU."""
    trainer.args.fp16 = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    assert trainer.accelerator.mixed_precision == "fp16"
    return trainer


@pytest.fixture
def _own_state():
    """Accelerate shares its precision among all trainers of a process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


class Half(recorder.Recorder):
    scale = 65536.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        half(self, self.scale)


class TooLarge(Half):
    scale = 2.0**60  # beyond float16 in the first steps


def adapters(trainer) -> dict:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("_own_state")
def test_float16_trains_at_the_usual_loss_scale(tmp_path):
    model = with_adapter(tiny.build("qwen2_5_vl")[0], trained=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = train(rows(), tmp_path, model=model, cls=Half, max_steps=3, learning_rate=1e-3, group_sharing="auto")
    assert logged(trainer, "numbers/loss_scale") == [65536.0] * 3
    assert logged(trainer, "numbers/skipped_steps") == [0.0] * 3
    assert all(math.isfinite(norm) and norm > 0 for norm in logged(trainer, "grad_norm"))
    moved = adapters(trainer)
    assert all(p.dtype == torch.float32 for p in moved.values())
    assert any(not torch.equal(before[n], p) for n, p in moved.items() if "lora_A" in n)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_state")
def test_float16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    trainer = train(rows(), tmp_path, cls=TooLarge, max_steps=3, learning_rate=1e-3, group_sharing="auto")
    assert logged(trainer, "numbers/skipped_steps") == [1.0] * 3
    assert logged(trainer, "numbers/loss_scale") == [2.0**59, 2.0**58, 2.0**57]


class Endless(Half):
    """Every gradient overflows, whatever the scale."""

    def __init__(self, model, *args, **kwargs):
        infinite_gradient(model)
        super().__init__(model, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_state")
def test_float16_that_only_skips_is_stopped(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    with pytest.raises(NumbersError, match="Step 17: fp16 gradients overflowed in 17 steps in a row") as caught:
        train(rows(), tmp_path, model=model, cls=Endless, max_steps=40, group_sharing="auto")
    said = message(caught)
    assert "loss scale of 0.5" in said and f"first seen in {LAYER}" in said and "Train in bf16 or fp32" in said


def test_float16_needs_trained_weights_in_float32():
    args = SimpleNamespace(fp16=True)
    model = with_adapter(tiny.build("qwen2_5_vl")[0].half(), trained=True).half()
    held = [p for p in model.parameters() if p.requires_grad]
    float32_adapters(args, model)
    assert all(p.dtype == torch.float32 for p in held), "the same parameters, which an optimizer may hold"
    assert model.get_submodule(f"base_model.model.{LAYER}").base_layer.weight.dtype == torch.float16
    sentence = 'fp16 needs trained weights in float32, and ".*" is bfloat16.*dtype="float32"'
    with pytest.raises(ConfigError, match=sentence):
        float32_adapters(args, tiny.build("qwen2_5_vl")[0].bfloat16())
    float32_adapters(SimpleNamespace(fp16=False), tiny.build("qwen2_5_vl")[0].bfloat16())


@pytest.mark.parametrize(("asked", "why"), [(False, "no native bf16"), (True, "fp16=True is not followed")])
def test_a_family_that_overflows_leaves_float16(monkeypatch, caplog, asked, why):
    """As Unsloth does, on a Turing card."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    said = {}
    for family in ("gemma3", "qwen2_5_vl"):
        args = SimpleNamespace(bf16=None, fp16=asked, use_cpu=False, mixed_precision="fp16")
        resolve_precision(args)
        assert args.fp16 and not args.bf16
        with caplog.at_level(logging.WARNING, "vlm_grpo"):
            caplog.clear()
            leave_float16(args, tiny.build(family)[0])
        said[family] = (args.fp16, args.mixed_precision, list(caplog.messages))
    assert said["qwen2_5_vl"] == (True, "fp16", [])
    assert said["gemma3"][:2] == (False, "no") and len(said["gemma3"][2]) == 1
    assert "gemma3 overflows in float16" in said["gemma3"][2][0] and why in said["gemma3"][2][0]


@pytest.mark.usefixtures("_own_state")
@pytest.mark.parametrize(("family", "precision"), [("gemma3", "no"), ("qwen2_5_vl", "fp16")])
def test_the_trainer_leaves_it_before_accelerate_hears_of_it(tmp_path, family, precision):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    model, processor = tiny.build(family)
    args = recorder.config(tmp_path, group_sharing="auto")
    args.fp16, args.mixed_precision = True, "fp16"  # as on a GPU: a CPU's run is refused it
    data = Dataset.from_list(rows())
    trainer = recorder.Recorder(model, recorder.reward, args, data, processing_class=processor)
    assert trainer.accelerator.mixed_precision == precision
    assert trainer.args.fp16 == (precision == "fp16")


# ---- several processes ------------------------------------------------------------------------------------------


def in_two_processes(folder: Path, case: str) -> list[str]:
    """What each process says at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(2):
        own = {**world, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(folder), case]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    finished(processes, folder, 240)
    return [(folder / f"{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["loss", "gradient", "generation"])
def test_all_processes_stop_with_one_sentence(tmp_path, case):
    first, second = in_two_processes(tmp_path, case)
    assert first == second
    assert "Step 2: the " + {"generation": "logits", "gradient": "gradient norm"}.get(case, case) in first
    assert LAYER in first if case == "gradient" else "embed_tokens" in first
    assert not (tmp_path / "two" / "checkpoint-2").exists() and (tmp_path / "two" / "checkpoint-1").exists()


def process(case: str, folder: Path, rank: int) -> str:
    spoil = infinite_gradient if case == "gradient" else nan_at(tiny.WORDS[1])
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "shuffle_dataset": False}
    cls = InLoss if case == "loss" else recorder.Recorder
    # Of two processes with one prompt each, the word is in the second's.
    at = At(2, spoil if rank == 1 or case == "gradient" else lambda model: None)
    sizes = {"per_device_train_batch_size": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    alone = {"learning_rate": 1e-3, "use_cpu": True, "ddp_timeout": 60}
    with pytest.raises(NumbersError) as caught:
        train(rows(2), folder / "two", cls=cls, callbacks=[at], **sizes, **options, **alone)
    return message(caught)


# ---- the command line -------------------------------------------------------------------------------------------


def test_the_command_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    data = [{"prompt": tiny.prompt(f"count {word}", 0), "answer": word} for word in tiny.WORDS[:4]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "reward.py").write_text(
        "def odd(completion_ids, **columns):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )
    command = (
        *("train", "--model", "model", "--data", "rows.jsonl", "--reward", "reward.py:odd", "--output", "run"),
        *("--set", "lora=null", "--per_device_train_batch_size", "4", "--num_generations", "2", "--max-steps", "4"),
        *("--max_completion_length", "4", "--save_steps", "1", "--set", "train.warmup_steps=1"),
    )
    result = CliRunner().invoke(app, [*command, "--learning_rate", "1e30"])
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert "NaN or infinite" in said and "first seen in" in said and "Lower learning_rate (1e+30)" in said
    assert "Traceback" not in said
    steps = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert steps and all(is_whole(tmp_path / "run" / step) for step in steps)
    logged_steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(logged_steps) == int(steps[-1].rpartition("-")[2]), "no invented number"
    result = CliRunner().invoke(app, [*command, "--learning_rate", "1e-6"])
    assert result.exit_code == 2 and "learning_rate" in result.stderr and "--fresh" in result.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, own = Path(sys.argv[1]), int(os.environ["RANK"])
    (place / f"{own}.txt").write_text(process(sys.argv[2], place, own))
    torch.distributed.destroy_process_group()
