"""Adapter vectors to bytes and back.

In: a flat vector of N finite numbers and its spec. Out: little-endian numbers with nothing around them, so that a ranged read of
a blob is the adapter. Knows nothing of files or hashes; never unpickles.

    fp32, bf16    N numbers in the order of the spec's table; bf16 is a plain cast, rounding to nearest even
    int8, int4    S scales in bf16, then N whole numbers in the order of the table: a byte each, or two in a byte, the earlier in
                  the low half, both in two's complement (of an odd N, the last high half is 0). Number = scale x whole number

A scale belongs to `GROUP` features that follow each other in one tensor, at one rank. Features are the axis before the last of A,
W1 and V, and the last axis of B, C, W2 and w. So a group crosses neither tensors nor the rows of one, whose sizes differ once an
adapter was cut by SVD; the last group of a row may be shorter. Scales lie tensor after tensor, in each like its numbers, with
groups in the place of features. Whole numbers are -127 to 127, or -7 to 7, and a scale is the least in bf16 with which no number
moves by more than half of it: the largest of its group by 127.5, or 7.5, rounded up.

Bytes a number: 4, 2, 1 + 2/64, 1/2 + 2/64. On one core, int8 and int4 of 21.8 million numbers (Qwen3-8B, rank 8) take 0.12 s to
encode (0.7 GB/s of fp32) and 0.07 to 0.09 s to decode (1 GB/s and more); 48,640 numbers, 1.0 and 0.4 ms. A vector on a GPU is
quantised there.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from core.adapters.layout import Encoding, Grid, check_known, count_scales, encoded_bytes, runs
from core.adapters.spec import AdapterSpec

_LARGEST = {"int8": 127, "int4": 7}


def encode(flat_N: Tensor, encoding: Encoding, spec: AdapterSpec) -> bytes:
    """The bytes of a vector of any float type, on any device.

    Raises `ValueError` for another shape, for an unknown encoding, and where a number is not finite or does not stay so.
    """
    check_known(encoding)
    if flat_N.shape != (spec.numel,) or not flat_N.is_floating_point():
        raise ValueError(
            f"expected a flat vector of {spec.numel} floats, which the spec counts, got {tuple(flat_N.shape)} of {flat_N.dtype}"
        )
    if encoding == "bf16":
        cast_N = flat_N.detach().to("cpu", torch.bfloat16)
        _check_finite(cast_N, encoding)
        return _to_bytes(cast_N.contiguous().view(torch.int16))
    values_N = flat_N.detach().float().contiguous()
    _check_finite(values_N, encoding)
    if encoding == "fp32":
        return _to_bytes(values_N.cpu())
    scale_S, whole_N = _quantised(values_N, spec, encoding)
    if encoding == "int4":
        low, high = torch.nn.functional.pad(whole_N, (0, spec.numel % 2)).view(-1, 2).unbind(1)
        whole_N = (low & 15) | (high << 4)
    return _to_bytes(scale_S.cpu().view(torch.int16)) + _to_bytes(whole_N.cpu())


def decode(data: bytes, spec: AdapterSpec, encoding: Encoding) -> Tensor:
    """flat_N in fp32, near what `encode` was given as its encoding allows, in memory of its own.

    Raises `ValueError` for an unknown encoding, another number of bytes, and bytes that `encode` never writes: numbers that are
    not finite, scales below zero, whole numbers out of range.
    """
    if len(data) != (expected := encoded_bytes(spec, encoding)):
        raise ValueError(f"{spec.numel} numbers in {encoding} are {expected} bytes, not {len(data)}: another spec or a cut blob")
    if encoding == "fp32":
        flat_N = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
        _check_finite(flat_N, encoding)
        return flat_N
    if encoding == "bf16":
        flat_N = _read_bf16(data).float()
        _check_finite(flat_N, encoding)
        return flat_N
    scale_S = _read_bf16(data[: 2 * count_scales(spec)]).float()
    _check_scales(scale_S, encoding)
    whole_N = torch.from_numpy(np.frombuffer(data, np.int8, offset=2 * len(scale_S)).copy())
    if encoding == "int4":
        halves_N = torch.stack(((whole_N << 4) >> 4, whole_N >> 4), dim=1).flatten()
        whole_N, left = halves_N[: spec.numel], halves_N[spec.numel :]
        if left.any():
            raise ValueError("the unused half of the last byte is not 0: these are not the bytes of an adapter in int4")
    if whole_N.numel() and whole_N.min() < -_LARGEST[encoding]:
        raise ValueError(f"a number is below {-_LARGEST[encoding]}: these are not the bytes of an adapter in {encoding}")
    flat_N = whole_N.float()
    for grid, x, scale in _tensors(spec, flat_N, scale_S):
        x.mul_(_spread(scale, grid))
    return flat_N


def _quantised(values_N: Tensor, spec: AdapterSpec, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Scales in bf16 and whole numbers in int8."""
    largest = _LARGEST[encoding]
    scale_S = values_N.new_empty(count_scales(spec), dtype=torch.bfloat16)
    whole_N = torch.empty_like(values_N, dtype=torch.int8)
    wholes = (whole for _, whole, _ in _tensors(spec, whole_N, scale_S))
    for (grid, x, scale), whole in zip(_tensors(spec, values_N, scale_S), wholes, strict=True):
        filled = torch.nn.functional.pad(x, (0, 0, 0, -grid.features % grid.size)) if grid.features % grid.size else x
        most = filled.unflatten(2, (grid.groups, grid.size)).abs().amax(dim=3)
        nearest = (most / (largest + 0.5)).bfloat16()
        too_small = nearest.float() * (largest + 0.5) < most  # exact: 8 bits times 8
        up = (nearest.view(torch.int16) + too_small).view(torch.bfloat16)
        scale.copy_(up)
        divisor = up.float().masked_fill_(most == 0, 1.0)
        whole.copy_((x / _spread(divisor, grid)).round_().clamp_(-largest, largest))
    return scale_S, whole_N


