"""Work shared in a group changes nothing: against a row alone, and against the trainer that shares nothing."""

import copy
from typing import Any

import pytest
import recorder
import reference
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_exact import differences, row, rows, rows_of_kinds, table
from test_trainer import calls_tool, logged, look
from tiny.parts import finish
from torch import nn
from transformers import TrainerCallback

from vlm_grpo import LoraOptions, load_model
from vlm_grpo.errors import SharingError
from vlm_grpo.group import attention, rollout
from vlm_grpo.group.features import Features
from vlm_grpo.group.layout import Layout
from vlm_grpo.models.families import family_of, lora_targets, tower_of

SHARING = [family for family in tiny.KINDS if family not in tiny.PREFIX_LM]
ALWAYS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "gemma3", "lfm2_vl", "mllama", "qwen2_audio")
FAMILIES = [f if f in ALWAYS else pytest.param(f, marks=pytest.mark.slow) for f in SHARING]
# One family a mechanism; two of them always, the others among the slow tests.
SLOW_MECHANISMS = [("smolvlm", "image"), ("gemma3", "image"), ("mllama", "image"), ("qwen2_5_vl", "video")]
SLOW_MECHANISMS += [("qwen3_vl", "image"), ("qwen3_5", "image"), ("lfm2_vl", "image")]
MECHANISMS = [("qwen2_5_vl", "image"), ("qwen2_audio", "audio")]
MECHANISMS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_MECHANISMS]
ENDS = {"eos_token_id": [tiny.EOS, *range(20, 100)]}  # a few tokens into most completions


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})


def with_adapter(model: Any, vision: bool = False, **options: Any) -> Any:
    """LoRA on the language model, whose B matrices are not zero; ``vision`` puts it on that tower too."""
    targets = lora_targets(family_of(model.config), model, LoraOptions(vision=vision))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def data_of(family: str) -> list[dict]:
    """Four rows of all the kinds that a family takes, of several sizes; where it can, one of them without media."""
    kinds = tiny.KINDS[family]
    return rows("mixed", kinds[0]) if len(kinds) == 1 else rows_of_kinds(kinds, together=False)


def train(model: Any, processor: Any, data: list[dict], path: Any, sharing: Any = True, **options: Any) -> Any:
    """A run on a copy of the model; ``gradients`` of the result holds those of every step."""
    cls, reward = options.pop("cls", recorder.Recorder), options.pop("reward", recorder.reward)
    extra = {name: options.pop(name) for name in ("tools", "eval_dataset") if name in options}
    callbacks = [gradients := Gradients(), *options.pop("callbacks", [])]
    args = recorder.config(path, **{"group_sharing": sharing, "max_grad_norm": 0.0, **options})
    own = copy.deepcopy(model)
    trainer = cls(own, reward, args, table(data), processing_class=processor, callbacks=callbacks, **extra)
    trainer.gradients = gradients.steps
    trainer.train()
    return trainer


def scored(trainer: Any) -> list[recorder.Scored]:
    return [row for batch in trainer.rows for row in batch]


def distance(found: dict, expected: dict) -> float:
    """Relative L2 of the gradients of a step."""
    assert found.keys() == expected.keys() and found
    gap = sum((found[n].double() - g.double()).square().sum() for n, g in expected.items()) ** 0.5
    norm = sum(g.double().square().sum() for g in expected.values()) ** 0.5
    return float(gap / norm) if norm else float(gap)


def assert_same(shared: Any, plain: Any, largest: Any, label: str, tolerance: float = 1e-5) -> None:
    """Two runs sampled the same tokens and computed the same figures and gradients."""
    ours, theirs = scored(shared), scored(plain)
    assert [(r.prompt, r.completion) for r in ours] == [(r.prompt, r.completion) for r in theirs]
    for name in ("logps", "old", "ref"):
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True)]
        assert all((a is None) == (b is None) for a, b in pairs)
        gaps = [float((a - b).abs().max()) for a, b in pairs if a is not None and len(a)]
        if gaps:
            largest(f"{label}, a group and its rows", name, max(gaps))
            assert max(gaps) <= tolerance, name
    assert logged(shared, "loss") == pytest.approx(logged(plain, "loss"), abs=2e-6)
    found = [distance(a, b) for a, b in zip(shared.gradients, plain.gradients, strict=True)]
    largest(f"{label}, a group and its rows", "gradients", max(found))
    assert any(gradient.any() for step in plain.gradients for gradient in step.values())
    assert found[0] <= tolerance
    assert max(found) <= 10 * tolerance, "rounding that earlier steps have written into the weights"


