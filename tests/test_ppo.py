"""PPO's trainer: its rollouts, losses and checkpoints, against slow computations of the same."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import judges
import pytest
import tiny
import torch
from datasets import Dataset
from torch import Tensor

from vlm_grpo import VLMGRPOConfig, VLMGRPOTrainer, VLMPPOConfig, VLMPPOTrainer, load_model
from vlm_grpo.collate import collate
from vlm_grpo.config import LoraOptions
from vlm_grpo.critic import saved_values
from vlm_grpo.errors import ConfigError, GradientError, UnsupportedError
from vlm_grpo.models.adapters import adapter_parameters
from vlm_grpo.models.heads import heads_of
from vlm_grpo.rewards.judge import JudgeReward


def by_letters(completions, **columns) -> list[float]:
    """Differs between completions without any luck."""
    return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]


class Watched(VLMPPOTrainer):
    """Keeps the rollouts, and what each update computed of them."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.rollouts: list[dict[str, Any]] = []
        self.updates: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        super().__init__(*args, **named)

    def _add_advantages(self, batch: dict[str, Any]) -> None:
        before = dict(batch)
        super()._add_advantages(batch)
        self.rollouts.append({**before, **batch})

    def _whole_loss(self, loss: Tensor, inputs: dict[str, Any]) -> Tensor:
        self.updates.append((inputs, self._logps, self._beside[0].detach()))
        return super()._whole_loss(loss, inputs)


def trainer_of(model: Any, processor: Any, path: Any, reward: Any = by_letters, case: str = "image counts", **options):
    kinds, kind = options.pop("kinds", ("image",)), options.pop("kind", Watched)
    data = options.pop("data", None) or Dataset.from_list(tiny.rows(case, kinds))
    given = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    values = options.pop("values", None)
    args = VLMPPOConfig(**{**given, **options})
    return kind(model, reward, args, data, processing_class=processor, values=values)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return judges.base("qwen2_5_vl", tmp_path_factory.mktemp("base"), layers=1)


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


# ---- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 2, "steps_per_generation": 6},
        {"per_device_train_batch_size": 2, "generation_batch_size": 16, "gradient_accumulation_steps": 2},
    ],
)
def test_the_batches_of_one_completion_a_prompt_are_trls(tmp_path, options):
    # covers L5: TRL refuses one completion a prompt
    own = VLMPPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    theirs = VLMGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, num_generations=2, **{"per_device_train_batch_size": 8, **options}
    )
    for name in ("per_device_train_batch_size", "steps_per_generation", "generation_batch_size", "scale_rewards"):
        assert getattr(own, name) == getattr(theirs, name), name
    assert own.num_generations == 1 and own.num_iterations == 4 and own.beta == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.1}, "beta=0.1: that is the KL in GRPO's loss"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"generation_batch_size": 12, "per_device_train_batch_size": 8}, "must be divisible"),
        ({"kl_estimator": "k2"}, 'kl_estimator="k2" is none of its 3 values'),
        ({"gamma": 1.5}, "gamma=1.5: needs 0 or more, at most 1"),
        ({"cliprange_value": 0}, "cliprange_value=0: needs more than 0"),
        ({"resample_dead_groups": 2}, "PPO compares no group"),
        ({"value_learning_rate": 0.1, "vf_coef": 0}, "no values are trained"),
        ({"missing_eos_penalty": 8, "mask_truncated_completions": True}, "learns from no penalty"),
        ({"scale_rewards": "batch"}, "scale_rewards=batch: PPO compares no group"),
        ({"kl_coef": 0, "kl_target": 6.0}, "0 cannot adapt"),
        ({"loss_type": "cispo"}, "not PPO's clipped loss"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "normalises the rewards of a group"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        VLMPPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_tools_and_a_moving_reference_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="sync_ref_model=True has no test with PPO"):
        VLMPPOConfig(output_dir=str(tmp_path), use_cpu=True, sync_ref_model=True)
    model, processor = tiny.build("qwen2_5_vl", layers=1)
    with pytest.raises(UnsupportedError, match="tools have no test with PPO"):
        VLMPPOTrainer(model, by_letters, processing_class=processor, tools=[print])


