"""``JudgeReward``: a trained reward model as a reward, on the policy's base and on its own."""

import json
import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import judges
import pytest
import recorder
import tiny
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from vlm_grpo import RunConfig, load_rewards
from vlm_grpo.cli import app
from vlm_grpo.collate import collate
from vlm_grpo.config import MediaOptions, RewardSpec, load_config
from vlm_grpo.data import blanked, to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import RewardError, UnsupportedError
from vlm_grpo.evaluate import Yardstick, evaluate
from vlm_grpo.evaluating import evaluate_run, job
from vlm_grpo.group import GroupSharing
from vlm_grpo.judging.prompt import JudgePrompt
from vlm_grpo.models import load_model, load_processor
from vlm_grpo.models.adapters import adapter_parameters, role
from vlm_grpo.models.families import family_of, placeholder_ids
from vlm_grpo.models.heads import HEAD_FILE, heads_of
from vlm_grpo.rewards import as_functions, finite_reward, introduce, marks, say_changed, show_model, shown
from vlm_grpo.rewards import standing as standings
from vlm_grpo.rewards.judge import JudgeReward
from vlm_grpo.rewards.server import Scorer
from vlm_grpo.rewards.showing import Shown
from vlm_grpo.run import train
from vlm_grpo.trial import try_rewards

FAMILIES = ("qwen2_5_vl", "gemma3", "qwen2_audio")
COMPLETIONS: list[Any] = ["one", "", [{"role": "assistant", "content": "two <|im_end|> red"}]]
TEXT = "two <|im_end|> red"
MAKERS = {"image": tiny.image, "video": tiny.video, "audio": tiny.audio}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``(base, reward run)`` of a family."""
    folders: dict[str, tuple[str, str]] = {}

    def get(family: str) -> tuple[str, str]:
        if family not in folders:
            path = tmp_path_factory.mktemp(family)
            base = judges.base(family, path / "base")
            folders[family] = base, judges.reward_run(base, path / "judge")
        return folders[family]

    return get


def on_policy(run: str, model: Any, processor: Any, **options: Any) -> JudgeReward:
    judge = JudgeReward(run, **options)
    introduce([judge], processor=processor, media=MediaOptions())
    show_model([judge], model)
    return judge


def by_hand(run: str, base: str, rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    """Independent: PEFT's own loading, one row a forward, the hidden states as the whole model returns them."""
    model = PeftModel.from_pretrained(load_model(base)[0], run).eval()
    processor, head = load_processor(run), load_file(Path(run, HEAD_FILE))
    scores = []
    for row, text in zip(rows, texts, strict=True):
        sample = to_sample(row)
        encoded = encode(processor, sample)
        suffix = JudgePrompt.load(run).suffix(processor, sample, text)
        ids = torch.tensor([[*encoded.input_ids, *suffix]])
        inputs = collate([encoded], ids.size(1), [len(suffix)])
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, output_hidden_states=True)
        scores.append(float(out.hidden_states[-1][0, -1] @ head["weight"][0] + head["bias"][0]))
    return scores


@pytest.mark.parametrize("family", ["qwen2_audio", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[:2])])
def test_one_score_alone_in_any_batch_on_either_standing(made, family):  # covers A3, hold 4
    base, run = made(family)
    rows = judges.rows(family)
    own = JudgeReward(run)
    found = judges.call(own, rows, COMPLETIONS)
    assert found == pytest.approx(by_hand(run, base, rows, ["one", "", TEXT]), abs=1e-5)
    order = [2, 0, 1]
    shuffled = judges.call(own, [rows[i] for i in order], [COMPLETIONS[i] for i in order])
    assert shuffled == pytest.approx([found[i] for i in order], abs=1e-5)
    alone = [judges.call(own, [row], [text])[0] for row, text in zip(rows, COMPLETIONS, strict=True)]
    assert alone == pytest.approx(found, abs=1e-5)
    group = judges.call(own, [rows[0]] * 3, ["one", "two", "red"])
    assert group[0] == pytest.approx(found[0], abs=1e-5) and len({round(score, 4) for score in group}) == 3

    policy, processor = judges.policy(base)
    shared = on_policy(run, policy, processor)
    assert shared.on_policy and not own.on_policy
    assert judges.call(shared, rows, COMPLETIONS) == pytest.approx(found, abs=1e-5)
    assert shared([], []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_and_blanked_media_move_the_score(made, family):  # covers A3, hold 3
    judge = JudgeReward(made(family)[1])
    for kind in tiny.KINDS[family]:
        media = [MAKERS[kind](0), MAKERS[kind](7)]
        rows = [{"prompt": _prompt(kind), f"{kind}s": [one]} for one in media]
        black = blanked(to_sample(rows[0]), MediaOptions(), 16_000)
        rows.append({"prompt": black.prompt, f"{kind}s": None})
        first, swapped, without = judges.call(judge, rows, ["one"] * 3)
        assert abs(first - swapped) > 1e-3 and abs(first - without) > 1e-3, (kind, first, swapped, without)


def _prompt(kind: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "count"}]}]