def kinds_in(row: dict) -> int:
    return sum(bool(row.get(f"{kind}s")) for kind in ("image", "video", "audio"))


def encodes(trainer: Any) -> int:
    return sum(features.encodes for features in trainer.sharing._features.values())


# ---- every family ----------------------------------------------------------------------------------------------------


# covers U1 U10 O1 O2 A1
@pytest.mark.parametrize("beta", [0.1, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_group_equals_its_rows(family, beta, tmp_path, largest):
    """Frozen towers: what they made of a prompt is used again by generation, old, reference and new figures."""
    model, processor = tiny.build(family)
    model, data = with_adapter(model), data_of(family)
    options = {"beta": beta, "num_iterations": 2}
    shared = train(model, processor, data, tmp_path / "shared", **options)
    plain = train(model, processor, data, tmp_path / "plain", sharing=False, **options)
    assert_same(shared, plain, largest, family)
    for name in ("logps", "old", "ref") if beta else ("logps", "old"):
        found = max(differences(shared, processor, data, model, name))
        largest(f"{family}, a group and a row alone", name, found)
        assert found <= 1e-5
    assert encodes(shared) == sum(map(kinds_in, data)), "once a prompt and kind, whoever asks"
    assert encodes(plain) == 0 and logged(plain, "group/encodes_saved") == [0.0]
    passes = 4 if beta else 3  # generation, old, reference, new: of 2 completions each
    with_media = sum(bool(kinds_in(row)) for row in data)
    saved = 2 * passes * with_media - encodes(shared)
    assert logged(shared, "group/encodes_saved") == [saved]
    lengths = {tuple(row.prompt) for row in scored(shared)}
    tokens = sum(len(prompt) * passes - (passes - 1) for prompt in lengths)
    assert logged(shared, "group/prompt_tokens_saved") == [tokens]


class Later(TrainerCallback):
    """Forgets what was counted until the end of step 4: the first prompts are compared with rows alone."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.seen.clear()


def count_work(model: Any, seen: list[int]) -> None:
    """From now on, ``seen`` gets the number of values that enter each layer of the towers of media."""
    family = family_of(model.config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and tower_of(family, name) in ("vision", "audio"):
            module.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))


MOSTLY = ("qwen2_5_vl", "mllama")


@pytest.mark.parametrize("family", [f if f in MOSTLY else pytest.param(f, marks=pytest.mark.slow) for f in SHARING])
def test_a_tower_runs_once_a_medium_and_generation(family, tmp_path):
    """Counted in the towers' own layers, with checkpointing, which would run them again in the backward pass."""
    model, processor = tiny.build(family)
    data, once, seen = data_of(family), [], []
    counted = copy.deepcopy(model)
    count_work(counted, once)
    with torch.no_grad():
        for each in data:
            reference.logps(counted, reference.encode(processor, each), [30, 31])
    model = with_adapter(model)

    class Counts(recorder.Recorder):
        def __init__(self, model, *args, **kwargs):
            count_work(model, seen)
            super().__init__(model, *args, **kwargs)

    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 6, "gradient_checkpointing": True, "cls": Counts}
    train(model, processor, data, tmp_path, callbacks=[Later(seen)], **options)
    assert sum(once) > 0 and sum(seen) == sum(once)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni_thinker"])
def test_a_trained_tower_runs_once_a_group(family, tmp_path, largest):
    """Two prompts with pictures, two completions each: of two runs one is saved in generation, one in the loss."""
    model, processor = tiny.build(family)
    model, data, seen = with_adapter(model, vision=True), rows("mixed"), {True: [], False: []}
    runs = []
    for sharing in (True, False):
        own = copy.deepcopy(model)
        tower = next(m for n, m in own.named_modules() if n.endswith(".visual"))
        tower.register_forward_hook(lambda *_, sharing=sharing: seen[sharing].append(1))
        runs.append(train(own, processor, data, tmp_path, sharing))
    assert_same(*runs, largest, family)
    reached = {n for n, g in runs[0].gradients[0].items() if g.any()}
    assert any(".visual." in name for name in reached) and any("layers" in name for name in reached)
    assert logged(runs[0], "group/encodes_saved") == [4] and encodes(runs[0]) == 0


@pytest.mark.parametrize("family", tiny.PREFIX_LM)
def test_a_prefix_language_model_says_why_it_shares_nothing(family, tmp_path, largest, caplog):
    model, processor = tiny.build(family)
    model, data = with_adapter(model), rows("sizes")

    class Forced(recorder.Recorder):
        def _share_groups(self):
            self.args.group_sharing = True
            super()._share_groups()

    with pytest.raises(SharingError, match="group_sharing=True: .* because .* as in a prefix language model"):
        train(model, processor, data, tmp_path, cls=Forced)
    caplog.clear()
    shared = train(model, processor, data, tmp_path, sharing="auto", max_steps=2)
    assert len(said(caplog)) == 1 and "as in a prefix language model" in said(caplog)[0]
    plain = train(model, processor, data, tmp_path, sharing=False, max_steps=2)
    assert_same(shared, plain, largest, family)
    assert max(differences(shared, processor, data, model)) <= 1e-5


def said(caplog: Any) -> list[str]:
    """What was said of groups."""
    return [r.getMessage() for r in caplog.records if "once per completion, because" in r.getMessage()]


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {  # every pair of values of every two options occurs at least once
    "weights": ("language", "tower", "all"),
    "checkpointing": (None, True, False),  # off, reentrant, not
    "schedule": ("once", "off-policy", "twice"),
    "size": (2, 4, 8),  # of a micro-batch: half a group, a group, two
    "beta": (0.0, 0.1),
    "ends": (True, False),
}
PAIRWISE = [
    ("language", True, "off-policy", 4, 0.1, True),
    ("tower", False, "twice", 8, 0.0, False),
    ("all", None, "once", 2, 0.1, False),
    ("language", False, "once", 8, 0.1, True),
    ("tower", None, "off-policy", 2, 0.0, True),
    ("all", True, "twice", 4, 0.0, False),
    ("language", None, "twice", 2, 0.1, True),
    ("tower", True, "once", 8, 0.1, False),
    ("all", False, "off-policy", 8, 0.1, True),
    ("tower", False, "once", 4, 0.0, True),
    ("language", True, "twice", 2, 0.0, False),
    ("all", False, "off-policy", 2, 0.0, False),
    ("language", None, "off-policy", 8, 0.0, False),
    ("tower", None, "twice", 4, 0.1, True),
    ("all", True, "once", 2, 0.1, True),
    ("tower", None, "once", 4, 0.1, True),
    ("all", None, "twice", 8, 0.1, True),
    ("tower", False, "off-policy", 4, 0.1, False),
]
SCHEDULES = {
    "once": {"gradient_accumulation_steps": 2},
    "off-policy": {"gradient_accumulation_steps": 1},
    "twice": {"gradient_accumulation_steps": 2, "num_iterations": 2},
}
MOVES = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}  # in proportion to the gradients


