"""How many bytes an adapter takes in each encoding, and where its numbers and scales lie. `core.adapters.codec` makes the bytes.

    fp32, bf16    N numbers in the order of the spec's table
    int8, int4    S scales in bf16, then N whole numbers: a byte each, or two in a byte

A scale belongs to `GROUP` features of one tensor that follow each other, at one rank; features are the axis before the last of A,
W1 and V, and the last axis of B, C, W2 and w. Bytes a number: 4, 2, 1 + 2/64, 1/2 + 2/64.

Imports no torch, so that whoever only counts adapters need not wait for it.
"""

from functools import lru_cache
from itertools import groupby
from math import prod
from typing import Literal, NamedTuple, get_args

from core.adapters.spec import AdapterSpec, Entry

Encoding = Literal["fp32", "bf16", "int8", "int4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
GROUP = 64

_FEATURES_BEFORE_LAST = ("A", "W1", "V")


class Grid(NamedTuple):
    """A tensor as `[outer, features, inner]`; groups of `size` features share a scale."""

    outer: int
    features: int
    inner: int

    @property
    def numel(self) -> int:
        return prod(self)

    @property
    def size(self) -> int:
        return min(GROUP, self.features)

    @property
    def groups(self) -> int:
        return -(-self.features // GROUP)

    @property
    def scales(self) -> int:
        return self.outer * self.groups * self.inner


class Run(NamedTuple):
    """Equal layers in a row, and the tensors of one of them."""

    layers: int
    grids: tuple[Grid, ...]


def encoded_bytes(spec: AdapterSpec, encoding: Encoding) -> int:
    """Bytes of an adapter; `ValueError` for an unknown encoding."""
    check_known(encoding)
    if encoding == "fp32":
        return 4 * spec.numel
    if encoding == "bf16":
        return 2 * spec.numel
    return 2 * count_scales(spec) + (spec.numel if encoding == "int8" else -(-spec.numel // 2))


def check_known(encoding: str) -> None:
    """Raises `ValueError` for an unknown encoding."""
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding {encoding!r} is not known: this version knows {', '.join(ENCODINGS)}")


@lru_cache(maxsize=64)
def runs(spec: AdapterSpec) -> tuple[Run, ...]:
    """The spec's tensors, equal layers together, in the order of its table."""
    of_layer = {layer: tuple(map(_grid, entries)) for layer, entries in groupby(spec.table, key=lambda entry: entry.layer)}
    return tuple(Run(len(list(layers)), grids) for grids, layers in groupby(of_layer.values()))


def _grid(entry: Entry) -> Grid:
    at = len(entry.shape) - (2 if entry.tensor in _FEATURES_BEFORE_LAST else 1)
    return Grid(prod(entry.shape[:at]), entry.shape[at], prod(entry.shape[at + 1 :]))


def count_scales(spec: AdapterSpec) -> int:
    """S, the scales of an adapter in int8 or int4."""
    return sum(run.layers * grid.scales for run in runs(spec) for grid in run.grids)
