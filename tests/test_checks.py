"""The gradient check: which tower owes a gradient, when it is due, and what is said when it does not come."""

import math

import pytest
import recorder
import tiny
import torch
from datasets import Dataset
from test_exact import with_adapter
from test_trainer import logged, rows, train
from torch import nn
from transformers import TrainingArguments

from vlm_grpo.checks import GradientCheck, gradient_report
from vlm_grpo.errors import GradientError


class Towers(nn.Module):
    """Two parameters a tower; ``gradients`` sets what the backward pass left there."""

    def __init__(self) -> None:
        super().__init__()
        for tower in ("vision", "projector", "language"):
            setattr(self, tower, nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(2)]))

    def gradients(self, **values: float | None) -> "Towers":
        for tower, value in values.items():
            for parameter in getattr(self, tower):
                parameter.grad = None if value is None else torch.full((2,), value)
        return self


def tower(name: str) -> str:
    return name.partition(".")[0]


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")


def ask(check: GradientCheck, model: Towers, args, media: list[bool], counting: list[bool]) -> None:
    """One optimizer step over a micro-batch of such rows."""
    watched = torch.zeros(len(media), 3, requires_grad=True) * 1.0
    check.watch(watched, [("vision",) if is_there else () for is_there in media])
    (watched * torch.tensor(counting, dtype=torch.float)[:, None]).sum().backward()
    check.on_pre_optimizer_step(args, None, None, model=model)


def test_the_report_counts_and_measures():
    model = Towers().gradients(vision=3.0, language=math.inf)
    model.vision[1].grad = torch.zeros(2)
    model.projector.requires_grad_(False)
    report = gradient_report(model, tower)
    assert set(report) == {"vision", "language"}
    vision, language = report["vision"], report["language"]
    assert (vision.trainable, vision.received, vision.first_without) == (2, 1, "vision.1")
    assert vision.norm == pytest.approx(math.sqrt(18))
    assert (language.trainable, language.received, language.non_finite) == (2, 0, 2)


def test_a_silent_tower_is_named(args):
    check = GradientCheck(tower)
    model = Towers().gradients(vision=None, projector=1.0, language=1.0)
    with pytest.raises(GradientError, match=r"None of the 2 .* vision tower .*vision\.0.*use_reentrant") as caught:
        ask(check, model, args, [True], [True])
    assert "\n" not in str(caught.value)
    model.gradients(vision=1.0, language=0.0)
    with pytest.raises(GradientError, match="language tower"):
        ask(check, model, args, [True], [True])


def test_the_vision_tower_waits_for_a_row_with_media_that_counts(args):
    check = GradientCheck(tower)
    model = Towers().gradients(vision=None, projector=None, language=1.0)
    ask(check, model, args, [False, False], [True, True])  # no media
    ask(check, model, args, [True, False], [False, True])  # media in a row without signal, signal beside it
    assert check.pending
    with pytest.raises(GradientError, match="vision tower"):
        ask(check, model, args, [True, False], [True, False])
    model.gradients(vision=1.0, projector=1.0)
    ask(check, model, args, [True, False], [True, False])
    assert not check.pending
    ask(check, model.gradients(language=None), args, [True], [True])  # said once, on the first step that counts


def test_a_tower_waits_for_its_own_kind_of_medium(args):
    # covers A1 A11: a sound owes the vision tower nothing, a picture the audio tower nothing
    def ask_about(check, model, *senses):
        watched = torch.ones(1, 3, requires_grad=True) * 1.0
        check.watch(watched, [senses])
        watched.sum().backward()
        check.on_pre_optimizer_step(args, None, None, model=model)

    both = Towers()
    both.audio = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    check = GradientCheck(tower)
    ask_about(check, both.gradients(audio=1.0, language=1.0), "audio")
    assert check.pending, "the vision tower and its projector still owe theirs"
    ask_about(check, both.gradients(audio=None, vision=1.0, projector=1.0), "vision")
    assert check.pending, "no step had both"
    with pytest.raises(GradientError, match="audio tower"):
        ask_about(check, both, "audio", "vision")
    deaf = Towers().gradients(projector=None, language=1.0)
    del deaf.vision
    with pytest.raises(GradientError, match="projector tower"):  # of a model that only hears
        ask_about(GradientCheck(tower), deaf, "audio")


def test_nothing_is_due_without_signal(args):
    check = GradientCheck(tower)
    model = Towers().gradients(vision=0.0, projector=0.0, language=0.0)
    ask(check, model, args, [True, True], [False, False])
    assert check.pending
    check.watch(None, [("vision",)])
    check.watch(torch.zeros(1, 3), [("vision",)])  # no graph: an evaluation
    check.on_pre_optimizer_step(args, None, None, model=model)
    assert check.pending