def test_pairwise_covers_every_pair():
    names = list(OPTIONS)
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            wanted = {(a, b) for a in OPTIONS[names[i]] for b in OPTIONS[names[j]]}
            assert wanted - {(case[i], case[j]) for case in PAIRWISE} == set(), (names[i], names[j])


def weighted(model: Any, weights: str) -> Any:
    """The model with what is trained of it."""
    return model if weights == "all" else with_adapter(model, vision=weights == "tower")


def cases() -> list[Any]:
    """All of them for packed patches; a third of them, by turns, for every other mechanism."""
    out = []
    for place, (family, kind) in enumerate([("qwen2_5_vl", "image"), ("qwen2_audio", "audio"), *SLOW_MECHANISMS]):
        for number, case in enumerate(PAIRWISE):
            if (place and (number + place) % 3) or (kind == "audio" and case[0] == "tower"):
                continue  # LoRA knows no layers of that tower
            fast = (number, place) == (11, 1) or (place == 0 and number % 3 == 0)
            name = f"{family}-{kind}-{'-'.join(map(str, case))}"
            out.append(pytest.param(family, kind, *case, id=name, marks=[] if fast else [pytest.mark.slow]))
    return out


def mixed(kind: str) -> list[dict]:
    """Four rows: of one medium, of none, of two, and of one that is larger."""
    return [*rows("mixed", kind)[:3], rows("sizes", kind)[3]]


