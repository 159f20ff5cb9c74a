"""Soft cross-entropy against the target's distribution, without keeping logits."""

import torch
from torch import Tensor


def score_rows(
    logits: Tensor, probabilities: Tensor, index: Tensor, weight: Tensor, cap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted soft cross-entropy of rows z [R, V] against p = probabilities[index]: its sum, argmax z, and w (softmax(z) - p).

    With ``cap`` the logits are y = cap · tanh(z / cap), and the gradient is w (softmax(y) - p) (1 - (y / cap)²).
    """
    logits, wanted = logits.float(), probabilities[index]
    if cap:
        logits = cap * torch.tanh(logits / cap)
        slope = 1 - (logits / cap) ** 2
    best, normaliser = logits.argmax(-1), logits.logsumexp(-1)
    total = (weight * (normaliser - torch.linalg.vecdot(logits, wanted))).sum()
    gradient = logits.sub_(normaliser[:, None]).exp_().sub_(wanted).mul_(weight[:, None])
    return total, best, gradient.mul_(slope) if cap else gradient


class SoftCrossEntropy(torch.autograd.Function):
    """Σ_r w_r · CE(p_r, softmax(h_r Wᵀ)) for a frozen head W, a chunk of rows at a time.

    The gradient of a row is w (softmax(z) - p) W; it is formed at once and only [rows, d] of it kept, so that logits of K draft
    steps never stand in memory together. Inputs: hidden [R, d], head [V, d], probabilities [P, V], index [R] into them, weight [R],
    ``score``, :func:`score_rows` or a compiled one, and the ``cap`` of the logits. Returns the sum and argmax z [R].
    """

    @staticmethod
    def forward(ctx, hidden, head, probabilities, index, weight, score=score_rows, cap=0.0):
        rows = 256 if hidden.device.type == "cpu" else 8192
        total, best, gradient = hidden.new_zeros((), dtype=torch.float32), [], torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part].to(head.dtype) @ head.T
            loss, chosen, difference = score(logits, probabilities, index[part], weight[part], cap)
            total += loss
            best.append(chosen)
            gradient[part] = (difference.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        best = torch.cat(best) if best else index.new_zeros(0)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx, grad_total, _grad_best):
        return grad_total.to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None, None, None, None, None