def test_what_belongs_to_another_trainer_is_refused(base, tmp_path):
    model, processor = judges.policy(base)
    data = Dataset.from_list(tiny.rows("image one", ("image",)))
    args = VLMPPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match="VLMPPOConfig, whose options GRPO does not read"):
        VLMGRPOTrainer(model, by_letters, args, data, processing_class=processor)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match="An optimizer of your own lacks the values"):
        VLMPPOTrainer(model, by_letters, args, data, processing_class=processor, optimizers=(optimizer, None))
    model, processor = judges.policy(base)
    trainer_of(model, processor, tmp_path)
    with pytest.raises(ConfigError, match="has an adapter ref or value, of an earlier trainer"):
        trainer_of(model, processor, tmp_path)


def test_a_first_rollout_without_a_signal_is_no_broken_graph(tmp_path):
    # covers hold 8: all scores equal, and values with a vision tower's adapter that the policy lacks
    folder = judges.base("qwen2_5_vl", tmp_path / "base", layers=1)
    run = judges.reward_run(folder, tmp_path / "judge", vision=True)

    def same(completions, **columns):
        return [3.0] * len(completions)

    trainer = trainer_of(*judges.policy(folder), tmp_path / "same", same, lam=1.0, kl_coef=0.0, max_steps=6)
    trainer.train()
    assert logged(trainer, "values")[-1] > 0 and not logged(trainer, "kl"), "no reference, no KL"
    judged = trainer_of(*judges.policy(folder), tmp_path / "judged", [JudgeReward(run)], max_steps=6)
    vision = [n for n, p in judged.model.named_parameters() if ".value." in n and "visual" in n and p.requires_grad]
    before = {name: judged.model.get_parameter(name).detach().clone() for name in vision}
    judged.train()
    assert vision and any(not judged.model.get_parameter(name).equal(value) for name, value in before.items())


@pytest.mark.slow
def test_a_column_of_a_rewards_own_stays_its(base, tmp_path):
    def scored(completions, log_extra, **columns):
        log_extra("score", ["mine"] * len(completions))
        return by_letters(completions)

    trainer = trainer_of(*judges.policy(base), tmp_path, scored, max_steps=8)
    trainer.train()
    extra = trainer._logs["extra"]
    assert set(extra["score"]) == {"mine"} and len(extra["kl"]) == len(extra["value"]) == len(extra["score"])


def test_a_plain_grpo_config_gets_the_defaults_of_ppos_options(tmp_path):
    args = VLMPPOConfig.of(VLMGRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_generations=2))
    assert (args.num_generations, args.num_iterations, args.kl_coef, args.lam) == (2, 1, 0.05, 0.95)


# ---- a rollout ------------------------------------------------------------------------------------------------------


