"""Soft cross-entropy against the target's distribution, without keeping logits."""

import torch
from torch import Tensor


def score_rows(logits: Tensor, probabilities: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted soft cross-entropy of rows z [R, V] against p = probabilities[index]: its sum, argmax z, and w (softmax(z) - p)."""
    logits, wanted = logits.float(), probabilities[index]
    best, normaliser = logits.argmax(-1), logits.logsumexp(-1)
    total = (weight * (normaliser - torch.linalg.vecdot(logits, wanted))).sum()
    return total, best, logits.sub_(normaliser[:, None]).exp_().sub_(wanted).mul_(weight[:, None])


class SoftCrossEntropy(torch.autograd.Function):
    """Σ_r w_r · CE(p_r, softmax(h_r Wᵀ)) for a frozen head W, a chunk of rows at a time.

    The gradient of a row is w (softmax(z) - p) W; it is formed at once and only [rows, d] of it kept, so that logits of K draft
    steps never stand in memory together. Inputs: hidden [R, d], head [V, d], probabilities [P, V], index [R] into them, weight [R],
    and ``score``, :func:`score_rows` or a compiled one. Returns the sum and argmax z [R].
    """

    @staticmethod
    def forward(ctx, hidden, head, probabilities, index, weight, score=score_rows):
        rows = 256 if hidden.device.type == "cpu" else 8192
        total, best, gradient = hidden.new_zeros((), dtype=torch.float32), [], torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part].to(head.dtype) @ head.T
            loss, chosen, difference = score(logits, probabilities, index[part], weight[part])
            total += loss
            best.append(chosen)
            gradient[part] = (difference.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        best = torch.cat(best) if best else index.new_zeros(0)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx, grad_total, _grad_best):
        return grad_total.to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None, None, None, None