# covers U2 U4 U7 U9
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the blocks of a frozen tower
@pytest.mark.parametrize(("family", "kind", *OPTIONS), cases())
def test_group_options(family, kind, weights, checkpointing, schedule, size, beta, ends, tmp_path, largest):
    """Several prompts of different length, with several media of several sizes, and without any."""
    model, processor = tiny.build(family)
    model, data = weighted(model, weights), mixed(kind)
    options = {**MOVES, **SCHEDULES[schedule], "beta": beta, "per_device_train_batch_size": size, "num_generations": 4}
    options |= {"max_steps": 4 if size == 2 else 2, "gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    if ends:
        options["generation_kwargs"] = ENDS
    shared = train(model, processor, data, tmp_path / "shared", **options)
    plain = train(model, processor, data, tmp_path / "plain", sharing=False, **options)
    assert_same(shared, plain, largest, f"{family} {kind}")
    lengths = {len(row.completion) for row in scored(shared)}
    assert max(lengths) == 6 and (len(lengths) > 1 or not ends)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), shared.model.parameters(), strict=True))
    shared.rows = shared.rows[: options["gradient_accumulation_steps"]]  # before the first update
    assert max(differences(shared, processor, data, model)) <= 1e-5
    assert (shared.ref_model is not None) == (weights == "all" and beta > 0)
    if schedule == "once":
        assert all(row.old is None for row in scored(shared))
    else:
        assert max(float((r.old - r.logps).abs().max()) for r in scored(plain)) > 1e-4, "ratios other than 1"
    towers = {tower_of(family_of(model.config), n) for step in shared.gradients for n, g in step.items() if g.any()}
    assert ("vision" in towers or "audio" in towers) == (weights != "language")
    assert min(logged(shared, "group/prompt_tokens_saved")) > 0


@pytest.mark.parametrize(("family", "kind"), MECHANISMS)
def test_ratios_beyond_the_clip_are_clipped_alike(family, kind, tmp_path, largest):
    # covers U7
    model, processor = tiny.build(family)
    model, data = with_adapter(model), rows("mixed", kind)
    options = {**MOVES, "learning_rate": 0.5, "epsilon": 0.002, "beta": 0.1, "num_iterations": 2, "max_steps": 2}
    options |= {"gradient_accumulation_steps": 1, "num_generations": 4}
    shared = train(model, processor, data, tmp_path / "shared", **options)
    plain = train(model, processor, data, tmp_path / "plain", sharing=False, **options)
    assert_same(shared, plain, largest, f"{family} {kind}")
    clipped = logged(shared, "clip_ratio/region_mean")
    assert clipped == logged(plain, "clip_ratio/region_mean") and max(clipped) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("qwen2_5_vl", "image"), *SLOW_MECHANISMS])
def test_truncated_completions_count_for_nothing(family, kind, tmp_path, largest):
    model, processor = tiny.build(family)
    model, data = with_adapter(model), rows("mixed", kind)
    options = {"mask_truncated_completions": True, "max_completion_length": 6, "num_generations": 4}
    options |= {"generation_kwargs": ENDS, "beta": 0.1}
    shared = train(model, processor, data, tmp_path / "shared", **options)
    plain = train(model, processor, data, tmp_path / "plain", sharing=False, **options)
    assert_same(shared, plain, largest, f"{family} {kind}")
    assert 0 < logged(shared, "completions/clipped_ratio")[0] < 1


def test_tools_in_some_completions_of_a_group(tmp_path, largest):
    model, processor = tiny.build("qwen2_5_vl")
    model, data = with_adapter(model), rows("several")
    options = {"tools": [look], "max_completion_length": 120, "cls": calls_tool(look), "beta": 0.1}
    shared = train(model, processor, data, tmp_path / "shared", **options)
    plain = train(model, processor, data, tmp_path / "plain", sharing=False, **options)
    assert shared.turns == plain.turns == 2 and logged(shared, "tools/call_frequency") == [0.5]
    assert_same(shared, plain, largest, "tools")
    assert encodes(shared) == 4, "the turn behind a tool's answer reads the same pictures"


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_4bit_group_equals_its_rows(family, tmp_path, largest):
    # covers U2
    tiny.save(family, tmp_path / "model", hidden=128)
    lora = LoraOptions(r=4, alpha=8, vision=False)
    options = {"beta": 0.1, "num_iterations": 2, "gradient_checkpointing": True, "generation_kwargs": ENDS}
    runs = []
    for sharing in (True, False):
        model, processor = load_model(str(tmp_path / "model"), backend="hf", load_in_4bit=True, lora=lora)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        args = recorder.config(tmp_path, group_sharing=sharing, max_grad_norm=0.0, **options)
        callbacks = [gradients := Gradients()]
        data = rows("mixed")
        trainer = recorder.Recorder(
            model, recorder.reward, args, table(data), processing_class=processor, callbacks=callbacks
        )
        trainer.gradients = gradients.steps
        trainer.train()
        runs.append(trainer)
    assert_same(*runs, largest, f"{family} 4-bit", tolerance=1e-4)
    assert max(differences(runs[0], processor, data)) <= 1e-4
    assert encodes(runs[0]) == 2


