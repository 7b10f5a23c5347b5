"""Training log-probabilities after shuffle and split equal an independent forward of each row alone, unpadded."""

import copy
from types import SimpleNamespace

import mediafiles
import pytest
import recorder
import reference
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from vlm_grpo import LoraOptions
from vlm_grpo.errors import EncodingError
from vlm_grpo.media import Medium
from vlm_grpo.models.families import family_of, lora_targets

TEXTS = ("count one", "count two", "count three", "count four")


SIZES = [(56, 56), (84, 56), (56, 112), (112, 84)]  # pixels
FRAMES = (4, 6, 2, 8)
SECONDS = (0.5, 0.9, 0.32, 0.71)
COUNTS = {"one": [1] * 4, "several": [2] * 4, "sizes": [1] * 4, "counts": [1, 2, 3, 1], "mixed": [1, 0, 2, 0]}


def medium(kind: str, seed: int, size: int):
    """A picture, clip or sound; ``size`` chooses among four sizes or lengths."""
    if kind == "image":
        return tiny.image(seed, SIZES[size])
    if kind == "video":
        return tiny.video(seed, FRAMES[size], SIZES[size])
    return tiny.audio(seed, SECONDS[size])


def row(text: str, *media: tuple[str, int, int]) -> dict:
    """One row with such media (kind, seed, size), in this order before the text."""
    slots = [{"type": kind, "text": None} for kind, _, _ in media]
    out = {"prompt": [{"role": "user", "content": [*slots, {"type": "text", "text": text}]}], "fps": 2.0}
    for kind in dict.fromkeys(kind for kind, _, _ in media):
        out[f"{kind}s"] = [medium(kind, seed, size) for own, seed, size in media if own == kind]
    return out


def rows(case: str, kind: str = "image") -> list[dict]:
    """Four rows; their texts differ, so that a row can be told from its tokens."""
    vary = case in ("sizes", "mixed")
    out = []
    for i, (text, count) in enumerate(zip(TEXTS, COUNTS[case], strict=True)):
        # Clips of one row have one length: some processors stack them.
        sizes = [((i + j * (kind != "video")) % 4) if vary else 0 for j in range(count)]
        out.append({f"{kind}s": [], **row(text, *((kind, 10 * i + j, size) for j, size in enumerate(sizes)))})
    return out


def rows_of_kinds(kinds: tuple[str, ...], together: bool) -> list[dict]:
    """Rows of one kind each and a text row (in one batch), or rows of all kinds in changing order."""
    empty: dict = {f"{kind}s": [] for kind in kinds}
    if together:
        orders = [[kinds[(i + j) % len(kinds)] for j in range(len(kinds))] for i in range(4)]
    else:
        orders = [[kind] for kind in (*kinds, *kinds)[:3]] + [[]]
    return [
        {**empty, **row(text, *((kind, 10 * i + j, (i + j) % 4) for j, kind in enumerate(order)))}
        for i, (text, order) in enumerate(zip(TEXTS, orders, strict=True))
    ]


def table(data: list[dict]) -> Dataset:
    """The rows as they are: a real table would make nested lists of clips, which takes longer than the training."""

    def of(numbers: dict) -> dict:
        found = [data[number] for number in numbers["number"]]
        return {key: [row.get(key) for row in found] for key in dict.fromkeys(key for row in data for key in row)}

    return Dataset.from_dict({"number": range(len(data))}).with_transform(of)


def train(model, processor, data, path, cls=recorder.Recorder, media=None, **options):
    args = recorder.config(path, **options)
    trainer = cls(model, recorder.reward, args, table(data), None, processor, media=media)
    trainer.train()
    return trainer


def differences(trainer, processor, data, model=None, attribute="logps") -> list[float]:
    """The largest difference from the reference, per row of every micro-batch."""
    model = model or trainer.model
    model.eval()
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    out = []
    with torch.no_grad():
        for row in (row for batch in trainer.rows for row in batch):
            expected = reference.logps(model, encoded[tuple(row.prompt)], row.completion, 0.8)
            out.append(float((getattr(row, attribute) - expected).abs().max()))
    return out


def check(family, kind, case, data, path, largest, **options):
    model, processor = tiny.build(family)
    trainer = train(model, processor, data, path, **options)
    found = differences(trainer, processor, data)
    largest(f"{family} {kind}", case, max(found))
    assert len(found) == 8, "4 prompts x 2 completions, each in one micro-batch"
    assert {tuple(row.prompt) for batch in trainer.rows for row in batch} == {
        tuple(reference.encode(processor, row)["input_ids"][0].tolist()) for row in data
    }
    assert max(found) <= 1e-5


PAIRS = [(family, kind) for family, kinds in tiny.KINDS.items() for kind in kinds]
NOT_IMAGES = [("qwen2_5_vl", "video"), ("smolvlm", "video"), ("qwen2_audio", "audio"), ("voxtral", "audio")]
SEVERAL_KINDS = [family for family, kinds in tiny.KINDS.items() if len(kinds) > 1]