def train_rows() -> list[dict[str, Any]]:
    return [{"prompt": _prompt("image"), "images": [tiny.image(n)], "answer": tiny.WORDS[n]} for n in range(4)]


class Written(recorder.Recorder):
    """Keeps what rewards are called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.called: list[tuple[list, list, list]] = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, ids):
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        self.called.append((list(inputs), completions, rewards[:, 0].tolist()))
        return rewards


def state_of(model: Any) -> dict[str, Any]:
    return {
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "active": model.active_adapters,
        "random": torch.get_rng_state().tolist(),
    }


def same_scores(trainer: Written, run: str) -> None:
    """The rewards of a run are those of the reward model by itself."""
    own = JudgeReward(run)
    for inputs, completions, rewards in trainer.called:
        rows = [row.original for row in inputs]
        assert judges.call(own, rows, completions) == pytest.approx(rewards, abs=1e-5, rel=5e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3", {"max_steps": 1}),
        pytest.param(
            "qwen2_5_vl", {"max_steps": 3, "beta": 0.1, "gradient_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_in_a_run_it_stands_on_the_policy_and_shares_its_prompts(made, tmp_path, monkeypatch, family, options):
    # covers A3, O3, U9, hold 3
    base, run = made(family)
    model, processor = judges.policy(base)
    monkeypatch.setattr(standings, "load_model", _never)
    seen, within, encoded = [], [], []
    tower = next(module for name, module in model.named_modules() if name.endswith(("visual", "vision_tower")))
    tower.register_forward_hook(lambda *_: encoded.extend(within))
    score = standings.Scores.__call__

    def scores(self: Any, encodings: list[Any], suffixes: list[list[int]]) -> torch.Tensor:
        seen.extend(encodings)
        within.append(1)
        try:
            return score(self, encodings, suffixes)
        finally:
            within.pop()

    monkeypatch.setattr(standings.Scores, "__call__", scores)
    judge = JudgeReward(run, name="judge")
    before = state_of(model)["flags"]
    trainer = Written(
        model,
        [judge, recorder.reward],
        recorder.config(tmp_path / "run", learning_rate=1e-2, **options),
        Dataset.from_list(train_rows()),
        processing_class=processor,
    )
    after = state_of(model)["flags"]
    assert judge.on_policy and {name: flag for name, flag in after.items() if name in before} == before
    assert after.keys() > before.keys() and not any(after[name] for name in after.keys() - before.keys())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    policy = [p.clone() for p in adapter_parameters(model, "default")]
    trainer.train()
    assert [id(one) for one in seen] == [id(row.encoding) for inputs, *_ in trainer.called for row in inputs]
    assert len(encoded) <= 2 < len({id(one) for one in seen}), "only the first-use check encodes a medium again"
    monkeypatch.undo()
    rows, first = train_rows()[:2], judges.call(JudgeReward(run), train_rows()[:2], ["one", "two"])
    assert judges.call(judge, rows, ["one", "two"]) == pytest.approx(first, abs=1e-5), "also behind steps of training"
    assert any(not torch.equal(a, b) for a, b in zip(policy, adapter_parameters(model, "default"), strict=True))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert max(record.get("rewards/judge/std", 0) for record in trainer.state.log_history) > 0.01
    same_scores(trainer, run)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the base is there already")


def test_the_policy_is_left_as_it_was(made):
    base, run = made("gemma3")
    model, processor = judges.policy(base)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    judge = on_policy(run, model, processor)
    before = state_of(model)
    rows = judges.rows("gemma3")
    found = judges.call(judge, rows, COMPLETIONS)
    assert state_of(model) == before
    with model.disable_adapter():  # as an evaluation of the base does
        assert judges.call(judge, rows, COMPLETIONS) == pytest.approx(found, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in heads_of(model)["reward"].parameters())


@pytest.mark.slow
def test_another_base_with_another_processor_judges(made, tmp_path):  # covers A3, O3
    """A reward model of another family, beside a policy with an adapter and beside one that is trained whole."""
    run = made("gemma3")[1]
    model, processor = judges.policy(made("qwen2_5_vl")[0])
    reward = as_functions([run])[0]
    assert isinstance(reward, JudgeReward)
    data = Dataset.from_list(train_rows())
    trainer = Written(model, [run], recorder.config(tmp_path), data, processing_class=processor)
    trainer.train()
    same_scores(trainer, run)
    assert list(model.peft_config) == ["default"] and "rewards/judge/mean" in trainer.state.log_history[0]
    whole, _ = tiny.build("gemma3")
    (judge,), _ = load_rewards([RewardSpec(name="model", kwargs={"model": run})])
    show_model([judge], whole)
    assert not judge.__wrapped__.on_policy


def test_several_reward_models_have_adapters_of_their_own(made, tmp_path):  # covers A3
    base, run = made("gemma3")
    other = judges.reward_run(base, tmp_path / "other", seed=5, vision=True)
    model, processor = judges.policy(base)
    first, second, again = (on_policy(folder, model, processor) for folder in (run, other, run))
    rows = judges.rows("gemma3")
    assert set(model.peft_config) == {"default", "reward", "reward2"}
    assert model.active_adapters == ["default"]
    found = [judges.call(judge, rows, COMPLETIONS) for judge in (first, second, again)]
    assert found[0] == pytest.approx(found[2], abs=1e-6)
    assert found[1] == pytest.approx(judges.call(JudgeReward(other), rows, COMPLETIONS), abs=1e-5)
    assert min(abs(a - b) for a, b in zip(found[0], found[1], strict=True)) > 1e-3


def test_what_the_run_shows_is_what_is_judged(made):
    """By place, by object for a part of the call, and not where the reward is called with other media."""
    base, run = made("gemma3")
    judge = JudgeReward(run)
    text = "count"  # one object, which tells nothing about the media
    rows = [{"prompt": _prompt("image"), "images": [tiny.image(n)]} for n in range(3)]
    expected = judges.call(judge, rows, ["one"] * 3)
    samples = [to_sample(row) for row in rows]
    seen = [Shown({}, sample, None) for sample in samples]
    bare = [{"prompt": _prompt("image"), "images": row["images"]} for row in rows]
    prompts = [row["prompt"] for row in bare]
    with shown([judge], bare, seen):
        assert judge(prompts, ["one"] * 3) == pytest.approx(expected, abs=1e-5), "media come from what is shown"
        assert judge(prompts[1:], ["one"] * 2) == pytest.approx(expected[1:], abs=1e-5)
        other = judge(prompts, ["one"] * 3, images=[row["images"] for row in (rows[2], rows[1], rows[0])])
        assert other == pytest.approx(expected[::-1], abs=1e-5), "the caller's own media are those that are judged"
    same = [{"prompt": text, "images": row["images"]} for row in rows]
    with shown([judge], same, seen):
        assert judge([text] * 3, ["one"] * 3) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(RewardError, match="image"):
            judge([text] * 2, ["one"] * 2, images=[row["images"] for row in rows[:2]])


def test_it_stands_anew_for_another_trainer(made):
    """With that one's precision and sharing; and it leaves a model of its own, that it had before there was a run."""
    base, run = made("gemma3")
    judge = JudgeReward(run)
    rows = judges.rows("gemma3")[:1]
    alone = judges.call(judge, rows, ["one"])
    assert not judge.on_policy
    model, processor = judges.policy(base)
    introduce([judge], processor=processor, media=MediaOptions())
    show_model([judge], model)
    assert judge.on_policy and judges.call(judge, rows, ["one"]) == pytest.approx(alone, abs=1e-5)

    def half() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    sharing = GroupSharing(family_of(model.config), "auto", placeholder_ids(model.config, processor), half)
    show_model([judge], model, sharing=sharing, autocast=half)
    show_model([judge], model)  # as an evaluation does
    assert judge._standing.scores.sharing is sharing
    low = judges.call(judge, rows, ["one"])
    assert low != alone and low == pytest.approx(alone, abs=0.05) and list(model.peft_config) == ["default", "reward"]


