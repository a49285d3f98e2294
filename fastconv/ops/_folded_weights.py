"""Batch normalisation by running averages, folded into the convolution before it."""

from __future__ import annotations

from typing import Any

import torch

from ._packed_weights import made_of, pack_weight

Numbers = torch.Tensor | None


def folded_weight(
    weight: torch.Tensor,  # (M, C/G, KH, KW)
    bias: Numbers,  # (M,), as are the others
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    bn_weight: Numbers,
    bn_bias: Numbers,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one that does both: ``w' = p*w``, ``b' = p*(b - running_mean) + bn_bias``.

    ``p = bn_weight / sqrt(running_var + eps)``. Kept from call to call where no gradient is needed.
    """
    tensors = (weight, bias, running_mean, running_var, bn_weight, bn_bias)
    made = made_of(tensors, "fold", (eps,), fold)
    return fold(*tensors, eps) if made is None else made


def fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps):
    """The same, made anew."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(exact) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight
    shift = (-running_mean if bias is None else bias - running_mean) * scale
    if bn_bias is not None:
        shift = shift + bn_bias
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def fold_and_pack(*operands: Any) -> tuple[torch.Tensor, ...]:
    """Of ``(*tensors, eps, groups, algorithm)``: weight, bias and, for an algorithm, the packed weight."""
    *operands, groups, algorithm = operands
    folded = fold(*operands)
    return folded if algorithm is None else (*folded, pack_weight("conv2d", folded[0], groups, algorithm))
