"""The trainer as a drop-in for TRL's: its surface, every way a row may hold its media, rewards, options, refusals."""

import ast
import copy
import inspect
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import recorder
import reference
import tiny
import torch
import trl
from datasets import Dataset
from PIL import Image
from test_exact import differences, with_adapter
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

import vlm_grpo.trainer
from vlm_grpo import VLMGRPOTrainer, load_model
from vlm_grpo.checkpoint import ExactCheckpoints
from vlm_grpo.errors import ConfigError, DataFormatError, EncodingError, MediaError, UnsupportedError

SIZES = [(56, 56), (84, 56), (56, 112), (112, 84)]


def rows(count: int = 4, images: int = 1, **columns) -> list[dict]:
    """Rows that differ in text, picture and answer; ``images`` are PIL."""
    out = []
    for i in range(count):
        pictures = [tiny.image(10 * i + j, SIZES[i % 4]) for j in range(images)]
        out.append({"prompt": tiny.prompt(f"count {tiny.WORDS[i]}", images), "images": pictures, "answer": str(i)})
        out[-1] |= columns
    return out


def train(data, path, *, reward=recorder.reward, cls=recorder.Recorder, model=None, processor=None, **options):
    """Train a tiny Qwen2.5-VL; arguments of the trainer go under their names, all others into the config."""
    built = tiny.build("qwen2_5_vl")
    names = inspect.signature(VLMGRPOTrainer.__init__).parameters
    arguments = {name: options.pop(name) for name in list(options) if name in names}
    trainer = cls(
        model or built[0],
        reward,
        recorder.config(path, **options),
        Dataset.from_list(data) if isinstance(data, list) else data,
        processing_class=processor or built[1],
        **arguments,
    )
    trainer.train()
    return trainer


def logged(trainer, key: str) -> list:
    return [record[key] for record in trainer.state.log_history if key in record]


# ---- surface ----------------------------------------------------------------------------------------------------


def test_the_signature_is_trls_and_two_keywords():
    theirs = inspect.signature(trl.GRPOTrainer.__init__).parameters
    ours = inspect.signature(VLMGRPOTrainer.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs), "positional arguments mean what they mean in TRL"
    assert list(ours)[len(theirs) :] == ["media_root", "media"]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("media_root", "media"))
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


# What TRL 1.15 calls, and what these overrides were written against.
OVERRIDDEN = {
    "_set_signature_columns_if_needed": [],
    "_prepare_inputs": ["generation_batch"],
    "_generate_and_score_completions": ["inputs"],
    "_tokenize_prompts": ["prompts"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["model", "inputs"],
    "_get_per_token_logps_and_entropies": [
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        *("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
        *("spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
    ],
    "_save_checkpoint": ["model", "trial"],
}


def test_at_most_nine_methods_of_trls_are_overridden():
    theirs = {name for cls in (trl.GRPOTrainer, *trl.GRPOTrainer.__bases__) for name in vars(cls)}
    own = {name for cls in (VLMGRPOTrainer, ExactCheckpoints) for name, value in vars(cls).items() if callable(value)}
    overridden = (own & theirs) - {"__init__"}
    assert overridden == set(OVERRIDDEN)
    assert len(overridden) <= 9


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_has_not_moved_in_trl(name):
    theirs = list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)[1:]
    assert theirs == OVERRIDDEN[name], f"TRL changed the arguments of GRPOTrainer.{name}: compare our override"
    signature = inspect.signature(getattr(VLMGRPOTrainer, name))
    signature.bind(None, **dict.fromkeys(theirs))  # TypeError where ours does not take all of TRL's
    shared = [parameter for parameter in signature.parameters if parameter in theirs]
    assert shared == [parameter for parameter in theirs if parameter in shared], f"the order differs in {name}"


def test_no_body_is_copied_from_trl():
    def lines(path) -> list[str]:
        stripped = (line.strip() for line in Path(path).read_text().splitlines())
        return [line for line in stripped if line and not line.startswith("#")]

    def windows(text: list[str]) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + 16]) for i in range(len(text) - 15)}

    assert not windows(lines(vlm_grpo.trainer.__file__)) & windows(lines(inspect.getfile(trl.GRPOTrainer)))
    bodies = [node for node in ast.walk(ast.parse(Path(vlm_grpo.trainer.__file__).read_text()))]
    sizes = {n.name: n.end_lineno - n.lineno for n in bodies if isinstance(n, ast.FunctionDef) and n.end_lineno}
    assert max(sizes.values()) < 75, sizes