def test_one_that_was_trained_anew_is_said_and_counts(made, tmp_path, caplog):  # covers L10
    base, run = made("gemma3")
    folder = shutil.copytree(run, tmp_path / "judge")
    moved = shutil.copytree(run, tmp_path / "moved")
    written = marks([JudgeReward(folder), recorder.reward])
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        say_changed([JudgeReward(moved), JudgeReward(folder)], written)
        say_changed([JudgeReward(folder)], {})
        assert not caplog.records
        model, processor = judges.policy(base)
        rows = judges.rows("gemma3")[:1]
        before = judges.call(on_policy(str(folder), model, processor), rows, ["one"])
        shutil.rmtree(folder)
        judges.reward_run(base, folder, seed=9)
        anew = JudgeReward(folder)
        say_changed([finite_reward(anew, "judge")], written)
    assert "has changed since the checkpoint was written: from here on the new one counts" in caplog.text
    found = judges.call(on_policy(str(folder), model, processor), rows, ["one"])
    assert found == pytest.approx(judges.call(anew, rows, ["one"]), abs=1e-5) and abs(found[0] - before[0]) > 1e-3


def test_a_judge_with_a_tower_of_its_own_leaves_what_the_policy_has_encoded(made, tmp_path):  # covers U9
    base, _ = made("gemma3")
    run = judges.reward_run(base, tmp_path / "judge", seed=5, vision=True)
    model, processor = judges.policy(base)
    judge = on_policy(run, model, processor)
    row = judges.rows("gemma3")[0]
    encoded = encode(processor, to_sample(row))
    expected = judges.call(JudgeReward(run), [row] * 2, ["one", "two"])
    judges.call(judge, [row] * 2, ["one", "two"])  # the check on first use
    features = next(iter(judge._standing.scores.sharing._features.values()))
    inputs = {"input_ids": torch.tensor([encoded.input_ids]), **collate([encoded])}
    with torch.no_grad():
        plain = features.model(**inputs).logits
        with features.of([encoded]):
            features.model(**inputs)
        kept, count = dict(features.known[encoded]), features.encodes
        assert features.frozen() and kept
        with shown([judge], [row] * 2, [Shown(row, to_sample(row), encoded)] * 2):
            assert judges.call(judge, [row] * 2, ["one", "two"]) == pytest.approx(expected, abs=1e-5)
        with role(model, "reward"):
            assert not features.frozen()
        assert dict(features.known[encoded]) == kept and features.encodes == count
        with features.of([encoded]):
            torch.testing.assert_close(features.model(**inputs).logits, plain)
        assert features.encodes == count


