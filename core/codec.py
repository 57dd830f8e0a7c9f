"""Adapter vectors to bytes and back.

In: a flat vector of N finite numbers. Out: N little-endian numbers with nothing around them, so that a ranged read of a blob is
the vector. Knows nothing of specs, files or hashes; never unpickles. Cost: one cast and one copy.
"""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Encoding = Literal["fp32", "bf16"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

_BYTES = {"fp32": 4, "bf16": 2}


def encoded_bytes(numel: int, encoding: Encoding) -> int:
    """Bytes of `numel` encoded numbers; `ValueError` for an unknown encoding."""
    if encoding not in _BYTES:
        raise ValueError(f"encoding {encoding!r} is not known: this version knows {', '.join(ENCODINGS)}")
    return numel * _BYTES[encoding]


def encode(flat_N: Tensor, encoding: Encoding) -> bytes:
    """The bytes of a vector of any float type, on any device; bf16 is a plain cast, rounding to nearest even.

    Raises `ValueError` for another shape, for an unknown encoding, and where a number is not finite or does not stay so.
    """
    encoded_bytes(0, encoding)
    if flat_N.ndim != 1 or not flat_N.is_floating_point():
        raise ValueError(f"expected a flat vector of floats, got shape {tuple(flat_N.shape)} of {flat_N.dtype}")
    values_N = flat_N.detach().to("cpu", torch.float32 if encoding == "fp32" else torch.bfloat16)
    _check_finite(values_N, encoding)
    if encoding == "fp32":
        return values_N.numpy().astype("<f4", copy=False).tobytes()
    return values_N.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def decode(data: bytes, numel: int, encoding: Encoding) -> Tensor:
    """The vector `[numel]`, fp32, that `encode` wrote, in memory of its own.

    Raises `ValueError` for an unknown encoding, another number of bytes, and numbers that are not finite.
    """
    expected = encoded_bytes(numel, encoding)
    if len(data) != expected:
        raise ValueError(f"{numel} numbers in {encoding} are {expected} bytes, not {len(data)}: another spec or a cut blob")
    if encoding == "fp32":
        flat_N = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    else:
        flat_N = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16).float()
    _check_finite(flat_N, encoding)
    return flat_N


def _check_finite(values_N: Tensor, encoding: Encoding) -> None:
    if not values_N.numel() or torch.stack(torch.aminmax(values_N)).isfinite().all():  # one pass: extremes carry NaN on
        return
    bad_N = values_N.isfinite().logical_not()
    raise ValueError(f"{int(bad_N.sum())} numbers are not finite in {encoding}, the first at {int(bad_N.nonzero()[0])}: refused")