# ---- few bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize(("family", "kind"), MECHANISMS)
def test_rounding_is_no_worse_in_a_group(family, kind, mixed, tmp_path, largest):
    """bf16's error against float64 is at most 1.5 times that of a row alone."""
    if mixed and family == "smolvlm":
        pytest.skip("under autocast the model cannot put its features among its words")
    model, processor = tiny.build(family)
    data = rows("sizes", kind)
    model = with_adapter(model)
    exact = copy.deepcopy(model).double()
    model = model if mixed else model.to(torch.bfloat16)
    # Enough figures for a mean square to be one.
    options = {"beta": 0.1, "num_generations": 4, "max_completion_length": 16, "bf16": mixed}
    trainer = train(model, processor, data, tmp_path, **options)
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    ours, plain = [], []
    with torch.no_grad():
        for each in scored(trainer):
            inputs = encoded[tuple(each.prompt)]
            truth = reference.logps(exact, inputs, each.completion, 0.8)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                alone = reference.logps(model, inputs, each.completion, 0.8)
            plain.append((alone - truth).square())
            ours += [(figures - truth).square() for figures in (each.logps, each.ref)]
    error, baseline = torch.cat(ours).mean().sqrt(), torch.cat(plain).mean().sqrt()
    largest(f"{family} {kind}, few bits in a group", "autocast" if mixed else "bf16", error / baseline)
    assert 1e-4 < baseline < 1
    assert error <= 1.5 * baseline


# ---- generation ------------------------------------------------------------------------------------------------------

SAMPLING = {
    "narrow": {"temperature": 0.7, "top_k": 7, "top_p": 0.8},
    "penalty": {"temperature": 1.3, "repetition_penalty": 1.5, "min_p": 0.02},
    "length": {"generation_kwargs": {**ENDS, "min_new_tokens": 4}},
    "greedy": {"generation_kwargs": {"do_sample": False}},
}
MORE = ("penalty", "greedy")


@pytest.mark.parametrize("sampling", ["narrow", "length", *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)])
@pytest.mark.parametrize(("family", "kind"), MECHANISMS)
def test_the_same_tokens_are_sampled(family, kind, sampling, tmp_path):
    """In fp32, prompts of different length in one batch."""
    model, processor = tiny.build(family)
    model, data = with_adapter(model), rows("mixed", kind)
    options = {"num_generations": 4, "max_completion_length": 12, **SAMPLING[sampling]}
    runs = [train(model, processor, data, tmp_path, sharing, **options) for sharing in (True, False)]
    completions = [[row.completion for row in scored(run)] for run in runs]
    assert completions[0] == completions[1]
    assert len({tuple(row.prompt) for row in scored(runs[0])}) == 2
    if sampling == "length":
        lengths = {len(completion) for completion in completions[0]}
        assert min(lengths) >= 5 and len(lengths) > 1, "an end is no end before the fifth token"