@pytest.mark.parametrize("control", ["blank", *(pytest.param(c, marks=pytest.mark.slow) for c in (None, "shuffle"))])
def test_an_evaluation_shows_it_the_true_media(made, control):
    """The policy is asked with other media, and judged on the row's own."""
    base, run = made("gemma3")
    model, processor = judges.policy(base)
    judge = on_policy(run, model, processor)
    rows = train_rows()
    found = evaluate(
        model, processor, rows, yardstick=Yardstick({"judge": judge}), control=control, max_new_tokens=4, batch_size=3
    )
    texts = [[{"role": "assistant", "content": row.completion}] for row in found.rows]
    expected = judges.call(JudgeReward(run), rows, texts)
    assert [row.rewards["judge"] for row in found.rows] == pytest.approx(expected, abs=1e-5)


def test_captions_reach_the_judge_only_where_it_is_used_to_them(made, tmp_path, caplog):
    base, plain = made("gemma3")
    trained = judges.reward_run(base, tmp_path / "captioned", captions=True)
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for number, path in enumerate(paths):
        tiny.image(number).save(path)
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({path.name: [f"red {tiny.WORDS[20 + n]}", "cat"] for n, path in enumerate(paths)}))
    rows = [{"prompt": _prompt("image"), "images": [str(path)]} for path in paths]
    model, processor = judges.policy(base)

    def used(folder: str, **options: Any) -> JudgeReward:
        return on_policy(folder, model, processor, **options)

    def said(judge: JudgeReward, **more: Any) -> tuple[list[float], str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vlm_grpo"):
            scores = [judges.call(judge, rows, ["one", "two"], **more) for _ in range(2)]
        assert scores[0] == scores[1] and len(caplog.records) <= 1, "in the same order each time, and said once"
        return scores[0], caplog.text

    with_file, quiet = said(used(trained, captions=file))
    column, also_quiet = said(used(trained), captions=[["cat", "red"], None])
    without, none = said(used(trained))
    unused, left = said(used(plain), captions=["cat", "cat"])
    strange, some = said(used(plain, captions=file))
    assert (quiet, also_quiet) == ("", "")
    assert "was trained with captions and is given none" in none
    assert "the column captions of the rows is not shown to it" in left
    assert "was trained without captions and is given some" in some
    assert min(abs(a - b) for a, b in zip(with_file, without, strict=True)) > 1e-4
    assert abs(column[0] - without[0]) > 1e-4 and column[1] == pytest.approx(without[1], abs=1e-5)
    assert unused == pytest.approx(without, abs=1e-5) and strange == pytest.approx(with_file, abs=1e-5)
    nowhere = used(trained, captions=file)
    assert len(nowhere([_prompt("image")], ["one"], images=[[tiny.image()]])) == 1
    assert "No caption of" in caplog.text
    with pytest.raises(RewardError, match="captions"):
        judges.call(used(trained), rows, ["one", "two"], captions=[3, 4])


def test_the_config_takes_a_run_for_a_name(made, tmp_path):  # covers O3
    base, run = made("gemma3")
    given = {"model": "m", "rewards": [{"model": run, "weight": 0.5, "batch_size": 2}, "format"]}
    specs = load_config(direct=given).rewards
    assert specs[0] == RewardSpec(name="model", weight=0.5, kwargs={"model": run, "batch_size": 2})
    functions, weights = load_rewards(specs)
    assert isinstance(functions[0].__wrapped__, JudgeReward) and weights == [0.5, 1.0]
    assert functions[0].__wrapped__.batch_size == 2
    words = load_config(overrides=[f"rewards=[{{model: {run}}}]"], direct={"model": "m"}).rewards
    assert words == [RewardSpec(name="model", kwargs={"model": run})]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": run, "caption": "a.json"}, 'has no option "caption". Did you mean "captions"?'),
        ({"model": run, "wieght": 2}, 'has no option "wieght". Did you mean "weight"?'),
        ({"model": run, "max_length": 3}, 'has no option "max_length".'),
        ({"model": run, "timeout": 3}, "timeout=3 cannot hold for a reward model"),
        ({"model": run, "share_base": "no"}, "share_base='no' is none of auto, true, false"),
        ({"model": run, "batch_size": 0}, "batch_size=0 must be a whole number from 1 on"),
        ({"model": run, "captions": str(tmp_path / "none.json")}, "cannot be read"),
        ({"model": str(tmp_path / "nowhere")}, "cannot be loaded"),
        ({"name": "model"}, "needs the option model"),
    ]
    for item, sentence in cases:
        with pytest.raises(RewardError) as error:
            load_rewards(load_config(direct={"model": "m", "rewards": [item]}).rewards)
        assert sentence in str(error.value) and "\n" not in str(error.value), str(error.value)
    with pytest.raises(RewardError, match=r"A reward model in a folder is given as rewards: \[\{model: "):
        load_rewards([run])