def by_hand(trainer: Any, rollout: dict[str, Any], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout, token by token in double precision; not whitened."""
    args, mask = trainer.args, rollout["completion_mask"]
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    returns = advantages.clone()
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        after, ahead = 0.0, 0.0
        for t in reversed(places):
            old, ref = float(rollout["old_per_token_logps"][row, t]), float(rollout["ref_per_token_logps"][row, t])
            reward = -args.kl_coef * (old - ref) + (float(scores[row]) if t == places[-1] else 0.0)
            value = float(rollout["old_values"][row, t])
            after = reward + args.gamma * ahead - value + args.gamma * args.lam * after
            advantages[row, t], returns[row, t], ahead = after, after + value, value
    return advantages, returns


def test_a_rollout_is_that_of_a_slow_loop(base, tmp_path):
    # covers L6, A9, hold 10
    model, processor = judges.policy(base)
    trainer = trainer_of(model, processor, tmp_path, max_steps=8, gamma=0.9, lam=0.8, whiten_advantages=False)
    trainer.train()
    assert len(trainer.rollouts) == 2
    for rollout in trainer.rollouts:
        advantages, returns = by_hand(trainer, rollout, rollout["scores"])
        torch.testing.assert_close(rollout["advantages"].double(), advantages, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rollout["returns"].double(), returns, rtol=1e-5, atol=1e-5)
    first, second = trainer.rollouts
    assert torch.equal(first["old_per_token_logps"], first["ref_per_token_logps"]) and not first["old_values"].any()
    assert second["old_values"].any() and not second["old_per_token_logps"].equal(second["ref_per_token_logps"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_audio"])
def test_before_the_first_update_the_ratio_is_one_and_the_kl_nothing(family, tmp_path):
    # covers hold 1, A1
    folder = judges.base(family, tmp_path / "base", layers=1)
    model, processor = judges.policy(folder)  # an adapter that is trained already: its copy is the reference
    kinds = tiny.KINDS[family]
    case = "mixed batch" if len(kinds) > 1 else f"{kinds[0]} none"
    trainer = trainer_of(model, processor, tmp_path / "out", kinds=kinds, case=case, learning_rate=0.5)
    trainer.train()
    assert set(model.peft_config) == {"default", "ref", "value"}
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
    approx_kl, clipped = logged(trainer, "approx_kl"), logged(trainer, "clipfrac")
    assert approx_kl[0] == pytest.approx(0, abs=1e-9) and clipped[0] == 0
    assert approx_kl[-1] > 1e-6, "the second epoch's policy is not the rollout's"
    for name in ("values", "returns", "advantages", "explained_variance", "entropy", "score", "kl_coef", "loss/value"):
        assert all(math.isfinite(value) for value in logged(trainer, name)) and logged(trainer, name), name
    assert logged(trainer, "score") == pytest.approx(logged(trainer, "reward"))
    assert not any(
        name.startswith("groups/") or name == "frac_reward_zero_std" for name in trainer.state.log_history[0]
    )


def test_without_values_the_gradient_is_reinforces(base, tmp_path):
    # covers L8: gamma and lambda 1, zero values, nothing whitened
    model, processor = judges.policy(base)
    options = {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0, "vf_coef": 0.0, "whiten_advantages": False}
    own = trainer_of(
        model,
        processor,
        tmp_path,
        **options,
        per_device_train_batch_size=4,
        steps_per_generation=1,
        num_iterations=1,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
    )
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in weights.items()}
    reference, _ = judges.policy(base)  # the same weights
    own.train()
    (rollout,) = own.rollouts
    moved = {name: before[name] - p.detach() for name, p in weights.items()}  # SGD at a rate of 1: the gradient

    scores = rollout["scores"].tolist()
    total, tokens = torch.zeros(()), int(rollout["completion_mask"].sum())
    for row, score in enumerate(scores):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        answer = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()]
        inputs = collate([rollout["encodings"][row]], len(prompt) + len(answer), [len(answer)])
        ids = torch.cat([prompt, answer])[None]
        logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[
            0, -len(answer) - 1 : -1
        ]
        total = total - score * logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
    (total / tokens).backward()
    for name, p in reference.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(moved[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert not any("value" in name for name in weights), "without a value loss nothing of the values is trained"


def test_a_reward_that_fails_teaches_nothing_and_an_answer_without_an_end_costs(base, tmp_path):
    # covers A4, L6
    def half(completions, **columns):
        return [None if number % 2 else 1.0 for number in range(len(completions))]

    model, processor = judges.policy(base)
    trainer = trainer_of(
        model,
        processor,
        tmp_path,
        reward=half,
        missing_eos_penalty=8.0,
        whiten_advantages=False,
        max_completion_length=2,
    )
    trainer.train()
    rollout = trainer.rollouts[0]
    ids, mask = rollout["completion_ids"], rollout["completion_mask"].bool()
    ended = torch.isin(ids, torch.tensor(trainer.eos_token_ids)).logical_and(mask).any(1)
    assert not ended.all(), "some are cut off"
    scored = rollout["scored"].bool()
    assert scored.tolist() == [True, False] * 2
    last = [rollout["returns"][row][mask[row]][-1].item() for row in range(4)]
    kl = [0.0] * 4  # the policy is its own reference still
    expected = [(1.0 - (0 if ended[row] else 8.0) - kl[row]) if scored[row] else 0.0 for row in range(4)]
    assert last == pytest.approx(expected, abs=1e-5)
    assert not rollout["advantages"][1].any() and not rollout["advantages"][3].any()
    mean = sum(expected) / 2
    assert logged(trainer, "score")[0] == pytest.approx(mean)
    assert logged(trainer, "reward")[0] == pytest.approx(1.0), "TRL's own, before any penalty"


# ---- updates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_generations": 2, "gradient_checkpointing": True}, id="two of a prompt, checkpointed"),
        pytest.param(
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "gradient_checkpointing": True},
            id="reentrant",
            marks=pytest.mark.slow,
        ),
        pytest.param({"load_in_4bit": True}, id="4-bit", marks=pytest.mark.slow),
        pytest.param({"group_sharing": False}, id="nothing shared", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_move_policy_and_values_alone(tmp_path, options):
    # covers A3, L5: the reward model judges by its own adapter, of which the values are a copy
    folder = judges.base("qwen2_5_vl", tmp_path / "base", layers=1, hidden=64)
    run = judges.reward_run(folder, tmp_path / "judge", vision=True)
    load = {"load_in_4bit": options.pop("load_in_4bit", False)}
    model, processor = load_model(folder, lora=LoraOptions(r=2, alpha=4, vision=True), **load)
    judges.randomize(model, 1)
    options = {"max_steps": 10, "kl_coef": 0.1, **options}
    trainer = trainer_of(model, processor, tmp_path / "out", [JudgeReward(run), by_letters], **options)
    assert set(model.peft_config) == {"default", "ref", "reward", "value"}
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".default." in name or ".value." in name for name in moving)
    for name, value in state.items():
        if ".value." in name and "lora" in name:
            assert value.equal(state[name.replace(".value.", ".reward.")]), "it starts as the reward model's"
    assert not any(p.any() for p in heads_of(model)["value"].parameters()), "with a head of zeros"
    trainer.train()
    after = model.state_dict()
    still = [n for n in state if n not in moving]
    assert [name for name in still if not state[name].equal(after[name])] == []
    same = [name for name in moving if state[name].equal(after[name]) and "lora_A" not in name]
    assert same == [], "policy, values and their head learn, the towers too"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moving
    assert logged(trainer, "values")[-1] != 0


class Ahead(Watched):
    """Computes what the model says of a rollout as soon as it is drawn, whatever its size."""

    def _defers(self) -> bool:
        return False


def test_a_rollout_of_one_micro_batch_needs_no_pass_of_its_own(base, tmp_path):
    # covers L5: the first update says what a pass ahead of it says
    found = {}
    for kind in (Watched, Ahead):
        model, processor = judges.policy(base)
        torch.manual_seed(0)
        options = {"num_generations": 2, "per_device_train_batch_size": 8, "steps_per_generation": 1, "max_steps": 6}
        trainer = trainer_of(model, processor, tmp_path, kind=kind, **options)
        torch.nn.init.normal_(heads_of(model)["value"].weight)
        trainer.train()
        found[kind] = trainer
    own, ahead = found.values()
    for name in ("values", "returns", "advantages", "explained_variance", "kl", "score", "clipfrac", "approx_kl"):
        assert logged(own, name) == pytest.approx(logged(ahead, name), rel=1e-4, abs=1e-6), name
    assert len(logged(own, "values")) == 3 and len(logged(own, "approx_kl")) == 6
    assert logged(own, "approx_kl")[0] == 0 != logged(own, "approx_kl")[1], "the second time against the first"
    after = ahead.model.state_dict()
    for name, value in own.model.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-5, msg=name)
    # TRL shuffles a rollout, and its samples stand in the order in which they were drawn
    for trainer in found.values():
        logs = trainer._logs
        assert len(logs["extra"]["score"]) == 8 and len(set(logs["extra"]["score"])) > 2
        assert list(logs["extra"]["score"]) == list(logs["rewards"]["by_letters"])
    for name in ("value", "kl"):
        assert list(own._logs["extra"][name]) == pytest.approx(list(ahead._logs["extra"][name]), abs=1e-4), name
    assert list(own._logs["advantages"]) == pytest.approx(list(ahead._logs["advantages"]), abs=1e-3)


@pytest.mark.slow
def test_shared_prompts_change_neither_values_nor_scores_nor_losses(base, tmp_path):
    # covers L5, hold 4
    found = {}
    for sharing in (True, False):
        model, processor = judges.policy(base)
        options = {"num_generations": 2, "per_device_train_batch_size": 4, "group_sharing": sharing}
        trainer = trainer_of(model, processor, tmp_path, **options)
        trainer.train()
        found[sharing] = trainer
    shared, plain = found[True], found[False]
    for name in ("loss/policy", "loss/value", "values", "returns", "kl", "score", "approx_kl", "grad_norm"):
        assert logged(shared, name) == pytest.approx(logged(plain, name), rel=2e-3, abs=2e-5), name
    assert sum(logged(shared, "group/prompt_tokens_saved")) > 0 == sum(logged(plain, "group/prompt_tokens_saved"))


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_another_medium_has_another_value(kind, tmp_path):
    # covers A3, hold 3
    family = {"image": "qwen2_5_vl", "audio": "qwen2_audio"}[kind]
    model, processor = judges.policy(judges.base(family, tmp_path / "base", layers=1))
    rows = [tiny.rows(f"{kind} one", (kind,))[0]] * 2
    other = tiny.rows(f"{kind} one", (kind,))[1]
    rows = [{**rows[0], f"{kind}s": medium} for medium in (rows[0][f"{kind}s"], other[f"{kind}s"])]
    trainer = trainer_of(
        model, processor, tmp_path / "out", data=Dataset.from_list(rows), steps_per_generation=1, num_iterations=1
    )
    torch.nn.init.normal_(heads_of(model)["value"].weight)
    trainer.train()
    values = trainer.rollouts[0]["old_values"][:, 0]  # in front of the first token: of the prompt alone
    assert abs(float(values[0] - values[1])) > 1e-3


def test_a_mini_batch_of_one(base, tmp_path):
    # covers A1: the predecessor crashed
    model, processor = judges.policy(base)
    options = {"per_device_train_batch_size": 1, "steps_per_generation": 1, "normalize_scores": True, "score_clip": 2.0}
    trainer = trainer_of(
        model, processor, tmp_path, **options, whiten_rewards=True, importance_sampling_level="sequence"
    )
    trainer.train()
    assert len(trainer.rollouts) == 2 and all(math.isfinite(v) for v in logged(trainer, "grad_norm"))


def test_without_adapters_the_head_stands_on_the_policy(tmp_path):
    # covers A2
    model, processor = tiny.build("qwen2_5_vl", layers=1)
    before = copy.deepcopy(model)
    trainer = trainer_of(model, processor, tmp_path, value_learning_rate=0.1)
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5), "the reference is a copy"
    assert heads_of(model)["value"].weight.any()
    rates = logged(trainer, "learning_rate/value")
    assert rates[0] == pytest.approx(0.1) and logged(trainer, "learning_rate")[0] == pytest.approx(0.01)
    assert not before.lm_head.weight.equal(model.lm_head.weight)


@pytest.mark.slow
def test_the_kl_coefficient_adapts_by_the_rollout(base, tmp_path):
    # covers A9
    model, processor = judges.policy(base)
    options = {"kl_coef": 0.2, "kl_target": 6.0, "kl_horizon": 40, "max_steps": 8}
    trainer = trainer_of(model, processor, tmp_path, **options)
    trainer.train()
    first, second = logged(trainer, "kl_coef")
    # 4 completions of a horizon of 40, and a KL of 0 is far below the target: 0.2 * (1 - 0.2 * 4 / 40)
    assert (first, second) == pytest.approx((0.2, 0.2 * 0.98))


@pytest.mark.parametrize("cut", [False, True])
def test_values_whose_adapter_receives_no_gradient_stop_the_run(base, tmp_path, cut):
    # covers L8: a head of zeros hands nothing on, so that step 1 shows nothing of its adapter
    model, processor = judges.policy(base)
    trainer = trainer_of(model, processor, tmp_path)
    for parameter in adapter_parameters(trainer.model, "value") if cut else []:
        parameter.register_hook(torch.zeros_like)
    stopped = pytest.raises(GradientError, match="of the adapter value received a gradient on step 2, though its head")
    with stopped if cut else nullcontext():
        trainer.train()
    assert trainer.state.global_step == (1 if cut else 4)


def test_values_that_only_hear_of_media_may_miss_a_step_without_any(base, tmp_path):
    # covers L8: the head learns from every row, the adapter from those with pictures
    seen = tiny.rows("image counts", ("image",))[:2]
    text = [{"role": "user", "content": [{"type": "text", "text": "count"}]}]
    rows = [*seen, *({"prompt": text, "images": []} for _ in range(2))]
    trainer = trainer_of(
        *judges.policy(base, vision=True, language=False),
        tmp_path,
        data=Dataset.from_list(rows),
        steps_per_generation=1,
        num_iterations=1,
        max_steps=2,
        shuffle_dataset=False,
        kl_coef=0.0,
    )
    trainer.train()
    assert heads_of(trainer.model)["value"].weight.any() and trainer.state.global_step == 2


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_a_continued_run_is_the_same_run(base, tmp_path, parts):
    # covers L10, A10: stopped in the middle of a rollout's epochs, of one micro-batch and of two
    options = {"per_device_train_batch_size": 4 // parts, "steps_per_generation": parts, "num_iterations": 4 // parts}
    options |= {"max_steps": 9, "kl_target": 0.01, "kl_horizon": 10, "normalize_scores": True, "save_strategy": "steps"}
    whole = trainer_of(*judges.policy(base), tmp_path / "whole", **options, save_steps=6)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-6" / "value" / "head.safetensors").is_file()
    other = trainer_of(*judges.policy(base, seed=5), tmp_path / "other", **options, save_steps=6)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name in ("loss", "kl", "kl_coef", "values", "returns", "score", "approx_kl", "loss/value", "grad_norm"):
        own = [log[name] for log in other.state.log_history if name in log and log["step"] > 6]
        assert own and own == [log[name] for log in whole.state.log_history if name in log and log["step"] > 6], name
    for name, value in whole.model.state_dict().items():
        assert value.equal(other.model.state_dict()[name]), name
    assert other.kl_control.coef == whole.kl_control.coef


@pytest.mark.slow
def test_a_run_from_a_finished_one_goes_on_with_its_values(base, tmp_path):
    # covers A10
    first = trainer_of(*judges.policy(base), tmp_path / "first")
    first.train()
    first.save_model(str(tmp_path / "first"))
    folder = saved_values(str(tmp_path / "first"), adapted=True)
    assert folder == tmp_path / "first" / "value"
    assert saved_values(str(tmp_path / "first"), adapted=False) is None and saved_values(base, adapted=True) is None
    model, processor = load_model(str(tmp_path / "first"))
    second = trainer_of(model, processor, tmp_path / "second", values=folder)
    weights, before = second.model.state_dict(), first.model.state_dict()
    same = [name for name in weights if ".value." in name]
    assert same and all(weights[name].equal(before[name]) for name in same)
    second.train()
    assert logged(second, "values")[0] != 0
    assert any(not second.model.state_dict()[name].equal(before[name]) for name in same), "and trains them"