@pytest.mark.parametrize("generations", [1, 4])
def test_evaluation_shares_its_own_groups(generations, tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    model, data = with_adapter(model), rows("mixed")
    options: dict = {"per_device_eval_batch_size": 4, "num_generations_eval": generations, "beta": 0.1}
    runs = []
    for sharing in (True, False):
        args = recorder.config(tmp_path, group_sharing=sharing, **options)
        own = copy.deepcopy(model)
        trainer = recorder.Recorder(own, recorder.reward, args, table(data), table(data), processor)
        runs.append((trainer, trainer.evaluate()))
    (shared, metrics), (plain, expected) = runs
    assert [(r.prompt, r.completion) for r in scored(shared)] == [(r.prompt, r.completion) for r in scored(plain)]
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert metrics["eval_reward"] == expected["eval_reward"]
    found = [*differences(shared, processor, data, model), *differences(shared, processor, data, model, "ref")]
    assert len(found) == 2 * 4 * generations and max(found) <= 1e-5
    assert encodes(shared) == 2


# ---- what would be wrong is found out --------------------------------------------------------------------------------


def one_off(monkeypatch):
    """Every completion one place too late."""
    repeat = Layout.repeat

    def shifted(self, row, dim=1):
        out = repeat(self, row, dim)
        return torch.cat([out[..., : self.prefix], out[..., self.prefix :] + 1], -1) if dim == -1 else out

    monkeypatch.setattr(Layout, "repeat", shifted)


def one_behind_the_other(monkeypatch):
    """Places that run on from completion to completion."""
    repeat = Layout.repeat

    def running(self, row, dim=1):
        out = repeat(self, row, dim)
        behind = torch.arange(self.suffixes).repeat_interleave(self.width) * self.width
        return torch.cat([out[..., : self.prefix], out[..., self.prefix :] + behind], -1) if dim == -1 else out

    monkeypatch.setattr(Layout, "repeat", running)


def leaking(monkeypatch):
    """A completion sees those in front of it."""

    def dense(query, key, value, packed, scaling=None, dropout=0.0):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )

    monkeypatch.setattr(attention, "packed_attention", dense)


def stale(monkeypatch):
    """The features of the first prompt for every prompt."""
    of = Features.of

    def first(self, encodings):
        known = [encoded for encoded in self.known if encoded.media]
        return of(self, [known[0] if known and encoded.media else encoded for encoded in encodings])

    monkeypatch.setattr(Features, "of", first)


def unpadded(monkeypatch):
    """Decoding sees the padding in front of the shorter prompts."""
    share = rollout.share

    def careless(cache, index, generations, room, padding, whole):
        return share(cache, index, generations, room, torch.ones_like(padding), whole)

    monkeypatch.setattr(rollout, "share", careless)


def late(monkeypatch):
    """The first generated token is placed one too far."""
    positions = rollout.positions

    def shifted(*args):
        places = positions(*args)
        return torch.cat([places[..., :-1], places[..., -1:] + 1], -1)

    monkeypatch.setattr(rollout, "positions", shifted)