def test_a_plain_grpo_config_and_positional_arguments(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    args = trl.GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    steps = Steps()
    data = Dataset.from_list(rows())
    trainer = VLMGRPOTrainer(model, [recorder.reward], args, data, None, processor, None, [steps], (None, None))
    trainer.train()
    assert steps.seen == [1] and trainer.args.gradient_check is True
    assert type(trainer.args) is vlm_grpo.VLMGRPOConfig and type(args) is trl.GRPOConfig


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


# ---- rows -------------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_bytes(row, folder):
    return {**row, "images": [png(image) for image in row["images"]]}


def as_paths(row, folder):
    return {**row, "images": [saved(image, folder) for image in row["images"]]}


def saved(image, folder) -> str:
    path = folder / f"{hash(image.tobytes())}.png"
    image.save(path)
    return str(path)


def one_image(row, folder):
    return {"prompt": row["prompt"], "image": row["images"][0]}


def one_path(row, folder):
    return {"prompt": row["prompt"], "image": Path(saved(row["images"][0], folder)).name}


def in_parts(row, folder):
    parts = [{"type": "image", "image": saved(image, folder)} for image in row["images"]]
    return {"prompt": [{"role": "user", "content": [*parts, row["prompt"][0]["content"][-1]]}]}


def no_slots(row, folder):
    return {**row, "prompt": [{"role": "user", "content": row["prompt"][0]["content"][-1]["text"]}]}


def templated(row, folder):
    _, processor = tiny.build("qwen2_5_vl")
    return {**row, "prompt": processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)}


def undecoded(dataset):
    return dataset.cast_column("images", datasets.List(datasets.Image(decode=False)))


