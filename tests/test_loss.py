"""Loss and gradients against a hand-written float64 GRPO step, and the log-probability head against float64."""

import copy

import pytest
import recorder
import reference
import tiny
import torch
from datasets import Dataset
from test_exact import rows, rows_of_kinds, table
from torch.nn.functional import linear
from transformers import TrainerCallback

from vlm_grpo.losses import chunked_logps


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def hand_written_loss(model, ref, encoded, batches, loss_type, beta, temperature, max_length):
    """GRPO as in the papers, row by row in float64: clipped ratio at its first update, k3 penalty."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:  # one micro-batch; TRL divides by the number of them
        per_row, lengths = [], []
        for row in batch:
            inputs = encoded[tuple(row.prompt)]
            logps = reference.logps(model, inputs, row.completion, temperature)
            loss = -torch.exp(logps - logps.detach()) * row.advantage
            if beta:
                with torch.no_grad():
                    gap = reference.logps(ref, inputs, row.completion, temperature)
                gap = gap - logps
                loss = loss + beta * (torch.exp(gap) - gap - 1)
            per_row.append(loss.sum())
            lengths.append(len(row.completion))
        sums, counts = torch.stack(per_row), torch.tensor(lengths, dtype=torch.float64)
        total = (
            total
            + {
                "grpo": (sums / counts).mean() / len(batches),
                "bnpo": sums.sum() / counts.sum() / len(batches),
                "dr_grpo": sums.sum() / (len(batch) * max_length) / len(batches),
                "dapo": sums.sum() / batch[0].tokens_in_generation,
            }[loss_type]
        )
    return total


@pytest.mark.parametrize(
    ("family", "kind", "loss_type", "beta"),
    [
        ("qwen2_5_vl", "image", "dapo", 0.0),
        ("qwen2_5_vl", "image", "grpo", 0.1),
        ("smolvlm", "image", "dr_grpo", 0.1),
        ("gemma3", "image", "bnpo", 0.0),
        ("llava", "image", "dapo", 0.1),
        ("qwen2_5_vl", "video", "dapo", 0.1),
        ("qwen2_audio", "audio", "grpo", 0.1),
        ("qwen2_5_omni_thinker", "all", "dapo", 0.1),
        ("mllama", "image", "dapo", 0.0),
    ],
)
def test_exact_loss_and_gradients(family, kind, loss_type, beta, tmp_path):
    # covers U7 A1
    model, processor = tiny.build(family)
    exact = copy.deepcopy(model).double()
    reference_model = copy.deepcopy(exact)
    data = rows_of_kinds(tiny.KINDS[family], together=False) if kind == "all" else rows("mixed", kind)
    gradients = Gradients()
    options = {"loss_type": loss_type, "beta": beta, "max_grad_norm": 0.0}
    trainer = recorder.Recorder(
        model,
        recorder.reward,
        recorder.config(tmp_path, **options),
        table(data),
        processing_class=processor,
        callbacks=[gradients],
    )
    trainer.train()
    rewards_differ = any(row.advantage for batch in trainer.rows for row in batch)
    assert rewards_differ, "a test whose advantages are all zero proves nothing"
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    encoded = {k: {n: t.double() if t.is_floating_point() else t for n, t in e.items()} for k, e in encoded.items()}
    loss = hand_written_loss(exact.train(), reference_model, encoded, trainer.rows, loss_type, beta, 0.8, 6)
    loss.backward()
    expected = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    assert {n for n, g in expected.items() if g.any()} == {n for n, g in gradients.found.items() if g.any()}
    difference = sum((gradients.found[n].double() - g).square().sum() for n, g in expected.items()).sqrt()
    norm = sum(g.square().sum() for g in expected.values()).sqrt()
    assert norm > 1e-3
    assert difference / norm <= 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=2e-6)


def test_advantages_are_group_relative(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    trainer = recorder.Recorder(
        model, recorder.reward, recorder.config(tmp_path), Dataset.from_list(rows("one")), processing_class=processor
    )
    trainer.train()
    groups = {}
    for row in (row for batch in trainer.rows for row in batch):
        groups.setdefault(tuple(row.prompt), []).append((float(sum(row.completion) % 7), row.advantage))
    assert len(groups) == 4
    for members in groups.values():
        values = torch.tensor([value for value, _ in members])
        expected = (values - values.mean()) / (values.std() + 1e-4)
        assert [a for _, a in members] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", ["all", "hidden", "hidden, not through the entropy"])
def test_chunked_logps_equal_float64(temperature, softcap, bias, trained):
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, requires_grad=True)
    weight = torch.randn(101, 16, requires_grad=True)
    offset = torch.randn(101, requires_grad=True) if bias else None
    targets = torch.randint(101, (37,))
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    arguments = (targets, temperature, 5, softcap, 0.5, names)
    ours = chunked_logps(hidden, weight, offset, *arguments)
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    if trained != "all":  # a frozen head takes another way
        ours = chunked_logps(hidden, weight.detach(), offset.detach() if bias else None, *arguments)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = linear(wide[0], wide[1], wide[2] if bias else None) * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    expected = (
        log_probs.gather(-1, targets[:, None])[:, 0],
        -(probs * log_probs).sum(-1),
        probs.square().sum(-1).log(),
        logits.mean(-1),
        logits.argmax(-1) == targets,
    )
    for name, a, b in zip(names, ours, expected, strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5, rtol=1e-5), name
    factor = torch.randn(37)
    entropy = 0.0 if "not" in trained else 1.0
    loss = ours[0] * factor + (ours[1] * factor.flip(0) if entropy else 0)
    loss.sum().backward()
    (expected[0] * factor.double() + entropy * expected[1] * factor.double().flip(0)).sum().backward()
    for a, b in zip(leaves if trained == "all" else [hidden], wide, strict=False):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-4, rtol=1e-4)


def test_chunked_logps_never_hold_all_logits():
    """The largest tensor that the head makes is one chunk, in the backward pass too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with Largest() as watch:
        log_probs, entropy, *_ = chunked_logps(hidden, weight, None, torch.randint(500, (64,)), chunk_size=4)
        (log_probs.sum() + entropy.sum()).backward()
    assert watch.elements <= max(4 * 500, weight.numel()) < 64 * 500


def test_chunked_logps_of_nothing_keep_the_graph():
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    log_probs, entropy, *_ = chunked_logps(hidden, weight, None, torch.zeros(0, dtype=torch.long))
    (log_probs.sum() + entropy.sum()).backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.gpu
def test_trl_kernel_equals_float64():
    """The fused head that a GPU uses, with its gradients."""
    from vlm_grpo.patches.trl import LOG_PROBS, _LogProbs

    LOG_PROBS.ensure()
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(1000, (300,), device="cuda")
    log_probs, entropy, *_ = _LogProbs.apply(
        hidden, weight, None, targets, 0.7, 256, None, 1.0, ("log_probs", "entropy")
    )
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = (wide[0] @ wide[1].T / 0.7).log_softmax(-1)
    assert torch.allclose(log_probs.double(), expected.gather(-1, targets[:, None])[:, 0], atol=1e-3)
    assert torch.allclose(entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-3)
    log_probs.sum().backward()
    expected.gather(-1, targets[:, None]).sum().backward()
    for ours, theirs in zip((hidden, weight), wide, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < 1e-3
