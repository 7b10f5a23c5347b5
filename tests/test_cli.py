"""The command line: what reaches run.py, what a user error looks like, and what --help does not import."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import vlm_grpo
from vlm_grpo.cli import app
from vlm_grpo.config import DataOptions, LoraOptions, RunConfig, resolved
from vlm_grpo.errors import CheckpointError

HEAVY = ("torch", "transformers", "trl", "unsloth", "datasets", "peft", "matplotlib")


@dataclass
class Recorder:
    """Stands in for run.py and remembers its calls."""

    calls: list[tuple[str, RunConfig, dict[str, Any]]] = field(default_factory=list)
    stopped: str | None = None
    error: BaseException | None = None

    def __call__(self, command: str, config: RunConfig, **options: Any) -> Any:
        self.calls.append((command, config, options))
        if self.error is not None:
            raise self.error
        return type(
            "RunResult",
            (),
            {"run_dir": Path("runs/x"), "steps": 7, "seconds": 1.6, "stopped": self.stopped, "left_out": {}},
        )()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder = Recorder()
    module = ModuleType("vlm_grpo.run")
    for command in ("train", "sft"):
        setattr(module, command, lambda config, command=command, **options: recorder(command, config, **options))
    module.plan = lambda config, command: {**resolved(config), "steps": 3}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlm_grpo.run", module)
    monkeypatch.setattr(vlm_grpo, "run", module, raising=False)
    monkeypatch.chdir(tmp_path)
    return recorder


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


BASE = ("train", "--model", "m", "--data", "a.jsonl", "--reward", "accuracy")


def trained(run: Recorder, *args: str) -> RunConfig:
    result = call(*BASE, *args)
    assert result.exit_code == 0, result.output
    return run.calls[-1][1]


def refused(*args: str) -> str:
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and result.stdout == ""
    return result.stderr.strip()


def test_every_option_reaches_the_config(run: Recorder):
    result = call(
        *("train", "--model", "m", "--data", "a.jsonl", "--eval-data", "b.jsonl", "--reward", "accuracy=0.7"),
        *("--reward", "my.py:f", "--output", "runs/x", "--max-steps", "5", "--backend", "hf", "--load-in-4bit"),
        *("--max-minutes", "1.5", "--seed", "3", "--set", "lora.r=8", "--set", "train.learning_rate=2e-5", "--fresh"),
    )
    assert result.exit_code == 0, result.output
    command, config, options = run.calls[-1]
    assert command == "train" and options == {"fresh": True, "resume_from_checkpoint": None}
    assert config == RunConfig(
        model="m",
        backend="hf",
        load_in_4bit=True,
        lora=LoraOptions(r=8),
        data=DataOptions(train="a.jsonl", eval="b.jsonl"),
        rewards=["accuracy=0.7", "my.py:f"],  # type: ignore[list-item]
        output="runs/x",
        max_minutes=1.5,
        train={"max_steps": 5, "seed": 3, "learning_rate": 2e-5},
    )
    assert "7 steps in 2 s, saved in runs/x" in result.stdout
    assert "vlm-grpo chat runs/x --image" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("equals", [False, True])
def test_hugging_faces_spellings(run: Recorder, dash: str, equals: bool):
    pairs = {
        "model_name_or_path": "m",
        "dataset_name": "a.jsonl",
        "output_dir": "runs/x",
        "max_steps": "5",
        "resume_from_checkpoint": "runs/x/checkpoint-5",
        "load_in_4bit": "true",
        "reward": "accuracy",
    }
    args = []
    for name, value in pairs.items():
        option = "--" + name.replace("_", dash)
        args += [f"{option}={value}"] if equals else [option, value]
    result = call("train", *args)
    assert result.exit_code == 0, result.output
    _, config, options = run.calls[-1]
    assert (config.model, config.data.train, config.output, config.load_in_4bit) == ("m", "a.jsonl", "runs/x", True)
    assert config.train == {"max_steps": 5} and config.notes == []
    assert options["resume_from_checkpoint"] == "runs/x/checkpoint-5"


@pytest.mark.parametrize(
    ("args", "train"),
    [
        (["--learning_rate", "2e-5"], {"learning_rate": 2e-5}),
        (["--learning-rate=2e-5"], {"learning_rate": 2e-5}),
        (["--log_completions"], {"log_completions": True}),
        (["--log_completions", "false"], {"log_completions": False}),
        (["--log_completions", "--beta", "0.1"], {"log_completions": True, "beta": 0.1}),
        (["--delta", "-1"], {"delta": -1}),
        (["--report_to", "wandb", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
        (["--generation_kwargs", "{top_k: 5}"], {"generation_kwargs": {"top_k": 5}}),
        (["--eval_strategy", "no"], {"eval_strategy": "no"}),
        (["--run_name=a=b"], {"run_name": "a=b"}),
        (["--train.beta", "0.1"], {"beta": 0.1}),
    ],
)
def test_any_other_option_is_a_trainer_option(run: Recorder, args: list[str], train: dict[str, Any]):
    assert trained(run, *args).train == train


def test_config_keys_are_options_too(run: Recorder):
    config = trained(run, "--lora", "true", "--dtype", "float32", "--data.split", "dev", "--max-seq-length", "4096")
    assert config.lora == LoraOptions() and config.dtype == "float32" and config.max_seq_length == 4096
    assert config.data == DataOptions(train="a.jsonl", split="dev")
    assert trained(run, "--no-load-in-4bit").load_in_4bit is False
    assert trained(run, "--load-in-4bit", "--load_in_4bit=false").load_in_4bit is False


@pytest.mark.parametrize(
    "order",
    [
        ["run.yaml", "--beta", "0.1", "--max-steps", "5"],
        ["--beta", "0.1", "run.yaml", "--max-steps", "5"],
        ["--max-steps", "5", "--beta", "0.1", "run.yaml"],
        ["--max-steps=5", "--config", "run.yaml", "--beta", "0.1"],
        ["--config=run.yaml", "--max-steps=5", "--beta", "0.1"],
    ],
)
def test_the_config_file_may_stand_anywhere_and_the_command_line_wins(run: Recorder, order: list[str]):
    Path("run.yaml").write_text("model: m\ndata: a.jsonl\nrewards: [accuracy]\ntrain: {max_steps: 9, seed: 1}\n")
    result = call("train", *order)
    assert result.exit_code == 0, result.output
    assert run.calls[-1][1].train == {"max_steps": 5, "seed": 1, "beta": 0.1}


def test_names_of_predecessors_are_explained_on_stderr(run: Recorder):  # covers Q6
    result = call(*BASE, "--grpo_beta", "0.1", "--grpo-alpha", "0.5", "--tune_mm_vision", "true")
    assert result.exit_code == 0
    _, config, _ = run.calls[-1]
    assert config.train == {"beta": 0.1} and config.lora is None and config.vision == "full"
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("Note: ") and line.endswith(".") for line in lines)
    assert "Note: grpo_beta is train.beta here." in lines


def test_sft_takes_the_same_config_and_no_reward(run: Recorder):
    result = call("sft", "--model", "m", "--data", "a.jsonl", "--num_train_epochs", "2")
    assert result.exit_code == 0, result.output
    command, config, _ = run.calls[-1]
    assert command == "sft" and config.train == {"num_train_epochs": 2} and config.rewards == []
    assert "--reward has no use" in refused("sft", "--model", "m", "--data", "a.jsonl", "--reward", "accuracy")


def test_resume_takes_true_as_the_newest_checkpoint(run: Recorder):
    trained(run, "--resume_from_checkpoint", "true")
    assert run.calls[-1][2] == {"fresh": False, "resume_from_checkpoint": None}
    assert "Give --fresh instead" in refused(*BASE, "--resume_from_checkpoint", "false")
    assert "contradict each other" in refused(*BASE, "--fresh", "--resume-from-checkpoint", "c")


def test_dry_run_prints_the_plan_and_runs_nothing(run: Recorder, tmp_path: Path):
    result = call(*BASE, "--reward", "format=0.3", "--lora.r", "4", "--dry-run")
    assert result.exit_code == 0 and run.calls == [] and list(tmp_path.iterdir()) == []
    rows = [re.split(r"\s*[│┃|]\s*", line.strip(" │┃|")) for line in result.stdout.splitlines()]
    expected = {("model", "m"), ("lora.r", "4"), ("steps", "3"), ("load_in_4bit", "false"), ("max_minutes", "unset")}
    assert {*expected, ("rewards", "accuracy=1, format=0.3")} <= {tuple(row) for row in rows}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("train",), "a model is needed"),
        (("train", "--modle", "m"), 'Was it meant by "modle"?'),
        (("train", "--model", "m"), "no training rows"),
        (("train", "--model", "m", "--data", "a.jsonl"), "no reward"),
        (("train", "absent.yaml"), "absent.yaml: the config file cannot be read (No such file or directory)"),
        ((*BASE, "--backend", "jax"), "backend: input should be 'auto', 'unsloth' or 'hf' (given 'jax')"),
        ((*BASE, "--set", "lora.rr=1"), 'unknown key "lora.rr"'),
        ((*BASE, "--set", "lora.r"), "there is no key=value"),
        ((*BASE, "--reward", "format=high"), 'the weight in "format=high" is not a number'),
        ((*BASE, "--min_pixels", "0"), "media.min_pixels: input should be greater than or equal to 1 (given 0)"),
        ((*BASE, "--fps", "2", "--base_interval", "1"), "fps=2 and base_interval=1 say the same; keep one"),
        ((*BASE, "--min_frames", "9", "--max_frames", "8"), "min_frames=9 is more than max_frames=8; swap them"),
        ((*BASE, "--scan", "half"), "media.scan: input should be 'headers', 'full' or 'off' (given 'half')"),
        ((*BASE, "--load_in_4bit=maybe"), "needs true or false"),
        ((*BASE, "--max-minutes", "-1"), "max_minutes: input should be greater than 0"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_code_2(run: Recorder, args: tuple[str, ...], expected: str):
    message = refused(*args)
    assert expected in message and "\n" not in message
    assert run.calls == []


def test_errors_of_the_run_are_sentences_too_and_bugs_are_not(run: Recorder):
    run.error = CheckpointError("runs/x was started with other options.")
    assert refused(*BASE) == "runs/x was started with other options."
    run.error = RuntimeError("a bug")
    result = call(*BASE)
    assert result.exit_code == 1 and result.exception is run.error


def test_ctrl_c_and_signals_exit_as_a_shell_expects(run: Recorder):
    run.error = KeyboardInterrupt()
    result = call(*BASE)
    assert result.exit_code == 130 and result.stderr.startswith("Stopped.") and result.stderr.count("\n") == 1
    run.error, run.stopped = None, "Ctrl-C"
    result = call(*BASE)
    assert result.exit_code == 130 and "Stopped by Ctrl-C at step 7" in result.stderr
    run.stopped = "SIGTERM"
    assert call(*BASE).exit_code == 143
    run.stopped = "time limit"
    result = call(*BASE)
    assert result.exit_code == 0 and "7 steps in 2 s (time limit), saved in runs/x" in result.stdout


def test_chat_and_demo_pass_their_options_on(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    chats, demos = ModuleType("vlm_grpo.chat"), ModuleType("vlm_grpo.demo")
    chats.chat = lambda *args, **media: calls.append((*args, media))  # type: ignore[attr-defined]
    demos.demo = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    for module in (chats, demos):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(vlm_grpo, module.__name__.rpartition(".")[2], module, raising=False)
    result = call("chat", "runs/x", "--image", "a.png", "--image", "b.png", "--prompt", "?", "--max-new-tokens", "9")
    assert result.exit_code == 0, result.output
    assert call("chat", "runs/x").exit_code == 0
    nothing = {"videos": None, "audios": None, "system": None, "temperature": 0.0}
    nothing |= {"compare_base": False, "stream": True, "as_json": False}
    assert calls == [("runs/x", ["a.png", "b.png"], "?", 9, nothing), ("runs/x", None, None, 256, nothing)]
    assert call("chat", "runs/x", "--video", "v.mp4", "--audio", "s.wav").exit_code == 0
    assert calls[-1] == ("runs/x", None, None, 256, {**nothing, "videos": ["v.mp4"], "audios": ["s.wav"]})
    options = ("--system", "s", "--temperature", "0.5", "--compare-base", "--no-stream", "--json")
    assert call("chat", "runs/x", *options).exit_code == 0
    given = {"system": "s", "temperature": 0.5, "compare_base": True, "stream": False, "as_json": True}
    assert calls[-1] == ("runs/x", None, None, 256, nothing | given)
    assert call("demo", "--seed", "5", "--output", "o", "--json", "--full").exit_code == 0
    given = {"modality": "image", "seed": 5, "output": "o", "as_json": True, "full": True, "algorithm": "grpo"}
    assert calls[-1] == given
    assert call("demo", "--modality", "smell").exit_code == 2


def test_help_shows_the_fields_own_words():
    text = " ".join(call("train", "--help").stdout.split())
    for name in ("model", "output", "backend", "load_in_4bit", "max_minutes"):
        assert str(RunConfig.model_fields[name].description) in text, name
    assert "--learning_rate 2e-5" in text
    assert call("--version").stdout.strip() == vlm_grpo.__version__
    assert {"train", "sft", "chat", "demo"} <= set(call("--help").stdout.split())


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import vlm_grpo, vlm_grpo.errors, vlm_grpo.config, vlm_grpo.cli\n"
        "try: vlm_grpo.cli.app(['train', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))\n"
        "print(time.perf_counter() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, loaded, seconds = done.stdout.splitlines()
    assert loaded == "[]"
    assert float(seconds) < 2, "0.2 s on an idle machine"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "vlm_grpo", "train", "--model", "m"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "train: no training rows. Give --data FILE.jsonl, or data: in the config file."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("No module named 'av'", name="av"), "(No module named 'av')"),
        (RuntimeError("operator torchvision::nms does not exist"), "(operator torchvision::nms does not exist)"),
    ],
)
def test_a_broken_installation_is_said_in_one_sentence(monkeypatch, error, said):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("vlm_grpo.chat.chat", broken)
    done = call("chat", "run", "--prompt", "hi")
    assert done.exit_code == 2
    assert done.stderr.strip() == (
        f"An installed package cannot be imported {said}. vlm-grpo doctor says which one and what to do."
    )
    error.args = ("something else",)
    if isinstance(error, ImportError):
        error.name = "vlm_grpo.chat"
    assert call("chat", "run", "--prompt", "hi").exception is error, "a bug keeps its traceback"