def test_an_overflow_in_fp16_is_waited_out_and_named_elsewhere(args):
    model = Towers().gradients(vision=0.0, projector=0.0, language=math.nan)
    check = GradientCheck(tower)
    with pytest.raises(GradientError, match="2 of 2 trained parameters of the language tower have a NaN or infinite"):
        ask(check, model, args, [True], [True])  # vision is silent only because its gradients were clipped away
    check = GradientCheck(tower)
    args.fp16 = True
    ask(check, model, args, [True], [True])
    assert check.pending, "the loss scale adapts"
    model.gradients(vision=1.0, projector=1.0, language=1.0)
    ask(check, model, args, [True], [True])
    assert not check.pending


def test_switched_off_it_only_reports(args):
    found = {}
    check = GradientCheck(tower, check=False, log=found.__setitem__)
    ask(check, Towers().gradients(language=3.0), args, [True], [True])
    assert found["gradient/vision/received"] == 0 and found["gradient/language/received"] == 2
    assert found["gradient/language/norm"] == pytest.approx(6.0) and found["gradient/language/trainable"] == 2


# ---- in a run ---------------------------------------------------------------------------------------------------


def cut_vision(model):
    """What reentrant checkpointing over a frozen embedding does: the forward is right, the graph is gone."""

    def detach(module, args, output):
        return output.detach() if isinstance(output, torch.Tensor) else tuple(o.detach() for o in output)

    model.get_base_model().model.visual.merger.register_forward_hook(detach)
    return model


def test_a_detached_tower_stops_the_run_on_step_one(tmp_path):
    # covers U4
    model = cut_vision(with_adapter(tiny.build("qwen2_5_vl")[0], trained=True))
    with pytest.raises(GradientError, match="trained parameters of the vision tower") as caught:
        train(rows(), tmp_path, model=model, learning_rate=1e-2)
    assert "lora" in str(caught.value), "a parameter's name"


def test_a_detached_tower_is_found_at_its_first_picture(tmp_path):
    model = cut_vision(with_adapter(tiny.build("qwen2_5_vl")[0], trained=True))
    text = [{"prompt": tiny.prompt(word, 0), "images": []} for word in tiny.WORDS[:4]]
    data = Dataset.from_list(text + [{k: row[k] for k in ("prompt", "images")} for row in rows()])
    steps = []

    class Counting(recorder.Recorder):
        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    options = {"shuffle_dataset": False, "max_steps": 2}
    with pytest.raises(GradientError, match="vision tower"):
        train(data, tmp_path, model=model, cls=Counting, **options)
    assert max(steps) == 1, "not on the text-only first step"


def test_pictures_without_signal_beside_texts_with_signal(tmp_path):
    """Image rows with equal rewards owe nothing, whatever the text rows beside them do."""

    def reward(images, completion_ids, **columns):
        return [0.0 if pictures else float(sum(ids) % 7) for pictures, ids in zip(images, completion_ids, strict=True)]

    text = [{"prompt": tiny.prompt(word, 0), "images": []} for word in tiny.WORDS[:2]]
    data = Dataset.from_list(text + [{k: row[k] for k in ("prompt", "images")} for row in rows(2)])
    trainer = train(data, tmp_path, reward=reward, gradient_report=True)
    assert trainer._gradient_check.pending
    assert logged(trainer, "gradient/vision/received") == [0.0]
    assert logged(trainer, "gradient/language/received")[0] > 0


def test_the_report_is_logged_every_step(tmp_path):
    # covers U6
    model = with_adapter(tiny.build("qwen2_5_vl")[0], trained=True)
    trainer = train(rows(), tmp_path, model=model, gradient_report=True, learning_rate=1e-3, max_steps=2)
    for name in ("vision", "language"):
        counts = logged(trainer, f"gradient/{name}/received")
        assert len(counts) == 2 and counts == logged(trainer, f"gradient/{name}/trainable") and counts[0] > 0
    norms = [
        logged(trainer, f"gradient/{name}/norm")[0]
        for name in ("vision", "language", "projector")
        if logged(trainer, f"gradient/{name}/norm")
    ]
    total = math.sqrt(sum(norm**2 for norm in norms))
    assert total == pytest.approx(min(1.0, logged(trainer, "grad_norm")[0]), rel=1e-3), "after clipping at 1"


def test_a_frozen_model_is_refused_before_the_first_rollout(tmp_path):
    model, _ = tiny.build("qwen2_5_vl")
    model.requires_grad_(False)

    def reward(**columns):
        raise AssertionError("nothing may be generated")

    for checkpointing in (False, True):
        with pytest.raises(GradientError, match="The model has no trainable parameter"):
            train(rows(), tmp_path, model=model, reward=reward, gradient_checkpointing=checkpointing)