def has_case(family: str, kind: str, case: str) -> bool:
    """Some processors refuse a row without media."""
    return case != "mixed" or f"{kind} none" in tiny.CASES[family]


@pytest.mark.parametrize(
    ("family", "kind", "case"),
    [
        # What "sizes" and "mixed" hold too: one medium a row, and several.
        pytest.param(*p, case, marks=[pytest.mark.slow] if case in ("one", "several") else [])
        for case in ("one", "several", "sizes", "mixed")
        for p in PAIRS
        if has_case(*p, case)
    ],
)
def test_exact_logps(family, kind, case, tmp_path, largest):
    # covers U1 U10 O1 O2 A1
    check(family, kind, case, rows(case, kind), tmp_path, largest)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family", SEVERAL_KINDS)
def test_exact_kinds(family, together, tmp_path, largest):
    # covers O1 O2
    case = "kinds in a row" if together else "kinds in a batch"
    data = rows_of_kinds(tiny.KINDS[family], together)
    if together and family == "smolvlm":  # its processor writes frames over pictures
        with pytest.raises(EncodingError, match="SmolVLMProcessor cannot take images and a video in one row.*row 0"):
            check(family, "all kinds", case, data, tmp_path, largest)
        return
    check(family, "all kinds", case, data, tmp_path, largest)


@pytest.mark.parametrize("others", [(), ("image", "audio", "")], ids=["alone", "beside other rows"])
def test_exact_video_with_its_own_sound(others, tmp_path, largest):
    # covers O2 A1: a video whose audio track is heard, and rows without one in the same batch
    data, plain = [], []
    for i, text in enumerate(TEXTS):
        kind = others[i - 1] if others and i else "video"
        row_ = {"images": [], "audios": [], **row(text, *[(kind, i, i)] * bool(kind))}
        clip = mediafiles.write_video(tmp_path / f"{i}.mp4", 20 + 6 * i, 10, audio=tiny.audio(i, SECONDS[i] + 0.4))
        if kind == "video":
            opened, sound = Medium("video", clip), Medium("video", clip).open_audio(16_000)
            row_ = {**row_, "videos": [SimpleNamespace(**vars(opened.open_video()) | {"sound": sound})]}
            data.append({**row_, "videos": [str(clip)], "fps": None})
        else:
            data.append({**row_, "videos": [], "fps": None})
        plain.append({**row_, "audio_in_video": kind == "video"})
    model, processor = tiny.build("qwen2_5_omni_thinker")
    trainer = train(model, processor, data, tmp_path / "run", media={"audio_in_video": True})
    found = differences(trainer, processor, plain)
    largest("qwen2_5_omni_thinker video with its sound", "mixed" if others else "one", max(found))
    assert len(found) == 8 and max(found) <= 1e-5


@pytest.mark.parametrize(("family", "kind"), [*((family, "image") for family in tiny.FAMILIES), *NOT_IMAGES])
def test_exact_swapping_the_medium_moves_logps(family, kind, tmp_path):
    """The equality above would be empty if media did not matter."""
    model, processor = tiny.build(family)
    data = rows("sizes", kind)
    trainer = train(model, processor, data, tmp_path)
    swapped = [{**row, f"{kind}s": [medium(kind, 99, i)]} for i, row in enumerate(data)]
    assert min(differences(trainer, processor, swapped)) > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_bf16(family, tmp_path, largest):
    """bf16's error against float64 is at most 1.5 times the plain path's."""
    model, processor = tiny.build(family)
    data = rows("sizes")
    exact, model = copy.deepcopy(model).double(), model.to(torch.bfloat16)
    trainer = train(model, processor, data, tmp_path)
    model.eval()
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    ours, plain = [], []
    with torch.no_grad():
        for row in (row for batch in trainer.rows for row in batch):
            inputs = encoded[tuple(row.prompt)]
            truth = reference.logps(exact, inputs, row.completion, 0.8)
            ours.append((row.logps - truth).square().mean())
            plain.append((reference.logps(model, inputs, row.completion, 0.8) - truth).square().mean())
    error, baseline = torch.stack(ours).mean().sqrt(), torch.stack(plain).mean().sqrt()
    largest(f"{family} image, few bits", "bf16 / plain", error / baseline)
    assert baseline > 0
    assert error <= 1.5 * baseline


OPTIONS = {  # every pair of values of every two options occurs at least once
    "lora": ("none", "fresh", "pretrained"),
    "checkpointing": (False, True),
    "beta": (0.0, 0.1),
    "num_iterations": (1, 2),
    "padding_side": ("left", "right"),
}
PAIRWISE = [
    ("none", False, 0.0, 1, "left"),
    ("none", True, 0.1, 2, "right"),
    ("fresh", False, 0.1, 1, "right"),
    ("fresh", True, 0.0, 2, "left"),
    ("pretrained", False, 0.0, 2, "right"),
    ("pretrained", True, 0.1, 1, "left"),
    ("pretrained", False, 0.1, 2, "left"),
    ("none", True, 0.0, 1, "right"),
]


