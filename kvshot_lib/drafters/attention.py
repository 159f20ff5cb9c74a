"""The drafter's attention: a causal prefix that all anchors share, plus each anchor's own chain of draft tokens.

The query of anchor t at draft step k sees prefix entries s ≤ t and the entries that *its own* chain has
made so far, with one softmax over both. Anchor by anchor that is ordinary attention; for all anchors at
once the chain part is element-wise, so no [anchors × steps] × [anchors × steps] matrix is ever needed.

Letters: B documents, M anchors, N prefix entries, J chain entries, H query heads, G KV heads (R = H / G
query heads each), D head size.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ..errors import StudyError

Entries = tuple[Tensor, Tensor]
"""Keys and values, each [B, G, entries, D]."""

FUSED = ("cpu", "cuda")  # devices with a fused attention that returns its log-sum-exp


def prefix_mask(visible: Tensor, length: int, window: int = 0) -> Tensor:
    """Additive mask: row m sees the first ``visible[b, m]`` of ``length`` prefix entries, or the last of these.

    [B, M] -> [B, 1, M, N] float32, 0 where visible and -inf elsewhere. Anchor t sees t + 1 entries, s ≤ t.

    >>> prefix_mask(torch.tensor([[1, 2]]), 3)[0, 0]
    tensor([[0., -inf, -inf],
            [0., 0., -inf]])
    """
    place = torch.arange(length, device=visible.device)
    hidden = place >= visible[..., None]
    if window:
        hidden = hidden | (place < visible[..., None] - window)
    return torch.zeros(hidden.shape, device=visible.device).masked_fill(hidden, float("-inf"))[:, None]


def _prefix_attention(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, tuple]:
    """The platform's fused attention: [B, G, Q, D] -> output, log-sum-exp [B, G, Q], what backward needs besides."""
    if rows.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, attn_mask=mask, scale=scale
        )
        return out, lse, ()
    bias = mask.expand(-1, rows.shape[1], -1, -1)
    out, lse, *random = torch.ops.aten._scaled_dot_product_efficient_attention(
        rows, keys, values, bias, True, scale=scale
    )
    return out, lse[..., : rows.shape[2]], tuple(random)