def test_a_folder_that_is_no_whole_reward_model_is_one_sentence(made, tmp_path):
    base, run = made("gemma3")
    cases = [
        ("head.safetensors", "lacks head.safetensors"),
        ("adapter_config.json", "lacks adapter_config.json"),
        ("adapter_model.safetensors", "lacks adapter_model.safetensors"),
        ("judge_prompt.jinja", "judge_prompt.jinja"),
        ("reward_model.json", "is not finished: it has no reward_model.json"),
    ]
    for file, sentence in cases:
        folder = shutil.copytree(run, tmp_path / file)
        (folder / file).unlink()
        (folder / "training_args.bin").touch()  # ends as weights do
        with pytest.raises(RewardError, match=sentence) as error:
            load_rewards([RewardSpec(name="model", kwargs={"model": str(folder)})])
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    checkpoint = shutil.copytree(run, tmp_path / "whole" / "checkpoint-3", ignore=lambda *_: ["config.yaml"])
    (tmp_path / "whole" / "config.yaml").write_text("model: m\nmedia: {max_pixels: 900}\n")
    assert JudgeReward(checkpoint).run.media.max_pixels == 900, "a checkpoint is one too"
    moved = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(RewardError, match="the base model of its adapter, '/gone/base', does not exist"):
        JudgeReward(moved)
    (moved / "reward_model.json").write_text("{")
    with pytest.raises(RewardError, match="is no JSON"):
        JudgeReward(moved)
    with pytest.raises(RewardError, match="holds no reward_model.json, so that it is no reward model"):
        JudgeReward(base)
    with pytest.raises(RewardError, match="does not exist"):
        JudgeReward(tmp_path / "nowhere")