FAULTS = {
    one_off: ["log-probabilities"],
    one_behind_the_other: ["log-probabilities"],
    leaking: ["log-probabilities"],
    stale: ["logits", "log-probabilities"],
    unpadded: ["logits"],
    late: ["logits"],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_mistake_is_found_out(fault, tmp_path, monkeypatch, caplog, largest):
    model, processor = tiny.build("qwen2_5_vl")
    data = rows("one" if fault is stale else "several")
    data = [*data[:3], row("count four")] if fault is unpadded else data
    model = with_adapter(model)
    options = {"beta": 0.1, "num_iterations": 2}
    plain = train(model, processor, data, tmp_path, sharing=False, **options)
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(SharingError, match="because the .* of the first groups? differ by .* from those without"):
            train(model, processor, data, tmp_path, **options)
        caplog.clear()
        shared = train(model, processor, data, tmp_path, sharing="auto", **options)
    assert len(said(caplog)) == len(FAULTS[fault]), said(caplog)
    for what, sentence in zip(FAULTS[fault], said(caplog), strict=True):
        assert f"because the {what} of the first group" in sentence
    assert_same(shared, plain, largest, "after a mistake")


def sharp(times: float) -> tuple[Any, Any]:
    """A bf16 model whose logits are as large as trained models' are, and so is the rounding of each."""
    model, processor = tiny.build("qwen2_5_vl")
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(times)
    return with_adapter(model).to(torch.bfloat16), processor


@pytest.mark.parametrize("times", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_large_logits_of_few_bits_are_no_mistake(times, tmp_path, caplog):
    model, processor = sharp(times)
    options = {"beta": 0.1, "num_generations": 4, "max_completion_length": 16}
    trainer = train(model, processor, rows("sizes"), tmp_path, **options)
    assert not said(caplog) and not trainer.sharing.off and not trainer.sharing.off_in_generation


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_mistake_is_found_out_in_few_bits(fault, tmp_path, monkeypatch, caplog):
    model, processor = sharp(4)
    data = rows("one" if fault is stale else "several")
    data = [*data[:3], row("count four")] if fault is unpadded else data
    fault(monkeypatch)
    train(model, processor, data, tmp_path, sharing="auto", beta=0.1, num_iterations=2, max_completion_length=16)
    assert said(caplog) and FAULTS[fault][0] in said(caplog)[0]


# ---- where sharing would not be exact --------------------------------------------------------------------------------


def test_dropout_is_drawn_for_every_completion(tmp_path, caplog, largest):
    model, processor = tiny.build("qwen2_5_vl")
    model, data = with_adapter(model, lora_dropout=0.3), rows("mixed")
    with pytest.raises(SharingError, match=r"lora_dropout.* has dropout 0.3, drawn anew for every completion"):
        train(model, processor, data, tmp_path, disable_dropout=False)
    caplog.clear()
    shared = train(model, processor, data, tmp_path, "auto", disable_dropout=False, max_steps=2)
    assert len(said(caplog)) == 1 and "(set disable_dropout)" in said(caplog)[0]
    plain = train(model, processor, data, tmp_path, False, disable_dropout=False, max_steps=2)
    assert_same(shared, plain, largest, "dropout", tolerance=0.0)
    assert train(model, processor, data, tmp_path, disable_dropout=True).sharing.saved["prompt_tokens"] > 0


def test_a_prompt_that_ends_in_a_medium(tmp_path, caplog, largest):
    model, processor = tiny.build("qwen2_5_vl")
    model = with_adapter(model)
    slot = "<|vision_start|><|image_pad|>"
    texts = [f"count {word} {slot}" for word in ("one", "two")] + [f"{slot} count {word}" for word in ("three", "four")]
    data = [{"prompt": text, "images": [tiny.image(i)]} for i, text in enumerate(texts)]
    with pytest.raises(SharingError, match="because a prompt ends in a medium"):
        train(model, processor, data, tmp_path)
    caplog.clear()
    shared = train(model, processor, data, tmp_path, "auto", max_steps=2)
    assert len(said(caplog)) == 1 and "Prompts are processed once per completion" in said(caplog)[0]
    assert_same(shared, train(model, processor, data, tmp_path, False, max_steps=2), largest, "ends in a medium")
    assert not shared.sharing.off, "other batches share"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' asks for a cache of another kind"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2 moves the caches of the rows"),
        ({"generation_kwargs": {"use_cache": False}}, "use_cache=False"),
    ],
    ids=["static", "beams", "no cache"],
)
def test_generation_of_another_kind(options, reason, tmp_path, caplog, largest):
    """Log-probabilities are shared all the same."""
    model, processor = tiny.build("qwen2_5_vl")
    model, data = with_adapter(model), rows("mixed")
    with pytest.raises(SharingError, match=f"because {reason}"):
        train(model, processor, data, tmp_path, **options)
    caplog.clear()
    shared = train(model, processor, data, tmp_path, "auto", **options)
    assert said(caplog) == [f"Prompts are prefilled once per completion, because {reason}."]
    assert_same(shared, train(model, processor, data, tmp_path, False, **options), largest, reason[:12])
    assert min(logged(shared, "group/prompt_tokens_saved")) > 0


def test_the_router_loss_counts_every_completion(tmp_path, caplog, largest):
    model, processor = routed()
    data = rows("mixed")
    options = {"router_aux_loss_coef": 0.1}
    with pytest.raises(SharingError, match="the router's auxiliary loss counts the prompt's tokens once"):
        train(model, processor, data, tmp_path, **options)
    caplog.clear()
    shared = train(model, processor, data, tmp_path, "auto", **options)
    assert len(said(caplog)) == 1 and "router's auxiliary loss" in said(caplog)[0]
    assert_same(shared, train(model, processor, data, tmp_path, False, **options), largest, "router loss")
    assert logged(shared, "aux_loss")[0] > 0
    trainer = train(model, processor, data, tmp_path, router_aux_loss_coef=0.0)
    assert max(differences(trainer, processor, data)) <= 1e-5 and trainer.sharing.saved["prompt_tokens"] > 0


def routed() -> tuple[Any, Any]:
    """A model with experts whose router has a loss, and its processor."""
    dense, processor = tiny.build("qwen3_vl")
    text, vision = (
        {key: value for key, value in part.to_dict().items() if key != "model_type"}
        for part in (dense.config.text_config, dense.config.vision_config)
    )
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(dense.config, name) for name in names}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    config.text_config.output_router_logits = False  # by this TRL knows that there is a loss to ask for
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    return finish(model, processor, 0, 1.0, "model.visual.merger.linear_fc2.weight")


# ---- sizes of micro-batches ------------------------------------------------------------------------------------------


