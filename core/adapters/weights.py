"""B adapters of one kind under one spec: what `LoraWeights` and `GatedMemory` share.

In: a spec and vectors `flat_BN` under it. Out: their tensors, the same adapters padded, picked or moved, and `attach`, which runs
a base under them. Knows nothing of what an adapter computes.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.spec import AdapterSpec, Kind


@dataclass(frozen=True, eq=False)
class AdapterWeights(ABC):
    """B adapters of one kind under one spec. `flat_BN` may carry gradient."""

    kind: ClassVar[Kind]

    spec: AdapterSpec
    flat_BN: Tensor

    def __post_init__(self) -> None:
        if self.spec.kind != self.kind:
            raise ValueError(f"{type(self).__name__} holds adapters of kind {self.kind}: these are of kind {self.spec.kind}")
        if self.flat_BN.ndim != 2 or self.flat_BN.shape[1] != self.spec.numel:
            raise ValueError(f"flat_BN has shape {tuple(self.flat_BN.shape)}: this spec wants [B, {self.spec.numel}]")

    @cached_property
    def tensors(self) -> dict[tuple[int, str, str], Tensor]:
        """Views `[B, ...]` of every tensor, by (layer, site, tensor)."""
        return self.spec.split(self.flat_BN)

    def __len__(self) -> int:
        return self.flat_BN.shape[0]

    def select(self, index: Tensor | slice) -> Self:
        """The adapters at `index`, in that order."""
        return type(self)(self.spec, self.flat_BN[index])

    def detach(self) -> Self:
        return type(self)(self.spec, self.flat_BN.detach())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.spec, self.flat_BN.to(device=device, dtype=dtype))

    def padded(self, rank: int) -> Self:
        """The same adapters at a larger rank; exact."""
        return self.padded_to(self.spec.with_rank(rank))

    def padded_to(self, spec: AdapterSpec) -> Self:
        """The same adapters under a spec of larger rank or more sites; exact.

        Zero columns of A and W1, zero rows of B and W2, zeros at the sites and biases that are new.
        """
        if spec == self.spec:
            return self
        if spec.rank < self.spec.rank:
            raise ValueError(f"cannot pad rank {self.spec.rank} down to {spec.rank}: use recompress, which reports its error")
        if not spec.has_sites_of(self.spec):
            raise ValueError("adapters can be padded to more sites, never to fewer or others: these are of another kind or base")
        extra = spec.rank - self.spec.rank
        columns, rows = (0, extra), (0, 0, 0, extra)
        pads = {"A": columns, "W1": columns, "B": rows, "W2": rows}
        tensors = {
            entry[:3]: self.flat_BN.new_zeros(len(self), *entry.shape)
            if entry[:3] not in self.tensors
            else torch.nn.functional.pad(self.tensors[entry[:3]], pads.get(entry.tensor, ()))
            for entry in spec.table
        }
        return type(self)(spec, spec.join(tensors))

    @abstractmethod
    def attach(self, base: BaseModel, index_B: Tensor | None = None) -> AbstractContextManager[None]:
        """Inside, `base` runs under these adapters: row b under adapter `index_B[b]`, -1 for none.

        Without `index_B`, row b runs under adapter b, or all rows under the only adapter. Contexts may be nested. Backward may
        run after the context has been left, with gradient checkpointing too. Holds for the current thread only. Raises
        `ValueError` for adapters of another base's shape or device, for an index out of range, and in the base's forward for a
        wrong number of rows.
        """