def _prefix_attention_backward(
    grad, rows, keys, values, mask, out, lse, random, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, with the softmax taken from ``out`` and ``lse`` as handed over."""
    if rows.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, rows, keys, values, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    bias, padded = mask.expand(-1, rows.shape[1], -1, -1), nn.functional.pad(lse, (0, -lse.shape[2] % 32))
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, rows, keys, values, bias, out, padded, *random, 0.0, [True, True, True, False], False, scale=scale
    )[:3]


def _mask_rows(mask: Tensor, repeats: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, M, N] -> [B, 1, repeats · M, N]; rows start at multiples of 16 bytes, as the CUDA kernel wants them."""
    length = mask.shape[-1]
    return nn.functional.pad(mask.to(dtype), (0, -length % 8)).repeat(1, 1, repeats, 1)[..., :length]


def chain_attention(query: Tensor, prefix: Entries | None, mask: Tensor | None, chain: Entries | None) -> Tensor:
    """Attention of each anchor's query over the shared prefix and its own chain, one softmax over both.

    Parameters
    ----------
    query : [B, H, M, D]
    prefix : keys and values, each [B, G, N, D]; None if the drafter reads no target state.
    mask : from :func:`prefix_mask`, [B, 1, M, N].
    chain : keys and values, each [B, G, M, J, D]; row m holds anchor m's own. None before the first.

    Returns
    -------
    [B, H, M, D]

    Notes
    -----
    On CPU and CUDA the prefix part runs in a fused kernel that returns its log-sum-exp, and the chain is
    merged into it; elsewhere it is plain PyTorch. Tests hold both to the same numbers and gradients.
    """
    groups = (prefix or chain)[0].shape[1]
    grouped = query.unflatten(1, (groups, -1))  # [B, G, R, M, D]
    if prefix is not None and query.device.type in FUSED:
        out = _MergedAttention.apply(grouped, *prefix, mask, *(chain or (None, None)))
    else:
        out = _plain_attention(grouped, prefix, mask, chain)
    return out.flatten(1, 2)


def _plain_attention(query: Tensor, prefix, mask, chain) -> Tensor:
    """Joint softmax, spelled out: the reference, and the path for devices without the fused kernel."""
    scale, scores = query.shape[-1] ** -0.5, []
    if prefix is not None:
        keys, values = (part[:, :, None] for part in prefix)  # [B, G, 1, N, D]
        scores.append((query @ keys.transpose(-1, -2)).float() * scale + mask[:, None])
    if chain is not None:
        scores.append(torch.einsum("bgrmd,bgmjd->bgrmj", query, chain[0]).float() * scale)
    weights = torch.cat(scores, -1).softmax(-1).to(query.dtype).split([part.shape[-1] for part in scores], -1)
    out = 0
    if prefix is not None:
        out = out + weights[0] @ values
    if chain is not None:
        out = out + torch.einsum("bgrmj,bgmjd->bgrmd", weights[-1], chain[1])
    return out


def products(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """einsum of two tensors as a product and a sum, in their dtype: a matrix product of so few is mostly overhead.

    >>> products("md,mjd->mj", torch.ones(2, 4), torch.ones(2, 3, 4)).shape
    torch.Size([2, 3])
    """
    read, kept = equation.split("->")
    names = read.split(",")
    letters = [*kept, *sorted({*names[0], *names[1]} - {*kept})]
    shown = lambda own: tuple(slice(None) if letter in own else None for letter in letters)
    order = lambda own: [own.index(letter) for letter in letters if letter in own]
    aligned = [part.permute(order(own))[shown(own)] for part, own in zip((a, b), names, strict=True)]
    product = aligned[0] * aligned[1]
    return product.sum([*range(len(kept), len(letters))], dtype=product.dtype)


def _merge(
    einsum: Callable, query: Tensor, chain_keys: Tensor, chain_values: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain merged into the prefix's ``out`` [B, G, R · M, D]: that, the joint log-sum-exp, the chain's weights."""
    scores = einsum("bgrmd,bgmjd->bgrmj", query, chain_keys).float() * scale
    scores = scores.reshape(*out.shape[:3], -1)
    prefix_lse, lse = lse, torch.logaddexp(lse, scores.logsumexp(-1))
    weights = (scores - lse[..., None]).exp().to(query.dtype)
    from_chain = einsum("bgrmj,bgmjd->bgrmd", weights.view(*query.shape[:4], -1), chain_values)
    return out * (prefix_lse - lse).exp()[..., None].to(out.dtype) + from_chain.reshape(out.shape), lse, weights


def _merge_backward(
    einsum: Callable, grad: Tensor, query: Tensor, chain_keys: Tensor, chain_values: Tensor, out: Tensor,
    weights: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the chain adds to the gradient of the query, and the gradients of its keys and values."""
    weights = weights.view(*query.shape[:4], -1)
    shared = (grad * out.view(query.shape)).sum(-1, keepdim=True, dtype=grad.dtype)
    grad_scores = weights * (einsum("bgrmd,bgmjd->bgrmj", grad, chain_values) - shared) * scale
    return (
        einsum("bgrmj,bgmjd->bgrmd", grad_scores, chain_keys),
        einsum("bgrmj,bgrmd->bgmjd", grad_scores, query),
        einsum("bgrmj,bgrmd->bgmjd", weights, grad),
    )


def _merging(device: str) -> tuple[Callable, Callable]:
    """`_merge` and `_merge_backward` there; a GPU has each in a few kernels, by torch.compile."""
    if device == "cuda" and not torch.compiler.is_compiling() and has_triton():  # which can't be traced
        return _compiled_merging()
    einsum = products if torch.compiler.is_compiling() else torch.einsum
    return partial(_merge, einsum), partial(_merge_backward, einsum)


@cache
def _compiled_merging() -> tuple[Callable, Callable]:
    backward = torch.compile(lambda *given: _merge_backward(products, *given))
    return torch.compile(lambda *given: _merge(products, *given)), backward


class _MergedAttention(torch.autograd.Function):
    """Prefix attention by a fused kernel, the chain merged in through log-sum-exps.

    With L_p, L_c the log-sum-exps of both parts and L = log(exp L_p + exp L_c):
    out = exp(L_p - L) out_p + Σ_j exp(s_j - L) v_j.
    Backward: for any softmax, ds_j = P_j (dP_j - Σ out·dout) with P_j = exp(s_j - L). The fused backward
    kernel computes just that from the ``out`` and log-sum-exp handed to it; with the *merged* ones its P_j
    are the joint probabilities.
    """

    @staticmethod
    def forward(ctx, query, keys, values, mask, chain_keys, chain_values):
        batch, groups, repeats, anchors, size = query.shape
        scale = size**-0.5
        rows = query.reshape(batch, groups, repeats * anchors, size)
        mask = _mask_rows(mask, repeats, query.dtype)
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        out, lse, random = _prefix_attention(rows, keys, values, mask, scale)
        weights = None
        if chain_keys is not None:
            merge, _ = _merging(query.device.type)
            chain = chain_keys.detach(), chain_values.detach()
            out, lse, weights = merge(query.detach(), *chain, out, lse, scale)
        ctx.save_for_backward(rows, keys, values, mask, out, lse, weights, chain_keys, chain_values, *random)
        ctx.shape, ctx.scale = query.shape, scale
        return out.view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, keys, values, mask, out, lse, weights, chain_keys, chain_values, *random = ctx.saved_tensors
        grad_rows = grad.reshape(rows.shape).contiguous()
        grad_query, grad_keys, grad_values = _prefix_attention_backward(
            grad_rows, rows, keys, values, mask, out, lse, random, ctx.scale
        )
        grad_query, grad_chain_keys, grad_chain_values = grad_query.reshape(ctx.shape), None, None
        if weights is not None:
            _, merge_backward = _merging(grad.device.type)
            chain = chain_keys.detach(), chain_values.detach()
            given = grad, rows.view(ctx.shape), *chain, out, weights, ctx.scale
            added, grad_chain_keys, grad_chain_values = merge_backward(*given)
            grad_query = grad_query + added
        return grad_query, grad_keys, grad_values, None, grad_chain_keys, grad_chain_values


def rotated(heads: Tensor, rotary: Entries, norm: nn.Module | None = None) -> Tensor:
    """RoPE, after a norm per head if there is one: [B, heads, n, D], rotary [B, n, D] each -> the same shape, dtype."""
    normed = heads if norm is None else norm(heads)  # float32 under autocast
    return apply_rotary_pos_emb(normed, normed, *rotary)[0].to(heads.dtype)


class PrefixAttention(nn.Module):
    """Attention over prefix entries and an anchor's own chain, with its projections.

    Parameters
    ----------
    width : what q, k and v read; ``query_width`` what q reads, if it is given something else. groups : KV heads.
    grad_scale : multiplies the gradient of k_proj and v_proj.
    qk_norm : norm queries and keys per head before RoPE.
    """

    def __init__(
        self, sizes: LlamaConfig, width: int, groups: int, grad_scale: float = 1.0, qk_norm: bool = False,
        query_width: int = 0,
    ):  # fmt: skip
        super().__init__()
        heads, self.head_dim = sizes.num_attention_heads, sizes.head_dim
        if heads % groups:
            raise StudyError(f"{heads} query heads can't share {groups} KV heads evenly; choose kv_fusion='linear'")
        self.q_proj = nn.Linear(query_width or width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, sizes.hidden_size, bias=False)
        for name in ("q_norm", "k_norm"):
            setattr(self, name, LlamaRMSNorm(self.head_dim, sizes.rms_norm_eps) if qk_norm else None)
        if grad_scale != 1:
            for linear in (self.k_proj, self.v_proj):
                linear.weight.register_hook(lambda gradient: gradient * grad_scale)

    def project(self, inputs: Tensor, rotary: Entries, *names: str) -> list[Tensor]:
        """[B, M, width] -> for each of ``q``, ``k``, ``v``: [B, heads, M, D], queries and keys normed and rotated."""
        out = []
        for name in names:
            heads = getattr(self, f"{name}_proj")(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            out.append(heads if name == "v" else rotated(heads, rotary, getattr(self, f"{name}_norm")))
        return out

    def forward(
        self, inputs: Tensor, rotary: Entries, prefix: Entries, mask: Tensor, chain: Entries | None, append: bool,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, Entries | None]:  # fmt: skip
        """[B, M, width] -> [B, M, d], and the chain [B, G, M, J, D]; with ``append`` own entries join it first.

        Queries are made from ``inputs``, or from ``asked`` if it is given.
        """
        if append and asked is None:
            query, *own = self.project(inputs, rotary, "q", "k", "v")
        else:
            (query,) = self.project(inputs if asked is None else asked, rotary, "q")
            own = self.project(inputs, rotary, "k", "v") if append else ()
        chain = extend(chain, own) if append else chain
        return self.merge(chain_attention(query, prefix, mask, chain)), chain

    def columns(self, inputs: Tensor, rotary: Entries, entries: Entries, first: int | Tensor, window: int) -> Tensor:
        """The prefix's M columns from ``first`` on, each over the entries up to its own: [B, M, width] -> [B, M, d]"""
        (query,) = self.project(inputs, rotary, "q")
        visible = first + torch.arange(1, query.shape[2] + 1, device=query.device)
        mask = prefix_mask(visible.expand(len(query), -1), entries[0].shape[2], window)
        return self.merge(chain_attention(query, entries, mask, None))

    def merge(self, heads: Tensor) -> Tensor:
        """[B, H, M, D] -> [B, M, d]"""
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def extend(chain: Entries | None, own: list[Tensor]) -> Entries:
    """[B, G, M, J, D] and one more entry each, [B, G, M, D] -> [B, G, M, J+1, D]"""
    own = tuple(part.unsqueeze(3) for part in own)
    return own if chain is None else tuple(torch.cat(pair, dim=3) for pair in zip(chain, own, strict=True))