def test_a_size_that_breaks_groups_is_said_once(tmp_path, caplog, largest):
    model, processor = tiny.build("qwen2_5_vl")
    model, data = with_adapter(model), rows("mixed")
    options = {"per_device_train_batch_size": 6, "num_generations": 4, "max_steps": 2}
    shared = train(model, processor, data, tmp_path, **options)
    found = [r.getMessage() for r in caplog.records if "per_device_train_batch_size=6" in r.getMessage()]
    assert len(found) == 1 and "num_generations=4 only in parts of 2" in found[0]
    caplog.clear()
    plain = train(model, processor, data, tmp_path, False, **options)
    assert not [r for r in caplog.records if "per_device_train_batch_size=6" in r.getMessage()], "nothing to lose"
    assert_same(shared, plain, largest, "parts")


# ---- groups without a gradient ---------------------------------------------------------------------------------------


class Watched(recorder.Recorder):
    """Keeps, of every group that a loss scores, whether its graph is built."""

    skipping = True

    def __init__(self, model, *args, **kwargs):
        self.graphs: list[bool] = []
        self.idle: list[bool] = []
        model.get_decoder().layers[0].register_forward_hook(self._see)
        super().__init__(model, *args, **kwargs)

    def _see(self, module, args, out):
        if self._current is not None:  # not while a rollout is scored
            self.graphs += [torch.is_grad_enabled()] * len(out)

    def _idle(self, inputs):
        idle = super()._idle(inputs)
        self.idle += idle
        return idle if self.skipping else [False] * len(idle)


class NotSkipping(Watched):
    skipping = False


def equal_in(*steps: int):
    """A reward that is the same for all completions in these steps, and elsewhere for those of two prompts."""
    calls = 0

    def reward(prompts, **columns):
        nonlocal calls
        calls += 1
        texts = [prompt[0]["content"][-1]["text"] for prompt in prompts]
        same = [calls in steps or text in ("count one", "count four") for text in texts]
        return [1.0 if s else float(i) for i, s in enumerate(same)]

    return reward


ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 3, "max_grad_norm": 1.0}
ADAM["gradient_checkpointing"] = False  # which would build the graphs once more
ADAM["adam_epsilon"] = 1e-2  # above rounding, which differs with the groups of a forward


@pytest.mark.parametrize("weights", ["tower", "all"])
def test_groups_of_equal_rewards_skip_the_backward_pass(weights, tmp_path):
    """Momentum and decay move the weights of such a step all the same. In the second step all groups are such."""
    model, processor = tiny.build("qwen2_5_vl")
    model, data = weighted(model, weights), rows("mixed")
    skipped = train(model, processor, data, tmp_path, cls=Watched, reward=equal_in(2), **ADAM)
    checked = skipped.graphs.count(False) - (0 + 4 + 2)  # rows alone, in the first step
    assert (
        0 < checked <= 12 and skipped.graphs.count(True) == 4 + 0 + 2
    )  # before a first gradient nobody knows which are due
    expected = train(model, processor, data, tmp_path, cls=NotSkipping, reward=equal_in(2), **ADAM)
    assert expected.graphs.count(False) == checked and expected.graphs.count(True) == 12
    pairs = list(zip(skipped.model.named_parameters(), expected.model.named_parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for (_, a), (_, b) in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), skipped.model.parameters(), strict=True))
    assert logged(skipped, "loss") == pytest.approx(logged(expected, "loss"), abs=1e-6)
    assert logged(skipped, "grad_norm")[1] == 0.0
    for a, b in zip(skipped.gradients, expected.gradients, strict=True):
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize(
    "options", [{"beta": 0.1}, {"entropy_coef": 0.1}, {"use_adaptive_entropy": True, "entropy_target": 1.0}], ids=str
)
def test_what_has_a_gradient_of_its_own_skips_nothing(options, tmp_path, largest):
    model, processor = tiny.build("qwen2_5_vl")
    model, data = with_adapter(model), rows("mixed")
    shared = train(
        model, processor, data, tmp_path, reward=equal_in(1), cls=Watched, gradient_checkpointing=False, **options
    )
    assert shared.graphs.count(True) == 4 and not any(shared.idle)
    plain = train(
        model,
        processor,
        data,
        tmp_path,
        False,
        reward=equal_in(1),
        cls=Watched,
        gradient_checkpointing=False,
        **options,
    )
    assert logged(shared, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
