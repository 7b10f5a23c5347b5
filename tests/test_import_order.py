"""Whatever is imported first, and whatever Unsloth replaces meanwhile, a training run computes the same numbers.

Unsloth's import, as on a GPU, replaces TRL's trainers; loading a model with it replaces methods of transformers' own.
"""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from real_unsloth import REPLACE_TRL, environment

pytestmark = pytest.mark.slow

STEPS = {
    "trl": "import trl",
    "vlm_grpo": "from vlm_grpo import VLMGRPOTrainer, VLMSFTTrainer",
    "unsloth": REPLACE_TRL,
}
ORDERS = list(itertools.permutations(STEPS))
# Loading a model with it is what rebinds transformers' Trainer.
LOAD = """
unsloth.FastVisionModel.from_pretrained(
    "model", load_in_4bit=False, dtype=torch.float32, device_map="cpu", use_gradient_checkpointing=True)
"""
# Unsloth computes the same in another order (its own rotary and attention functions).
LOADED_BY_UNSLOTH = 1e-5

TRAINING = '''
def train(name, backend="hf", loaded=[]):
    """Two steps of two micro-batches; loss, gradient and metrics of each."""
    import recorder, tiny
    from datasets import Dataset
    from test_exact import rows
    from test_sft import config, rows as pairs
    from transformers import TrainerCallback
    from vlm_grpo import LoraOptions, VLMSFTTrainer, load_model
    from vlm_grpo.models.families import KINDS

    grads = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    torch.manual_seed(0)
    lora = LoraOptions(r=4, alpha=8, vision=True)
    model, processor = load_model("model", backend=backend, dtype="float32", lora=lora, gradient_checkpointing=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    options = dict(max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2, max_grad_norm=0.05, seed=5)
    options |= dict(gradient_checkpointing=True, logging_steps=1)
    torch.manual_seed(1)
    if name == "sft":
        args = config("out", **{**options, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1})
        data = Dataset.from_list(pairs())
        trainer = VLMSFTTrainer(model, args, data, data, processing_class=processor, callbacks=[Gradients()])
    else:
        data = Dataset.from_list(rows("mixed" if name == "image" else "one"))
        data = data if name == "image" else data.remove_columns("images").map(
            lambda row: {"prompt": [{"role": "user", "content": "count one two"}]})
        args = recorder.config("out", beta=0.1, **options)
        trainer = recorder.Recorder(
            model, recorder.reward, args, data, None, processor, callbacks=[Gradients()])
    trainer.train()
    apart = ("seconds", "time", "per_second")  # figures of the clock
    logs = [{k: v for k, v in log.items() if not any(a in k for a in apart)} for log in trainer.state.log_history]
    return {"logs": logs, "grads": grads}


RUNS = {}
def train_all(stage, backend="hf", names=("image", "text", "sft")):
    for name in names:
        RUNS[f"{name} {stage}"] = train(name, backend)
'''

CONFIGS = """
import trl
from vlm_grpo import VLMGRPOConfig
values = dict(output_dir="out", num_generations=2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
              learning_rate=3e-5, beta=0.04, temperature=0.7, max_completion_length=9, seed=5, loss_type="grpo")
"""


def process(folder: Path, name: str, script: str, unsloth: bool = True) -> dict:
    """``script`` in a process of its own; the runs that it saved."""
    (folder / name).mkdir()
    text = f"import os, sys, torch\nos.chdir({str(folder)!r})\n{script}\ntorch.save(RUNS, {name + '/runs.pt'!r})"
    variables = environment()
    if not unsloth:
        variables = {key: value for key, value in variables.items() if not key.startswith("UNSLOTH_")}
    done = subprocess.run([sys.executable, "-c", text], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / name / "runs.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import tiny

    path = tmp_path_factory.mktemp("orders")
    tiny.save("qwen2_5_vl", path / "model")
    return path


@pytest.fixture(scope="module")
def expected(folder) -> dict:
    """The runs of a process that has never imported Unsloth."""
    script = f'{TRAINING}\ntrain_all("")\nassert not any(m.startswith("unsloth") for m in sys.modules)'
    return {name.strip(): run for name, run in process(folder, "plain", script, unsloth=False).items()}


def difference(run: dict, other: dict) -> tuple[float, float, float]:
    """``(loss, gradient, any metric)``: absolute, relative L2 at the worse of both steps, absolute."""
    assert [log.keys() for log in run["logs"]] == [log.keys() for log in other["logs"]]
    metrics = [abs(a[k] - b[k]) for a, b in zip(run["logs"], other["logs"], strict=True) for k in a]
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(run["logs"], other["logs"], strict=True) if "loss" in a]
    gaps = []
    for a, b in zip(run["grads"], other["grads"], strict=True):
        assert a.keys() == b.keys() and len(a) in (28, 48)  # a text row moves no vision tower
        gap = sum((a[n] - b[n]).double().pow(2).sum() for n in b)
        gaps.append((gap / sum(b[n].double().pow(2).sum() for n in b)).sqrt().item())
    assert len(gaps) == 2
    return max(losses), max(gaps), max(metrics)


