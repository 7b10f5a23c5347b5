"""Pure tensors: what TRL lacks or cannot do on every device. Nothing here knows a trainer or a model."""

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# 64 MiB of fp32 logits: large enough for full matmul speed, small beside any model.
_CHUNK_ELEMENTS = 1 << 24


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Log-probabilities of ``targets`` under a language-model head, in plain torch, without the (N, V) logits.

    The head runs in chunks of rows; under autograd each chunk is recomputed in the backward pass, so at most
    one chunk of logits exists at a time. Same arguments and results as TRL's Triton kernel, on any device.

    Args:
        hidden: (N, H) hidden states that predict ``targets``.
        weight: (V, H) head weight; ``bias``: (V,) or None.
        targets: (N,) token ids.
        temperature: the sampling temperature the logits are divided by.
        chunk_size: rows per chunk at most; None chooses by the vocabulary.
        softcap: ``softcap * tanh(logits / softcap)`` is applied before the temperature, as in Gemma.
        logit_scale: a model's own factor on its logits.
        outputs: which of ``log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1`` to compute.

    Returns:
        Five (N,) tensors in that order, in nats where they are logarithms; None for what was not asked for.
        ``log_probs`` and ``entropy`` carry gradients.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    rows = rows if chunk_size is None else min(rows, chunk_size)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor | None, ...]:
        return _head_statistics(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs)

    chunks = []
    for start in range(0, max(1, hidden.shape[0]), rows):  # one empty chunk keeps the graph when N is 0
        args = hidden[start : start + rows], weight, bias, targets[start : start + rows]
        chunks.append(checkpoint(head, *args, use_reentrant=False) if needs_grad else head(*args))
    columns = zip(*chunks, strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)  # type: ignore[return-value]


def _head_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    logits = linear(hidden.to(weight.dtype), weight, bias)  # (n, V)
    # Half precision is enough for the product, not for the normaliser.
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    entropy = log_sum_sq = mean_logits = is_top1 = None
    if "entropy" in outputs:
        probs = (logits - normaliser[:, None]).exp()
        entropy = normaliser - (probs * logits).sum(-1)
    if "log_sum_sq_probs" in outputs:
        log_sum_sq = (2 * (logits.detach() - normaliser.detach()[:, None])).logsumexp(-1)
    if "mean_logits" in outputs:
        mean_logits = logits.detach().mean(-1)
    if "is_top1" in outputs:
        is_top1 = logits.argmax(-1) == targets
    return log_probs, entropy, log_sum_sq, mean_logits, is_top1
