"""Functions that torch computes in one piece, written out in operations that have rules.

Scales of normalisations are constants of their input (AttnLRP's identity rule): relevance passes
them as it is. Each function takes what the torch function of its name takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

_Tensor = torch.Tensor


def layer_norm(
    input: _Tensor,
    normalized_shape: list[int],
    weight: _Tensor | None = None,
    bias: _Tensor | None = None,
    eps: float = 1e-5,
) -> _Tensor:
    """Return the normalised input; the standard deviation is a constant, the mean is not."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    scale = centred.detach().square().mean(axes, keepdim=True).add(eps).rsqrt()
    return _affine(centred * scale, weight, bias)


def rms_norm(
    input: _Tensor,
    normalized_shape: list[int],
    weight: _Tensor | None = None,
    eps: float | None = None,
) -> _Tensor:
    """Return the normalised input; the root mean square is a constant."""
    axes = tuple(range(-len(normalized_shape), 0))
    small = torch.finfo(input.dtype).eps if eps is None else eps
    scale = input.detach().square().mean(axes, keepdim=True).add(small).rsqrt()
    return _affine(input * scale, weight, None)


def group_norm(
    input: _Tensor,
    num_groups: int,
    weight: _Tensor | None = None,
    bias: _Tensor | None = None,
    eps: float = 1e-5,
) -> _Tensor:
    """Return the input normalised in groups of channels, as layer_norm does it."""
    grouped = input.reshape(len(input), num_groups, -1)
    normal = layer_norm(grouped, [grouped.shape[-1]], eps=eps).reshape(input.shape)
    return _per_channel(normal, weight, bias)


