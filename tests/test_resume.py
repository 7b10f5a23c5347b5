"""A run that is killed and started again gives the numbers of a run that never stopped."""

import json
import os
import signal
import traceback
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_exact import with_adapter

from vlm_grpo import RunConfig, VLMSFTConfig, VLMSFTTrainer, checkpoint, run
from vlm_grpo.errors import CheckpointError

REWARD = """
def pattern(completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""
# Three epochs each; where a rollout serves several steps, checkpoints on and off its boundaries. `check` asserts both.
SETTINGS = {
    "defaults": {"max_steps": 9},
    "num_iterations 2": {"num_iterations": 2, "max_steps": 18},
    "steps_per_generation 2x": {"steps_per_generation": 2, "max_steps": 18},
    "pretrained adapter, beta": {"beta": 0.1, "max_steps": 9},
    "no adapter, beta": {"beta": 0.1, "learning_rate": 1e-3, "max_steps": 9},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model, a model with a trained adapter, rows with pictures, a reward."""
    folder = tmp_path_factory.mktemp("material")
    tiny.save("qwen2_5_vl", folder / "model")
    model, processor = tiny.build("qwen2_5_vl")
    model.config._name_or_path = str(folder / "model")
    adapted = with_adapter(model, trained=True)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    lines = []
    for i in range(6):
        counts = i % 3
        for j in range(counts):
            tiny.image(10 * i + j, (56 + 28 * (i % 2), 56)).save(folder / f"{i}-{j}.png")
        prompt = tiny.prompt(f"count {tiny.WORDS[i]}", images=counts)
        lines.append(json.dumps({"prompt": prompt, "images": [f"{i}-{j}.png" for j in range(counts)], "answer": "red"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def config(material: Path, output: Path, setting: str) -> RunConfig:
    pretrained = setting == "pretrained adapter, beta"
    return RunConfig(
        model=str(material / ("adapter" if pretrained else "model")),
        lora=None if setting.endswith("adapter, beta") else {"r": 4, "alpha": 8, "vision": True},
        data=str(material / "rows.jsonl"),
        rewards=[f"{material / 'rewards.py'}:pattern"],
        output=str(output),
        train={
            "per_device_train_batch_size": 4 if "2x" not in setting else 2,
            "num_generations": 2,
            "max_completion_length": 4,
            "learning_rate": 1e-2,
            "save_steps": 3 if SETTINGS[setting]["max_steps"] == 18 else 2,
            "num_train_epochs": 100,
            "gradient_check": False,
            **SETTINGS[setting],
        },
    )


def in_child(action) -> int:
    """Run ``action`` in a forked process; its exit status, negative for the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


class At:
    """Calls ``die`` instead of the real function at its n-th call in this process."""

    def __init__(self, owner, name: str, call: int, after: bool = False) -> None:
        self.owner, self.name, self.call, self.after = owner, name, call, after

    def arm(self) -> None:
        real, count = getattr(self.owner, self.name), 0

        def function(*args, **kwargs):
            nonlocal count
            count += 1
            if count == self.call and not self.after:
                die()
            out = real(*args, **kwargs)
            if count == self.call:
                die()
            return out

        setattr(self.owner, self.name, function)


def moments(last: int) -> dict[str, At]:
    """Ten moments of a run of ``last`` steps in three epochs: in rollouts, updates, and in every part of a save."""
    trainer, saver = run.VLMGRPOTrainer, checkpoint.ExactCheckpoints
    return {
        "before the first update": At(trainer, "_compute_loss", 1),
        "in a rollout of the first epoch": At(trainer, "_generate_single_turn", 2, after=True),
        "while the first checkpoint is written": At(saver, "_resume_file", 1),
        "before the first checkpoint gets its name": At(checkpoint, "write_manifest", 1, after=True),
        "after the first checkpoint got its name": At(checkpoint, "rotate_checkpoints", 1),
        "in an update of the first epoch": At(trainer, "_compute_loss", 3, after=True),
        "in an update of the third epoch": At(trainer, "_compute_loss", last - 2),
        "before a checkpoint of the third epoch gets its name": At(checkpoint, "write_manifest", 4 if last == 9 else 5),
        "in the last update": At(trainer, "_compute_loss", last, after=True),
        "after the last checkpoint": At(run, "RunResult", 1),
    }


def figures(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: r.get(key) for key in ("step", "reward", "loss", "grad_norm", "kl")} for r in records if "loss" in r]


def samples(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [(r["step"], r["completion"]) for r in records]


def check(setting: str, chosen: list[int], material: Path, folder: Path, largest) -> None:
    whole = folder / "whole"
    assert in_child(lambda: run.train(config(material, whole, setting))) == 0
    expected, texts = figures(whole), samples(whole)
    last = SETTINGS[setting]["max_steps"]
    assert json.loads((whole / "metrics.jsonl").read_text().splitlines()[last - 3])["epoch"] > 2, "a third epoch"
    states = [torch.load(file, weights_only=True) for file in whole.glob("checkpoint-*/resume_state_0.pt")]
    assert any("rollout" in state for state in states) == (last == 18), "a checkpoint inside a rollout's steps"
    assert [record["step"] for record in expected] == list(range(1, last + 1))
    assert len({record["grad_norm"] for record in expected}) > last / 2, "every step does something else"
    for moment, at in [list(moments(last).items())[i] for i in chosen]:
        output = folder / moment.replace(" ", "-")

        def first(at=at, output=output):
            at.arm()
            run.train(config(material, output, setting))

        assert in_child(first) == -signal.SIGKILL, moment
        assert in_child(lambda output=output: run.train(config(material, output, setting))) == 0, moment
        found = figures(output)
        assert [r["step"] for r in found] == [r["step"] for r in expected], moment
        assert samples(output) == texts, moment
        for key in ("reward", "loss", "grad_norm", "kl"):
            gaps = [abs((a[key] or 0) - (b[key] or 0)) for a, b in zip(found, expected, strict=True)]
            largest(f"resume, {setting}", key, max(gaps))
            assert max(gaps) <= 1e-6, (moment, key)
        name = "model.safetensors" if setting == "no adapter, beta" else "adapter_model.safetensors"
        assert (output / name).read_bytes() == (whole / name).read_bytes(), moment


QUICK = {"defaults": [2, 7], "num_iterations 2": [5, 6], "pretrained adapter, beta": [8], "no adapter, beta": [7]}


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [
        pytest.param(*item, marks=[] if item[0] == "pretrained adapter, beta" else pytest.mark.slow)
        for item in QUICK.items()
    ],
)
def test_kill_nine(setting, chosen, material, tmp_path, largest):
    # covers Q10; one or two moments a setting; the slow test has all ten, and all settings
    check(setting, chosen, material, tmp_path, largest)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_kill_nine_at_ten_moments(setting, material, tmp_path, largest):
    # covers Q10
    check(setting, list(range(10)), material, tmp_path, largest)


def test_torn_checkpoint_is_ignored(material, tmp_path, caplog):
    output = tmp_path / "run"
    options = config(material, output, "defaults")
    whole = run.train(options)
    (output / "result.json").unlink()
    newest, older = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)[:2]
    with (newest / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert checkpoint.find_checkpoint(output) == (older, [newest])
    expected = figures(output)
    again = run.train(options)
    assert "is torn" in caplog.text and newest.name in caplog.text
    assert figures(output) == expected
    assert again.steps == whole.steps
    assert checkpoint.is_whole(newest), "written again"


def test_root_adapter_is_restored_beside_ref(material, tmp_path):
    """transformers restores subfolders only, as soon as there is one."""
    options = config(material, tmp_path / "run", "pretrained adapter, beta")
    run.train(options)
    newest, _ = checkpoint.find_checkpoint(tmp_path / "run")
    assert (newest / "ref" / "adapter_model.safetensors").is_file()
    trainer = run._Run(options, "train")
    fresh = trainer._trainer(*trainer._load())
    before = {n: p.detach().clone() for n, p in fresh.model.named_parameters()}
    fresh._load_from_checkpoint(str(newest))
    changed = {n for n, p in fresh.model.named_parameters() if not (p == before[n]).all()}
    assert changed == {n for n, p in fresh.model.named_parameters() if p.requires_grad}, "the trained adapter, only it"
    assert not any(".ref." in n for n in changed)


def test_the_best_checkpoint_of_a_whole_model_is_taken_at_the_end(tmp_path):
    """transformers reads it by the names of the modules, which are not those that it was written under."""
    model, processor = tiny.build("qwen2_5_vl")
    rows = Dataset.from_list([{"prompt": tiny.prompt("count one", 0), "completion": "red"}] * 2)
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "lr_scheduler_type": "constant"}
    quiet = {"report_to": "none", "disable_tqdm": True, "max_steps": 3, "learning_rate": 1.0}
    args = VLMSFTConfig(str(tmp_path), **best, **quiet)
    trainer = VLMSFTTrainer(model, args, rows, rows, processing_class=processor)
    trainer.train()
    losses = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert min(losses) < losses[-1], "a later step is worse"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_whole_model_with_a_weight_missing_is_a_sentence(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weight model.language_model.norm.weight is not in it"):
        checkpoint._restore_whole_model(model, tmp_path)


def test_foreign_checkpoint_is_a_sentence(material, tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        run.train(config(material, tmp_path / "run", "defaults"), resume_from_checkpoint=str(tmp_path / "none"))


@pytest.mark.slow
def test_an_older_checkpoint_begins_a_new_branch(material, tmp_path):
    """Newer checkpoints would otherwise be what the next start continues, and what rotation keeps."""
    output = tmp_path / "run"
    options = config(material, output, "defaults")
    run.train(options)
    expected = figures(output)
    older = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
    again = run.train(options, resume_from_checkpoint=str(older))
    assert again.steps == 9 and figures(output) == expected
    assert (output / "left-checkpoint-9-1").is_dir(), "set aside, not deleted"
    newest, torn = checkpoint.find_checkpoint(output)
    assert newest == output / "checkpoint-9" and not torn


def test_the_written_config_holds_the_values_in_effect(material, tmp_path):
    from vlm_grpo.config import load_config

    options = config(material, tmp_path / "run", "defaults")
    run.train(options.model_copy(update={"train": {**options.train, "max_steps": 1}}))
    written = load_config(tmp_path / "run" / "config.yaml").train
    assert (written["learning_rate"], written["num_generations"], written["beta"]) == (1e-2, 2, 0.0)
    assert written["loss_type"] == "dapo" and written["save_total_limit"] == 2, "defaults too"


def test_trained_weights_are_fp32_and_adapters_keep_theirs(material, tmp_path):
    """In half precision the optimizer's small updates of the weights themselves would be rounded away."""
    options = config(material, tmp_path / "run", "defaults")
    assert run._Run(options, "train")._dtype() == "auto"
    assert run._Run(options.model_copy(update={"lora": None}), "train")._dtype() == "float32"