def compare(runs: dict, expected: dict, order: str, largest: float, capsys) -> None:
    for name, run in runs.items():
        loss, gradient, metric = difference(run, expected[name.split()[0]])
        with capsys.disabled():
            print(f"\n{order:<28} {name:<24} loss {loss:.1e}  gradient {gradient:.1e}  metrics {metric:.1e}", end="")
        assert gradient <= max(largest, 1e-5) and loss <= max(largest, 1e-7) and metric <= max(100 * largest, 1e-6)


# covers U5
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_the_numbers_do_not_depend_on_the_order_of_imports(order, folder, expected, capsys):
    imports = "\n".join(STEPS[name] for name in order)
    script = f'{imports}\n{TRAINING}\ntrain_all("imported")\n{LOAD}\ntrain_all("model loaded", names=("image", "sft"))'
    runs = process(folder, "-".join(order), script)
    compare(runs, expected, ", ".join(order), 0.0, capsys)


# covers U5
def test_trainers_imported_after_unsloth_has_loaded_a_model(folder, expected, capsys):
    checks = """
    import inspect, trl.trainer.utils, transformers
    from vlm_grpo.patches.transformers import _COMPUTING
    from vlm_grpo.patches.trl import _LogProbs
    for trainer in (VLMGRPOTrainer, VLMSFTTrainer):
        assert issubclass(trainer, transformers.Trainer)
        own = next(cls for cls in trainer.__mro__ if cls.__name__ == "OwnTrainer")
        for name in _COMPUTING:
            code = inspect.unwrap(vars(own)[name]).__code__
            assert code.co_filename == transformers.trainer.__file__, (trainer, name)
    replaced = [n for n in _COMPUTING if "unsloth" in vars(transformers.Trainer)[n].__module__ + str(
        vars(transformers.Trainer)[n].__code__.co_filename)]
    assert len(replaced) >= 5, replaced  # Unsloth has indeed put its own there
    assert trl.trainer.utils._ChunkedLogProbFunction is _LogProbs
    """
    script = f'{REPLACE_TRL}\nimport torch\n{LOAD}\n{STEPS["vlm_grpo"]}\n{TRAINING}\ntrain_all("imported last")'
    script += textwrap.dedent(checks) + '\ntrain_all("by Unsloth", "unsloth", ("image", "sft"))'
    runs = process(folder, "loaded-first", script)
    own = {name: run for name, run in runs.items() if "by Unsloth" not in name}
    compare(own, expected, "unsloth, model, vlm_grpo", 0.0, capsys)
    theirs = {name: run for name, run in runs.items() if name not in own}
    compare(theirs, expected, "unsloth, model, vlm_grpo", LOADED_BY_UNSLOTH, capsys)


# covers U5
def test_a_config_of_trls_or_unsloths_means_the_same(folder):
    before = f"{CONFIGS}\nRUNS = {{'plain': VLMGRPOConfig.of(trl.GRPOConfig(**values)).to_dict()}}\n"
    own = f"{CONFIGS}\nconfig = trl.GRPOConfig(**values)\n"
    late = "RUNS = {'taken before': VLMGRPOConfig.of(config).to_dict(), "
    late += "'taken after': VLMGRPOConfig.of(trl.GRPOConfig(**values)).to_dict()}\nassert 'unsloth_num_chunks' in vars("
    late += "trl.GRPOConfig(**values))"
    plain = process(folder, "config", before, unsloth=False)["plain"]
    runs = process(folder, "config-unsloth", f"{own}\n{REPLACE_TRL}\n{late}")
    named = ("num_generations", "learning_rate", "beta", "temperature", "max_completion_length", "seed", "loss_type")
    for config in runs.values():
        assert {name: config[name] for name in named} == {name: plain[name] for name in named}
    before = runs["taken before"]
    assert {name: before[name] for name in plain} == plain  # Unsloth's to_dict lists one name more