def instance_norm(
    input: _Tensor,
    running_mean: _Tensor | None = None,
    running_var: _Tensor | None = None,
    weight: _Tensor | None = None,
    bias: _Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Tensor:
    """Return the input normalised over the positions of each channel, or by running statistics."""
    if not use_input_stats:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normal = layer_norm(input.flatten(2), [math.prod(input.shape[2:])], eps=eps)
    return _per_channel(normal.reshape(input.shape), weight, bias)


def normalize(
    input: _Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> _Tensor:
    """Return the input over its norm; the norm is a constant."""
    norm = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True)
    return torch.mul(input, norm.clamp_min(eps).reciprocal())


def cosine_similarity(x1: _Tensor, x2: _Tensor, dim: int = 1, eps: float = 1e-8) -> _Tensor:
    """Return the inner product of the normalised operands."""
    return torch.mul(normalize(x1, 2.0, dim, eps), normalize(x2, 2.0, dim, eps)).sum(dim)


def glu(input: _Tensor, dim: int = -1) -> _Tensor:
    """Return the first half gated by the second."""
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def scaled_dot_product_attention(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    attn_mask: _Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Tensor:
    """Return softmax(Q K^T scale + mask) V, written out; a row without any key gives 0."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    size = query.shape[-1]
    scores = query.matmul(key.transpose(-2, -1)) * (1 / math.sqrt(size) if scale is None else scale)
    allowed: _Tensor | None = None
    if is_causal:
        allowed = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        allowed = attn_mask > -torch.inf
        scores = scores + torch.where(allowed, attn_mask, torch.zeros_like(attn_mask))
    if allowed is not None:
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if allowed is not None:
        weights = torch.where(allowed.any(-1, keepdim=True), weights, 0.0)
    return weights.matmul(value)


def addmm(
    input: _Tensor, mat1: _Tensor, mat2: _Tensor, *, beta: float = 1, alpha: float = 1
) -> _Tensor:
    """Return beta input + alpha mat1 mat2; a constant matrix on the right is a layer's weight."""
    if beta == 1 and alpha == 1 and not mat2.requires_grad and not input.requires_grad:
        return F.linear(mat1, mat2.t(), input)
    return _added(input, mat1.matmul(mat2), beta, alpha)


def baddbmm(
    input: _Tensor, batch1: _Tensor, batch2: _Tensor, *, beta: float = 1, alpha: float = 1
) -> _Tensor:
    """Return beta input + alpha batch1 batch2; with beta = 0 the input is not looked at."""
    return _added(input, batch1.bmm(batch2), beta, alpha)


def addcmul(input: _Tensor, tensor1: _Tensor, tensor2: _Tensor, *, value: float = 1) -> _Tensor:
    """Return input + value tensor1 tensor2."""
    return input + value * (tensor1 * tensor2)


def addcdiv(input: _Tensor, tensor1: _Tensor, tensor2: _Tensor, *, value: float = 1) -> _Tensor:
    """Return input + value tensor1 / tensor2."""
    return input + value * (tensor1 / tensor2)


def lerp(input: _Tensor, end: _Tensor, weight: _Tensor | float) -> _Tensor:
    """Return input + weight (end - input)."""
    return input + weight * (end - input)


def masked_fill(input: _Tensor, mask: _Tensor, value: Any) -> _Tensor:
    """Return the input with a constant where the mask is."""
    return torch.where(mask, value, input)


def rsub(input: _Tensor, other: Any, *, alpha: float = 1) -> _Tensor:
    """Return other - alpha input."""
    return torch.add(input * -alpha, other)


def multi_head_attention_forward(  # what torch.nn.MultiheadAttention calls
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: _Tensor | None,
    in_proj_bias: _Tensor | None,
    bias_k: _Tensor | None,
    bias_v: _Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: _Tensor,
    out_proj_bias: _Tensor | None,
    training: bool = True,
    key_padding_mask: _Tensor | None = None,
    need_weights: bool = True,
    attn_mask: _Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: _Tensor | None = None,
    k_proj_weight: _Tensor | None = None,
    v_proj_weight: _Tensor | None = None,
    static_k: _Tensor | None = None,
    static_v: _Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[_Tensor, _Tensor | None]:
    """Return attention over (positions, samples, width) and its mean weights where asked."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None:
        raise NotImplementedError("relevance through attention with added keys")
    whole = query.dim() == 3
    q, k, v = (t if whole else t.unsqueeze(1) for t in (query, key, value))
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights: Any = separate if in_proj_weight is None else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        _heads(F.linear(t, w, b), num_heads)
        for t, w, b in zip((q, k, v), weights, biases, strict=True)
    )
    mask = _merged(attn_mask, key_padding_mask, num_heads, q.dtype)
    scores = q.matmul(k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    attention = (scores if mask is None else scores + mask).softmax(-1)
    mixed = attention.matmul(v).permute(2, 0, 1, 3).flatten(2)
    out = F.linear(mixed, out_proj_weight, out_proj_bias)
    seen = attention.mean(1) if average_attn_weights else attention
    if not whole:
        out, seen = out.squeeze(1), seen.squeeze(0)
    return out, seen if need_weights else None


def _heads(x: _Tensor, heads: int) -> _Tensor:
    """Return (positions, samples, width) as (samples, heads, positions, width of a head)."""
    return x.reshape(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _merged(
    attn_mask: _Tensor | None, padding: _Tensor | None, heads: int, dtype: torch.dtype
) -> _Tensor | None:
    """Return both masks as one to add to scores of (samples, heads, queries, keys)."""
    found: _Tensor | None = None
    if attn_mask is not None:
        found = _to_add(attn_mask, dtype)
        if attn_mask.dim() == 3:
            found = found.reshape(-1, heads, *attn_mask.shape[1:])
    if padding is not None:
        rows = padding if padding.dim() == 2 else padding.unsqueeze(0)
        of_keys = _to_add(rows, dtype)[:, None, None, :]
        found = of_keys if found is None else found + of_keys
    return found


def _to_add(mask: _Tensor, dtype: torch.dtype) -> _Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _affine(x: _Tensor, weight: _Tensor | None, bias: _Tensor | None) -> _Tensor:
    scaled = x if weight is None else x * weight
    return scaled if bias is None else scaled + bias


def _per_channel(x: _Tensor, weight: _Tensor | None, bias: _Tensor | None) -> _Tensor:
    shape = (-1,) + (1,) * (x.dim() - 2)
    return _affine(x, *(None if t is None else t.reshape(shape) for t in (weight, bias)))


def _added(x: _Tensor, product: _Tensor, beta: float, alpha: float) -> _Tensor:
    scaled = product if alpha == 1 else product * alpha
    if beta == 0:
        return scaled
    return (x if beta == 1 else x * beta) + scaled


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        layer_norm,
        rms_norm,
        group_norm,
        instance_norm,
        normalize,
        cosine_similarity,
        glu,
        scaled_dot_product_attention,
        addmm,
        baddbmm,
        addcmul,
        addcdiv,
        lerp,
        masked_fill,
        rsub,
        multi_head_attention_forward,
    )
}