def test_three_misuses_are_said(made, caplog):
    """Shared where it cannot be, without prompts, and with prompts of another family's template."""
    base, run = made("gemma3")
    other, processor = judges.policy(made("qwen2_5_vl")[0])
    strict = JudgeReward(run, share_base=True)
    with pytest.raises(RewardError, match="cannot stand on the policy, because its base is .* and the policy's is"):
        show_model([strict], other)
    with pytest.raises(RewardError, match="because the policy has no adapter, so that its own weights are trained"):
        show_model([strict], other.get_base_model())
    with pytest.raises(UnsupportedError, match="which FSDP splits among processes. Give share_base: false"):
        show_model([JudgeReward(run)], judges.policy(base)[0], split="FSDP")
    judge = on_policy(run, other, processor)
    with pytest.raises(RewardError, match="needs the prompt of each completion"):
        judge(completions=["one"])
    with pytest.raises(RewardError, match="to which the chat template of the policy has been applied: its processor"):
        judge(["count"], ["one"])
    with pytest.raises(RewardError, match=str(run)):
        judge([_prompt("audio")], ["one"], audios=[[tiny.audio()]])
    own, processor = judges.policy(base)
    own.is_loaded_in_4bit = True
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        on_policy(run, own, processor)
    assert "was trained on a 16- or 32-bit base and stands on the 4-bit one" in caplog.text