def _tensors(spec: AdapterSpec, values_N: Tensor, scale_S: Tensor) -> Iterator[tuple[Grid, Tensor, Tensor]]:
    """Views of each tensor over equal layers, `[layers, outer, features, inner]`, and of its scales, with groups for features."""
    for run in runs(spec):
        numels, scales = [grid.numel for grid in run.grids], [grid.scales for grid in run.grids]
        here, values_N = values_N.split([run.layers * sum(numels), len(values_N) - run.layers * sum(numels)])
        here_S, scale_S = scale_S.split([run.layers * sum(scales), len(scale_S) - run.layers * sum(scales)])
        parts = here.view(run.layers, -1).split(numels, dim=1), here_S.view(run.layers, -1).split(scales, dim=1)
        for grid, part, part_S in zip(run.grids, *parts, strict=True):
            yield grid, part.unflatten(1, grid), part_S.unflatten(1, (grid.outer, grid.groups, grid.inner))


def _spread(scale: Tensor, grid: Grid) -> Tensor:
    """Each group's scale at each of its features."""
    return scale.repeat_interleave(grid.size, dim=2)[:, :, : grid.features]


def _to_bytes(values: Tensor) -> bytes:
    numbers = values.numpy()
    return numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()


def _read_bf16(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16)


def _check_scales(scale_S: Tensor, encoding: Encoding) -> None:
    if scale_S.numel() and not bool(((scale_S >= 0) & (scale_S * _LARGEST[encoding]).isfinite()).all()):
        raise ValueError(f"a scale is below 0 or reaches numbers that are not finite in {encoding}: refused")


def _check_finite(values_N: Tensor, encoding: Encoding) -> None:
    if not values_N.numel() or torch.stack(torch.aminmax(values_N)).isfinite().all():  # one pass: extremes carry NaN on
        return
    bad_N = values_N.isfinite().logical_not()
    raise ValueError(f"{int(bad_N.sum())} numbers are not finite in {encoding}, the first at {int(bad_N.nonzero()[0])}: refused")