SHAPES = {
    "pil": (None, None),
    "bytes": (as_bytes, None),
    "paths": (as_paths, None),
    "datasets' bytes and path": (None, undecoded),
    "image column": (one_image, None),
    "relative path": (one_path, None),
    "inside the message parts": (in_parts, None),
    "without slots": (no_slots, None),
    "templated text": (templated, None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_shape_reaches_the_loss(shape, tmp_path):
    # covers U1
    model, processor = tiny.build("qwen2_5_vl")
    convert, cast = SHAPES[shape]
    truth = rows(images=1 if convert in (one_image, one_path) else 2)
    data = Dataset.from_list([convert(row, tmp_path) if convert else row for row in truth])
    options = {"media_root": tmp_path} if convert is one_path else {}
    trainer = train(cast(data) if cast else data, tmp_path / "run", model=model, processor=processor, **options)
    assert max(differences(trainer, processor, truth)) <= 1e-5
    other = [{**row, "images": [tiny.image(99, image.size) for image in row["images"]]} for row in truth]
    assert min(differences(trainer, processor, other)) > 1e-2, "the pictures matter"


def test_text_only_rows_with_a_processor_or_a_tokenizer(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    data = [{"prompt": tiny.prompt(f"count {word}", 0)} for word in tiny.WORDS[:4]]
    trainer = train(data, tmp_path, model=model, processor=processor)
    assert max(differences(trainer, processor, data)) <= 1e-5
    words = copy.deepcopy(processor.tokenizer)
    words.chat_template = processor.chat_template
    trainer = train(data, tmp_path, model=model, processor=words)
    assert max(differences(trainer, processor, data)) <= 1e-5


def test_the_processor_is_called_once_a_prompt(tmp_path, monkeypatch):
    _, processor = tiny.build("qwen2_5_vl")
    calls, real = [], type(processor).__call__

    def counting(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", counting)
    train(rows(), tmp_path, beta=0.1, num_iterations=2, num_generations=4, steps_per_generation=4, max_steps=2)
    assert len(calls) == 4, "16 completions of 4 prompts, with old and reference log-probs, two updates"
    calls.clear()
    stream = Dataset.from_list(rows()).to_iterable_dataset()
    trainer = train(stream, tmp_path, max_steps=2)
    assert trainer.state.global_step == 2 and len(calls) == 8, "2 generations of 4 prompts"


@pytest.mark.parametrize("workers", [0, 2])
def test_rewards_get_the_original_rows(workers, tmp_path):
    # every column beside its completion, with several workers; covers U9
    _, processor = tiny.build("qwen2_5_vl")
    truth = {row["prompt"][0]["content"][-1]["text"]: row for row in rows()}
    pairs: set[tuple] = set()
    seen = []

    class Watch(recorder.Recorder):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            pairs.update((tuple(p), tuple(c)) for p, c in zip(prompt_ids, out[0], strict=True))
            return out

    def reward(prompts, completions, completion_ids, images, answer, trainer_state, **columns):
        assert set(columns) == {"log_extra", "log_metric"}
        for prompt, completion, ids, pictures, right in zip(
            prompts, completions, completion_ids, images, answer, strict=True
        ):
            text = prompt[0]["content"][-1]["text"]
            row = truth[text]
            assert right == row["answer"] and len(pictures) == 1
            assert isinstance(pictures[0], Image.Image)
            assert np.array_equal(np.asarray(pictures[0]), np.asarray(row["images"][0]))
            encoded = reference.encode(processor, row)["input_ids"][0].tolist()
            assert (tuple(encoded), tuple(ids)) in pairs, "this completion was sampled for this row"
            assert completion[0]["content"].strip() == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            seen.append(text)
        return recorder.reward(completions, completion_ids)

    train(rows(), tmp_path, reward=reward, cls=Watch, dataloader_num_workers=workers, max_steps=2)
    assert sorted(seen) == sorted(4 * list(truth)), "2 steps x 2 completions"


# ---- rewards ----------------------------------------------------------------------------------------------------


def test_weighted_rewards_and_rows_that_cannot_be_scored(tmp_path):
    # covers U8
    def length(completion_ids, **columns):
        return [float(i % 3) for i in range(len(completion_ids))]

    def sometimes(completion_ids, **columns):
        return [None if i < 4 else float(i) for i in range(len(completion_ids))]

    def never(completion_ids, **columns):
        return [None] * len(completion_ids)

    rewards = [length, sometimes, never]
    trainer = train(rows(), tmp_path, reward=rewards, reward_weights=[2.0, 0.5, 10.0], scale_rewards="none")
    first, second = [float(i % 3) for i in range(8)], [0.0] * 4 + [4.0, 5.0, 6.0, 7.0]
    total = [2 * a + 0.5 * b for a, b in zip(first, second, strict=True)]
    expected = [value - (total[i - i % 2] + total[i - i % 2 + 1]) / 2 for i, value in enumerate(total)]
    found = [row.advantage for batch in trainer.rows for row in batch]
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-6)
    assert logged(trainer, "reward") == [pytest.approx(sum(total) / 8)]
    assert rewards == [length, sometimes, never]
    assert all(math.isfinite(value) for value in logged(trainer, "loss") + logged(trainer, "grad_norm"))


@pytest.mark.parametrize("value", [None, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_equal_or_absent_rewards_move_nothing(value, beta, tmp_path):
    """Zero advantages, no NaN, and no false alarm of the gradient check."""

    def reward(completions, **columns):
        return [value] * len(completions)

    model, processor = tiny.build("qwen2_5_vl")
    before = copy.deepcopy(model.state_dict())
    # SGD: Adam would make steps of full length out of the rounding between policy and reference.
    options = {"learning_rate": 1e-2, "beta": beta, "optim": "sgd"}
    trainer = train(rows(), tmp_path, reward=reward, model=model, **options)
    assert {row.advantage for batch in trainer.rows for row in batch} == {0.0}
    assert logged(trainer, "grad_norm") == [pytest.approx(0, abs=1e-6)]
    assert all(torch.allclose(before[name], weight, atol=1e-4) for name, weight in model.state_dict().items())
    assert trainer._gradient_check.pending or beta  # rounding may pass for a signal


def test_async_rewards_and_rewards_that_log(tmp_path):
    async def slowly(completions, completion_ids, **columns):
        return recorder.reward(completions, completion_ids)

    def logs(completions, log_extra, log_metric, answer, **columns):
        log_extra("answer", [f"right: {text}" for text in answer])
        log_metric("mine", 3.0)
        return [0.0] * len(completions)

    trainer = train(rows(), tmp_path, reward=[slowly, logs], log_completions=True)
    assert trainer.reward_func_names == ["slowly", "logs"] and logged(trainer, "mine") == [3.0]
    assert logged(trainer, "rewards/slowly/std")[0] > 0
    answers = list(trainer._logs["extra"]["answer"])
    assert len(answers) == 8 and all(text.startswith("right: ") for text in answers), "the reward's own, once a row"


def test_a_reward_model_scores_image_rows_and_the_list_stays(tmp_path):
    _, processor = tiny.build("qwen2_5_vl")
    words = copy.deepcopy(processor.tokenizer)
    words.chat_template = processor.chat_template
    shape = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    judge = LlamaForSequenceClassification(LlamaConfig(**shape, num_attention_heads=2, num_labels=1, pad_token_id=1))
    judge.save_pretrained(tmp_path / "judge")
    words.save_pretrained(tmp_path / "judge")
    rewards = [str(tmp_path / "judge")]
    trainer = train(rows(), tmp_path, reward=rewards, gradient_check=False)
    assert rewards == [str(tmp_path / "judge")], "TRL replaces the entries of the list it is given"
    assert logged(trainer, "rewards/judge/std")[0] > 0


# ---- what TRL offers beside ------------------------------------------------------------------------------------


def test_evaluation_during_training(tmp_path):
    held_out = rows(6)[4:]
    texts = set()

    def reward(prompts, completion_ids, **columns):
        texts.update((len(prompts), prompt[0]["content"][-1]["text"]) for prompt in prompts)
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = train(
        rows(),
        tmp_path,
        reward=reward,
        eval_dataset=Dataset.from_list(held_out),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=4,
        beta=0.1,
        max_steps=2,
    )
    assert len(logged(trainer, "eval_loss")) == len(logged(trainer, "eval_reward")) == 2
    assert all(math.isfinite(value) for value in logged(trainer, "eval_loss"))
    assert {text for count, text in texts if count == 4} == {f"count {word}" for word in tiny.WORDS[4:6]}
    assert {text for count, text in texts if count == 8} == {f"count {word}" for word in tiny.WORDS[:4]}


def test_completions_are_logged_with_their_pictures(tmp_path, capsys):
    import pandas

    data = rows()
    data[1] = {"prompt": tiny.prompt("no picture", 0), "images": [], "answer": "1"}
    trainer = train(data, tmp_path, log_completions=True)
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 8 and {"prompt", "completion", "reward", "advantage", "answer"} <= set(table.columns)
    assert "<PIL" not in json.dumps(table["prompt"].tolist(), default=str)
    for prompt, pictures, answer in zip(trainer._logs["prompt"], trainer._logs["images"], table["answer"], strict=True):
        row = data[int(answer)]
        assert prompt[0]["content"][-1]["text"] == row["prompt"][0]["content"][-1]["text"]
        assert [np.asarray(p).tolist() for p in pictures] == [np.asarray(p).tolist() for p in row["images"]]
    assert "[IMAGE]" in capsys.readouterr().out


def look(what: str) -> str:
    """Look at something.

    Args:
        what: what to look at.
    """
    return f"{what} is red"


def show(what: str) -> list:
    """Show something.

    Args:
        what: what to show.
    """
    return [{"type": "image", "image": tiny.image(5)}, {"type": "text", "text": what}]


def calls_tool(tool):
    """A trainer whose model calls ``tool`` in the first turn of every second completion."""

    class Calls(recorder.Recorder):
        turns = 0

        def _generate_single_turn(self, prompt_ids, images, fields, *args, **kwargs):
            ids, logprobs = super()._generate_single_turn(prompt_ids, images, fields, *args, **kwargs)
            self.turns += 1
            if self.turns == 1:
                call = f'<tool_call>{{"name": "{tool.__name__}", "arguments": {{"what": "cat"}}}}</tool_call><|im_end|>'
                call_ids = self._tokenizer(call, add_special_tokens=False)["input_ids"]
                ids = [call_ids if i % 2 else row for i, row in enumerate(ids)]
            return ids, logprobs

        def _compute_loss(self, model, inputs):
            self.batches = [*getattr(self, "batches", []), inputs]
            return super()._compute_loss(model, inputs)

    return Calls


def test_tools_that_return_text_work_on_image_rows(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    data = rows(images=2)
    options = {"tools": [look], "max_completion_length": 120, "mask_truncated_completions": False}
    trainer = train(data, tmp_path, cls=calls_tool(look), model=model, processor=processor, **options)
    assert trainer.turns == 2 and logged(trainer, "tools/call_frequency") == [0.5]
    assert logged(trainer, "tools/failure_frequency") == [0.0]
    encoded = {}
    for row in data:
        arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        e = processor.apply_chat_template([reference.conversation(row)], tools=[look], **arguments)
        encoded[tuple(e["input_ids"][0].tolist())] = dict(e)
    model.eval()
    called = 0
    result = "cat is red"
    for batch, inputs in zip(trainer.rows, trainer.batches, strict=True):
        for i, row in enumerate(batch):
            with torch.no_grad():
                expected = reference.logps(model, encoded[tuple(row.prompt)], row.completion, 0.8)
            assert (row.logps - expected).abs().max() <= 1e-5
            masked = [t for t, m in zip(row.completion, inputs["tool_mask"][i].tolist(), strict=False) if not m]
            called += bool(masked)
            assert bool(masked) == (result in processor.tokenizer.decode(masked))
    assert called == 4, "tool results carry no loss, everything else does"


def test_tools_that_return_images_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="A tool returned an image.*Return text from tools"):
        train(rows(), tmp_path, cls=calls_tool(show), tools=[show], max_completion_length=200)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_trains(loss_type, tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    before = copy.deepcopy(model.state_dict())
    trainer = train(
        rows(), tmp_path, model=model, loss_type=loss_type, learning_rate=1e-3, num_iterations=2, max_steps=2
    )
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert all(value > 0 for value in logged(trainer, "grad_norm"))
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"top_entropy_quantile": 0.2},
        {"entropy_coef": 0.1},
        {"use_adaptive_entropy": True, "entropy_target": 1.0},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"steps_per_generation": None, "generation_batch_size": 8},
        {"off_policy_mask_threshold": 0.5, "delta": 2.0},
        {"pad_to_multiple_of": 8, "beta": 0.1, "use_bias_correction_kl": True},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
        {"gradient_checkpointing": False, "remove_unused_columns": True, "shuffle_dataset": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_trls_keep_working(options, tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    data = rows()
    trainer = train(data, tmp_path, model=model, processor=processor, **options)
    assert max(differences(trainer, processor, data)) <= 1e-5
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert all(value > 0 for value in logged(trainer, "grad_norm"))


def test_truncated_completions_are_masked_without_a_false_alarm(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    trainer = train(rows(), tmp_path, model=model, mask_truncated_completions=True, max_completion_length=2)
    assert logged(trainer, "completions/clipped_ratio") == [1.0], "none of them found its end"
    assert logged(trainer, "grad_norm") == [0.0] and trainer._gradient_check.pending


# ---- what a completion may hold ---------------------------------------------------------------------------------


def wants(model, token: int) -> None:
    """Make ``token`` overwhelmingly likely everywhere."""
    old = model.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features)
    head.weight = old.weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[token] = 1000.0
    model.set_output_embeddings(head)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_a_placeholder_is_never_sampled(family, tmp_path):
    model, processor = tiny.build(family)
    token = model.config.image_token_id
    wants(model, token)
    row = reference.encode(processor, rows()[0])
    sampled = model.generate(**row, max_new_tokens=6, do_sample=True)[0, row["input_ids"].size(1) :]
    assert (sampled == token).all(), "the test would be empty if the model did not want it"
    trainer = train(rows(), tmp_path, model=model, processor=processor, generation_kwargs={"suppress_tokens": [7]})
    completions = [row.completion for batch in trainer.rows for row in batch]
    assert len(completions) == 8 and not {token, 7} & {t for ids in completions for t in ids}


def test_a_completion_ends_at_any_configured_eos(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    ends = [tiny.EOS, *range(40, 60)]
    model.generation_config.eos_token_id = ends
    trainer = train(rows(), tmp_path, model=model, max_completion_length=60)
    completions = [row.completion for batch in trainer.rows for row in batch]
    ended = [ids for ids in completions if ids[-1] in ends]
    assert len(ended) >= 4 and any(ids[-1] != tiny.EOS for ids in ended)
    for ids in completions:
        assert not set(ids[:-1]) & set(ends)
        assert len(ids) == 60 or ids[-1] in ends


# ---- reference, saving, what stays the user's ------------------------------------------------------------------


def test_the_reference_is_the_model_as_given(tmp_path):
    """Not the folder it once came from: the weights were changed in memory since."""
    tiny.save("qwen2_5_vl", tmp_path / "model")
    model, processor = load_model(str(tmp_path / "model"), backend="hf")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    given = copy.deepcopy(model.state_dict())
    trainer = train(rows(), tmp_path, model=model, processor=processor, beta=0.1, learning_rate=1e-2, max_steps=3)
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[1] > 1e-6 and kl[2] > 1e-6
    assert trainer.ref_model is not None and not any(p.requires_grad for p in trainer.ref_model.parameters())
    after = trainer.ref_model.state_dict()
    assert after.keys() == given.keys() and all(torch.equal(after[name], given[name]) for name in given)
    assert any(not torch.equal(weight, given[name]) for name, weight in model.state_dict().items())
    assert trainer.beta == trainer.args.beta == 0.1


def test_the_reference_follows_where_asked_and_sees_the_same_head(tmp_path):
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = train(rows(), tmp_path, beta=0.1, learning_rate=1e-2, max_steps=2, **sync)
    assert trainer.args.sync_ref_model and trainer.ref_model is not None
    pairs = zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    model, processor = tiny.build("qwen2_5_vl")
    model = model.to(torch.bfloat16)
    trainer = train(rows(), tmp_path, model=model, processor=processor, beta=0.1, cast_lm_head_to_fp32=True)
    assert logged(trainer, "kl") == [0.0], "head in fp32 for both, or for neither"


def test_a_peft_config_means_the_base_model_is_the_reference(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = train(rows(), tmp_path, peft_config=config, beta=0.1, learning_rate=1e-2, max_steps=2)
    assert trainer.ref_model is None
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[1] > 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_is_loaded_again(lora, tmp_path):
    # covers U11
    tiny.save("qwen2_5_vl", tmp_path / "base")
    model, processor = load_model(str(tmp_path / "base"), backend="hf")
    if lora:
        model = with_adapter(model, trained=False)
    trainer = train(rows(), tmp_path / "run", model=model, processor=processor, learning_rate=1e-2)
    trainer.save_model(str(tmp_path / "saved"))
    loaded, its_processor = load_model(str(tmp_path / "saved"), backend="hf")
    row = rows()[0]
    encoded, again = reference.encode(processor, row), reference.encode(its_processor, row)
    assert encoded.keys() == again.keys() and all(torch.equal(encoded[key], again[key]) for key in encoded)
    original = tiny.build("qwen2_5_vl")[0]
    with torch.no_grad():
        expected, found, old = (reference.logps(m.eval(), again, [40, 41, 42]) for m in (model, loaded, original))
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)
    assert (found - old).abs().max() > 1e-3, "it was trained"


def test_the_users_objects_stay_as_they_were(tmp_path):
    # covers U9
    model, processor = tiny.build("qwen2_5_vl")
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.truncation_side = "right"
    before = repr(processor)
    rewards = (recorder.reward,)
    config = recorder.config(tmp_path, beta=0.1)
    options = config.to_dict()
    data = Dataset.from_list(rows())
    trainer = VLMGRPOTrainer(model, rewards, config, data, None, processor)
    trainer.train()
    assert repr(processor) == before and processor.tokenizer.padding_side == "right"
    assert trainer.processing_class is not processor and trainer._tokenizer.padding_side == "left"
    assert trainer.model is model and config.to_dict() == options
    assert data.column_names == ["prompt", "images", "answer"] and isinstance(data[0]["images"][0], Image.Image)


# ---- refusals ---------------------------------------------------------------------------------------------------


def part(**content):
    return [{"prompt": [{"role": "user", "content": [content, {"type": "text", "text": "hi"}]}]}] * 4


REFUSED = {
    "few rows": (rows(3), {}, ConfigError, "has 3 rows, but one generation batch takes 4 prompts"),
    "one completion": (rows(), {"num_generations": 1}, ConfigError, "num_generations=1"),
    "vllm": (rows(), {"use_vllm": True}, UnsupportedError, "use_vllm=True is not available"),
    "continuous batching": (
        rows(),
        {"use_transformers_continuous_batching": True},
        UnsupportedError,
        "use_transformers_continuous_batching=True is not available",
    ),
    "rollout": (rows(), {"rollout_func": print}, UnsupportedError, "rollout_func has no multimodal test"),
    "environment": (rows(), {"environment_factory": dict}, UnsupportedError, "environment_factory has no"),
    "a list of rows": (tuple(rows()), {}, DataFormatError, "train_dataset is a tuple"),
    "hologram": (part(type="hologram"), {}, DataFormatError, "a part of type 'hologram'.*Use one of text, image"),
    "a video": (
        part(type="video", video="v.mp4"),
        {},
        MediaError,
        'The video "v.mp4" does not exist — row 0 of the batch',
    ),
    "more slots": ([{**r, "images": []} for r in rows()], {}, DataFormatError, "has 1 image slot but .* holds 0"),
    "more images": (
        [{**r, "images": [tiny.image(1)] * 3} for r in rows(images=2)],
        {},
        DataFormatError,
        "has 2 image slots but .* holds 3",
    ),
    "a token in the text": (
        [{**r, "prompt": tiny.prompt("is <|image_pad|> red")} for r in rows()],
        {},
        EncodingError,
        r"A text of the prompt holds the image token <\|image_pad\|>",
    ),
    "templated, two tokens": (
        [{**r, "prompt": "<|image_pad|><|image_pad|>hi"} for r in rows()],
        {},
        EncodingError,
        r"The prompt has 2 image tokens .* but the row has 1 image ",
    ),
    "templated, two images": (
        [{**r, "prompt": "<|image_pad|>hi"} for r in rows(images=2)],
        {},
        EncodingError,
        "has 1 image token .* but the row has 2 images",
    ),
    "templated, no token": (
        [{**r, "prompt": "hi"} for r in rows()],
        {},
        EncodingError,
        "its encoded prompt has no image token",
    ),
    "a picture no processor takes": (
        [{**r, "images": [tiny.image(1, (1, 600))]} for r in rows()],
        {},
        EncodingError,
        "The processor refuses a row .aspect ratio|absolute aspect ratio",
    ),
    "a broken picture": (
        [{**r, "images": [png(tiny.image(1))[:60]]} for r in rows()],
        {},
        MediaError,
        r"cannot be read .* row \d of the batch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_sentence(case, tmp_path):
    data, options, error, sentence = REFUSED[case]
    if case == "a broken picture":
        data = undecoded(Dataset.from_list(data))
    with pytest.raises(error, match=sentence) as caught:
        train(data, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_refused_arguments_are_refused_by_position_too(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    before = [model, recorder.reward, recorder.config(tmp_path), Dataset.from_list(rows()), None, processor]
    with pytest.raises(UnsupportedError, match="rollout_func"):
        VLMGRPOTrainer(*before, None, None, (None, None), None, None, None, print)


# ---- import order, and machines that lack a library ------------------------------------------------------------

GENERATED = """
import dataclasses, transformers, trl
import trl.trainer.grpo_config as config_home, trl.trainer.grpo_trainer as home

class UnslothGRPOTrainer({base}):
    def __init__(self, *args, **kwargs):
        raise AssertionError("the generated class was used")

@dataclasses.dataclass
class UnslothGRPOConfig(trl.GRPOConfig):
    beta: float = None
    learning_rate: float = 5e-5

for name, fake, place in (
    ("GRPOTrainer", UnslothGRPOTrainer, home), ("GRPOConfig", UnslothGRPOConfig, config_home)
):
    if {pretends}:
        fake.__module__, fake.__name__, fake.__qualname__ = place.__name__, name, name
    for module in (trl, trl.trainer, place):
        setattr(module, name, fake)
"""
MISSING = """
from importlib.machinery import PathFinder
gone, found = ("unsloth", "unsloth_zoo", "xformers", "bitsandbytes"), PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *args: None if name.partition(".")[0] in gone else found(name, *args)
)
"""
ONE_STEP = """
import math, sys
sys.path.insert(0, {tests!r})
import recorder, tiny, trl
from datasets import Dataset
from vlm_grpo import VLMGRPOTrainer, load_model
source = [c for c in VLMGRPOTrainer.__mro__ if c.__name__ == "GRPOTrainer"]
assert len(source) == 1 and source[0]._compute_loss.__code__.co_filename.endswith("trl/trainer/grpo_trainer.py")
model, processor = load_model({folder!r}, backend="auto")
rows = [{{"prompt": tiny.prompt(word), "images": [tiny.image(i)]}} for i, word in enumerate(tiny.WORDS[:4])]
trainer = VLMGRPOTrainer(
    model, recorder.reward, recorder.config({folder!r} + "/run"), Dataset.from_list(rows), processing_class=processor
)
trainer.train()
record = trainer.state.log_history[0]
assert math.isfinite(record["loss"]) and record["grad_norm"] > 0, record
"""
WORLDS = {
    "an unrelated class that pretends": GENERATED.format(base="transformers.Trainer", pretends=True),
    "a subclass of TRL's": GENERATED.format(base="trl.GRPOTrainer", pretends=False),
    "a subclass that pretends": GENERATED.format(base="trl.GRPOTrainer", pretends=True),
    "no unsloth, xformers or bitsandbytes": MISSING,
}


@pytest.mark.parametrize("world", [pytest.param(w, marks=pytest.mark.slow) if w.startswith("a") else w for w in WORLDS])
def test_one_step_in_any_import_order(world, tmp_path):
    # covers U5
    folder = tiny.save("qwen2_5_vl", tmp_path / "model")
    code = WORLDS[world] + ONE_STEP.format(tests=str(Path(__file__).parent), folder=folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