def test_a_processor_that_is_set_otherwise_is_not_shared(made):  # covers U9
    base, run = made("gemma3")
    rows = judges.rows("gemma3")
    expected = judges.call(JudgeReward(run), rows, COMPLETIONS)
    model, processor = judges.policy(base)
    processor.chat_template = processor.chat_template.replace("assistant", "user")
    judge = on_policy(run, model, processor)
    encodings = [encode(processor, to_sample(row)) for row in rows]
    with shown([judge], rows, [Shown(row, to_sample(row), e) for row, e in zip(rows, encodings, strict=True)]):
        assert judges.call(judge, rows, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_a_trial_works_and_a_server_refuses(made):
    run = made("gemma3")[1]
    functions, weights = load_rewards([RewardSpec(name="model", kwargs={"model": run})])
    trial = try_rewards(functions, weights, train_rows()[:2])
    assert all(len(scores.values) == 2 for scores in trial.scores["model"].values())
    with pytest.raises(RewardError, match='The reward "model" is a reward model, which sees prompts as messages'):
        Scorer(functions, weights)


def test_a_score_that_is_no_number_stops_the_run(made, tmp_path):
    run = shutil.copytree(made("gemma3")[1], tmp_path / "broken")
    judge = JudgeReward(run)
    judges.call(judge, judges.rows("gemma3")[:1], ["one"])
    heads_of(judge._standing.model)["default"].bias.data.fill_(float("inf"))
    (checked,), _ = load_rewards([RewardSpec(name="model", kwargs={"model": str(run)})])
    checked.__wrapped__._standing = judge._standing
    with pytest.raises(RewardError, match=r'The reward "model" returned inf\. Return a finite number'):
        judges.call(checked, judges.rows("gemma3")[:1], ["one"])


def _breaking(call: Any, at: int) -> Any:
    calls: list[int] = []

    def broken(self: JudgeReward, *args: Any, **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("a cable was pulled")
        return call(self, *args, **columns)

    return broken


@pytest.mark.slow
def test_a_run_and_its_evaluation_by_the_command_line(made, tmp_path, monkeypatch):  # covers A3, O3
    """Train, continue, measure beside the base and without media: one base in memory each time."""
    base, run = made("gemma3")
    lines = []
    for number in range(4):
        tiny.image(number).save(tmp_path / f"{number}.png")
        row = {"prompt": _prompt("image"), "images": [f"{number}.png"], "answer": tiny.WORDS[number]}
        lines.append(json.dumps(row) + "\n")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(lines))
    options = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 2}
    options |= {"flow_check": False, "num_generations_eval": 1, "learning_rate": 1e-2, "save_steps": 1}
    given: dict[str, Any] = {
        "model": base,
        "lora": {"r": 2, "alpha": 8},
        "data": {"train": str(data), "eval": str(data)},
        "rewards": [{"model": run, "clip": [-9, 9]}, "format=0"],
        "output": str(tmp_path / "run"),
        "train": options,
    }
    monkeypatch.setattr(standings, "load_model", _never)
    with monkeypatch.context() as patch:
        patch.setattr(JudgeReward, "__call__", _breaking(JudgeReward.__call__, 3))
        with pytest.raises(RewardError, match="a cable was pulled"):
            train(RunConfig.model_validate(given))
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert train(RunConfig.model_validate(given)).steps == 2
    evaluate_run(str(tmp_path / "run"), baseline="base", controls=("blank",), output=str(tmp_path / "eval"))
    monkeypatch.undo()
    rows = [{**json.loads(line), "images": [str(tmp_path / f"{n}.png")]} for n, line in enumerate(lines)]
    judge = JudgeReward(run)
    for folder in ("run", "eval"):
        written = [json.loads(line) for line in (tmp_path / folder / "evaluation.jsonl").read_text().splitlines()]
        assert {line["state"] for line in written} == {"before", "after", "control"}
        for state in ("before", "after", "control"):
            own = [line for line in written if line["state"] == state]
            texts = [[{"role": "assistant", "content": line["completion"]}] for line in own]
            expected = judges.call(judge, rows, texts)
            assert [line["rewards"]["model"] for line in own] == pytest.approx(expected, abs=1e-4), (folder, state)

    models: list[Any] = []

    def load(*args: Any, **options: Any) -> tuple[Any, Any]:
        assert not [one for one in models if one() is not None], "the run's model is gone before another one comes"
        model, processor = load_model(*args, **options)
        models.append(weakref.ref(model))
        return model, processor

    monkeypatch.setattr(job, "load_model", load)
    evaluate_run(str(tmp_path / "run"), baseline=base, limit=1, output=str(tmp_path / "beside"))
    assert len(models) == 2

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"rewards": [{"model": run}], "data": str(data)}))
    tried = CliRunner().invoke(app, ["reward", "test", str(config), "--json"])
    assert tried.exit_code == 0, tried.output
    served = CliRunner().invoke(app, ["reward", "serve", str(config), "--port", "0"])
    assert served.exit_code == 2 and "which sees prompts as messages" in " ".join(served.output.split())