def test_pairwise_covers_every_pair():
    names = list(OPTIONS)
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            wanted = {(a, b) for a in OPTIONS[names[i]] for b in OPTIONS[names[j]]}
            assert wanted == {(case[i], case[j]) for case in PAIRWISE}


# One family a mechanism: packed patches, tiles, one tensor an image, cross-attention, a state, a convolution, sound.
# Two of them always, the others among the slow tests: every option meets every mechanism there.
MECHANISMS = [("qwen2_5_vl", "image"), ("qwen2_audio", "audio")]
OTHERS = [("smolvlm", "image"), ("gemma3", "image"), ("mllama", "image"), ("qwen2_5_vl", "video")]
OTHERS += [("qwen3_5", "image"), ("lfm2_vl", "image")]
MECHANISMS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS]


@pytest.mark.parametrize(("family", "kind"), MECHANISMS)
@pytest.mark.parametrize(("lora", "checkpointing", "beta", "iterations", "side"), PAIRWISE)
def test_exact_options(family, kind, lora, checkpointing, beta, iterations, side, tmp_path, largest):
    # covers U2 U4 U7 U9; ratio 1 and KL 0 at step 0, also for a warm-started model in memory
    model, processor = tiny.build(family)
    if lora != "none":
        model = with_adapter(model, trained=lora == "pretrained")
    processor.tokenizer.padding_side = side
    initial = copy.deepcopy(model)
    data = rows("mixed", kind)
    trainer = train(
        model, processor, data, tmp_path, gradient_checkpointing=checkpointing, beta=beta, num_iterations=iterations
    )
    assert processor.tokenizer.padding_side == side, "the user's processor is never changed"
    found = differences(trainer, processor, data)
    largest(f"{family} {kind}, options", f"{lora} gc={checkpointing}", max(found))
    assert max(found) <= 1e-5
    scored = [row for batch in trainer.rows for row in batch]
    for row in scored:
        if row.old is not None:
            assert torch.allclose(row.old, row.logps, atol=1e-6, rtol=0), "importance ratio 1 before the first update"
        assert (row.ref is not None) == (beta > 0), "beta=0 never runs the reference, beta>0 always does"
        if row.ref is not None:
            assert torch.allclose(row.ref, row.logps, atol=1e-6, rtol=0), "KL 0 before the first update"
    if beta:
        assert max(differences(trainer, processor, data, initial, "ref")) <= 1e-5
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("family", "kind"), [*MECHANISMS, ("qwen2_5_omni_thinker", "all")])
@pytest.mark.parametrize("setting", ["workers", "streaming", "evaluation"])
def test_exact_settings(family, kind, setting, tmp_path, largest):
    # covers O1 A1
    model, processor = tiny.build(family)
    data = rows_of_kinds(tiny.KINDS[family], together=False) if kind == "all" else rows("mixed", kind)
    dataset = Dataset.from_list(data) if setting == "streaming" else table(data)
    options: dict = {"dataloader_num_workers": 2} if setting == "workers" else {}
    train_rows: object = dataset.to_iterable_dataset() if setting == "streaming" else dataset
    trainer = recorder.Recorder(
        model,
        recorder.reward,
        recorder.config(tmp_path, per_device_eval_batch_size=8, **options),
        train_rows,
        dataset if setting == "evaluation" else None,
        processor,
    )
    trainer.evaluate() if setting == "evaluation" else trainer.train()
    found = differences(trainer, processor, data)
    largest(f"{family} {kind}, settings", setting, max(found))
    assert len(found) == 8 and max(found) <= 1e-5


def with_adapter(model, trained: bool):
    """A LoRA adapter on both towers; ``trained`` moves its B matrices away from zero."""
    options = LoraOptions(r=4, alpha=8, vision=bool(family_of(model.config).vision))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets(model, options)))
    if trained:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def targets(model, options):
    return lora_targets(family_of(model.config), model, options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("beta", "iterations", "checkpointing"), [(0.0, 1, True), (0.1, 2, False)])
def test_exact_4bit(family, beta, iterations, checkpointing, tmp_path, largest):
    # covers U2; also after generate() has put the quantized layers through eval mode
    from vlm_grpo import load_model

    tiny.save(family, tmp_path / "model", hidden=128)
    options = LoraOptions(r=4, alpha=8, vision=True)
    model, processor = load_model(
        str(tmp_path / "model"), backend="hf", load_in_4bit=True, lora=options, gradient_checkpointing=checkpointing
    )
    data = rows("mixed")
    options = {"beta": beta, "num_iterations": iterations, "gradient_checkpointing": checkpointing}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = train(model, processor, data, tmp_path, **options)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}, "no bf16 adapters where bf16 is not native"
    assert all(torch.equal(before[n], p) for n, p in trained.items()), "learning rate 0 and no rounding"
    found = differences(trainer, processor, data)
    largest(f"{family} image, few bits", f"4-bit beta={beta}", max(found))
    assert max(found) <= 1e-4
    assert trainer.state.log_history[0]["grad_norm"] > 0
