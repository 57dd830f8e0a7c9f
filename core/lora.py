"""LoRA adapters as one flat vector each: attach many at once to one frozen base, compose, re-compress.

`LoraWeights` is B adapters under one `AdapterSpec`. `attach` lets the rows of a batch run under different adapters: row b under
adapter `index_B[b]`, or none. At one linear: y = x W^T + (x A) B + C, with no alpha. The base is never copied or changed; the
cost is two batched matrix products a linear, 2 T R (I + O) multiply-adds a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.adapter import AdapterSpec, common_spec
from core.base_model import BaseModel


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """B adapters under one spec. `flat_BN` may carry gradient."""

    spec: AdapterSpec
    flat_BN: Tensor

    def __post_init__(self) -> None:
        if self.flat_BN.ndim != 2 or self.flat_BN.shape[1] != self.spec.numel:
            raise ValueError(f"flat_BN has shape {tuple(self.flat_BN.shape)}: this spec wants [B, {self.spec.numel}]")

    @cached_property
    def tensors(self) -> dict[tuple[int, str, str], Tensor]:
        """Views `[B, ...]` of every tensor, by (layer, site, tensor)."""
        return self.spec.split(self.flat_BN)

    def __len__(self) -> int:
        return self.flat_BN.shape[0]

    def factors(self, layer: int, module: str) -> tuple[Tensor, Tensor]:
        """`(a_BIR, b_BRO)` of one linear; module is one of q, k, v, o, gate, up, down."""
        try:
            return self.tensors[layer, module, "A"], self.tensors[layer, module, "B"]
        except KeyError:
            raise ValueError(f"this adapter has no linear {module!r} in layer {layer}") from None

    def select(self, index: Tensor | slice) -> "LoraWeights":
        """The adapters at `index`, in that order."""
        return LoraWeights(self.spec, self.flat_BN[index])

    def detach(self) -> "LoraWeights":
        return LoraWeights(self.spec, self.flat_BN.detach())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "LoraWeights":
        return LoraWeights(self.spec, self.flat_BN.to(device=device, dtype=dtype))

    def padded(self, rank: int) -> "LoraWeights":
        """The same adapters at a larger rank: zero columns of A, zero rows of B; exact."""
        if rank < self.spec.rank:
            raise ValueError(f"cannot pad rank {self.spec.rank} down to {rank}: use recompress, which reports its error")
        if rank == self.spec.rank:
            return self
        extra = rank - self.spec.rank
        pads = {"A": (0, extra), "B": (0, 0, 0, extra), "C": ()}
        return _pack(
            self.spec.with_rank(rank), {key: torch.nn.functional.pad(t, pads[key[2]]) for key, t in self.tensors.items()}
        )


def _pack(spec: AdapterSpec, tensors: dict[tuple[int, str, str], Tensor]) -> LoraWeights:
    return LoraWeights(spec, torch.cat([tensors[e.layer, e.site, e.tensor].flatten(1) for e in spec.table], dim=1))


def stack(parts: Sequence[LoraWeights]) -> LoraWeights:
    """All adapters of `parts` as one batch, padded to their largest rank."""
    spec = common_spec([part.spec for part in parts])
    return LoraWeights(spec, torch.cat([part.padded(spec.rank).flat_BN for part in parts]))


def compose(parts: Sequence[LoraWeights]) -> LoraWeights:
    """The sum of the deltas, row by row: ranks are concatenated, A and B are never averaged (spec of SHINE, section 4.10)."""
    spec = common_spec([part.spec for part in parts]).with_rank(sum(part.spec.rank for part in parts))
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"cannot add {' and '.join(str(len(part)) for part in parts)} adapters row by row: give equally many of each"
        )
    tensors = {}
    for entry in spec.table:
        values = [part.tensors[entry.layer, entry.site, entry.tensor] for part in parts]
        if entry.tensor == "C":
            tensors[entry.layer, entry.site, "C"] = torch.stack(values).sum(dim=0)
        else:
            tensors[entry.layer, entry.site, entry.tensor] = torch.cat(values, dim=2 if entry.tensor == "A" else 1)
    return _pack(spec, tensors)


@torch.no_grad()
def recompress(weights: LoraWeights, rank: int) -> tuple[LoraWeights, Tensor]:
    """The best adapters of `rank` for the same deltas (truncated SVD of every A B), and what that costs.

    Returns the weights and `error_B`, the Frobenius norm of what was lost over that of the whole delta, all linears together. The
    singular values are shared evenly between A and B; C stays as it is. Works in fp32 on the R x R core left by two QR
    decompositions, so no I x O matrix is formed. Carries no gradient.
    """
    spec = weights.spec.with_rank(rank)
    tensors = {}
    lost_B = torch.zeros(len(weights), dtype=torch.float64)
    total_B = torch.zeros(len(weights), dtype=torch.float64)
    for (layer, site, tensor), value in weights.tensors.items():
        if tensor == "C":
            tensors[layer, site, "C"] = value
        elif tensor == "A":
            q_a, r_a = torch.linalg.qr(value.float())
            q_b, r_b = torch.linalg.qr(weights.tensors[layer, site, "B"].float().transpose(1, 2))
            u, s_BR, v = torch.linalg.svd(r_a @ r_b.transpose(1, 2), full_matrices=False)
            lost_B += s_BR[:, rank:].double().square().sum(dim=1).cpu()
            total_B += s_BR.double().square().sum(dim=1).cpu()
            tensors.update(_balanced(layer, site, q_a @ u, s_BR, v @ q_b.transpose(1, 2), rank))
    packed = _pack(spec, {key: t.to(weights.flat_BN.dtype) for key, t in tensors.items()})
    return packed, torch.where(total_B > 0, lost_B / total_B, 0.0).sqrt()


def _balanced(layer: int, site: str, u_BIR: Tensor, s_BR: Tensor, v_BRO: Tensor, rank: int) -> dict[tuple[int, str, str], Tensor]:
    """A = U sqrt(S), B = sqrt(S) V, cut or zero-padded to `rank`."""
    root = s_BR[:, :rank].sqrt()
    a_BIR = u_BIR[:, :, :rank] * root[:, None, :]
    b_BRO = root[:, :, None] * v_BRO[:, :rank]
    missing = rank - root.shape[1]
    return {
        (layer, site, "A"): torch.nn.functional.pad(a_BIR, (0, missing)),
        (layer, site, "B"): torch.nn.functional.pad(b_BRO, (0, 0, 0, missing)),
    }


@torch.no_grad()
def mean_adapter(weights: LoraWeights, rank: int) -> tuple[LoraWeights, float]:
    """One adapter whose delta is the mean of all B deltas, at `rank`, and the relative error of that cut.

    Concatenates the B ranks and cuts them: exact with `rank` >= min(B R, I, O) at every linear.
    """
    count = len(weights)
    if not count:
        raise ValueError("no adapters were given: give one or more")
    tensors = {}
    for (layer, site, tensor), value in weights.tensors.items():
        if tensor == "A":
            tensors[layer, site, "A"] = value.float().transpose(0, 1).flatten(1)[None]
        elif tensor == "B":
            tensors[layer, site, "B"] = value.float().flatten(0, 1)[None] / count
        else:
            tensors[layer, site, "C"] = value.float().mean(dim=0, keepdim=True)
    mean, error_B = recompress(_pack(weights.spec.with_rank(count * weights.spec.rank), tensors), rank)
    return mean.to(dtype=weights.flat_BN.dtype), error_B.item()


@torch.no_grad()
def gram(weights: LoraWeights) -> Tensor:
    """`[B, B]` inner products of the deltas, all linears together, in fp64 and without forming a delta."""
    total_BB = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for (layer, site, tensor), value in weights.tensors.items():
        if tensor == "A":
            a, b = value.double(), weights.tensors[layer, site, "B"].double()
            total_BB += torch.einsum(
                "pqrs,pqrs->pq", torch.einsum("pir,qis->pqrs", a, a), torch.einsum("pro,qso->pqrs", b, b)
            ).cpu()
    return total_BB


class _LoraAttachment:
    """Applies B adapters to the rows of a batch."""

    def __init__(self, weights: LoraWeights, index_B: Tensor | None) -> None:
        self._tensors = weights.tensors
        self._count = len(weights)
        self._index_B: Tensor | None = None
        self._has_adapter_B11: Tensor | None = None
        if index_B is not None:
            missing = index_B < 0
            self._index_B = index_B.clamp_min(0)
            if missing.all():
                self._tensors = {}
            elif missing.any():
                self._has_adapter_B11 = ~missing[:, None, None]

    def apply(self, layer: int, site: str, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        if self._index_B is not None and len(self._index_B) != len(x_BTI):
            raise ValueError(
                f"index_B names adapters for {len(self._index_B)} rows, the batch has {len(x_BTI)}: give one index for each"
            )
        a_BIR = self._tensors.get((layer, site, "A"))
        if a_BIR is None:
            return y_BTO
        b_BRO = self._tensors[layer, site, "B"]
        c_BO = self._tensors.get((layer, site, "C"))
        if self._index_B is not None:
            a_BIR, b_BRO = a_BIR.index_select(0, self._index_B), b_BRO.index_select(0, self._index_B)
            c_BO = None if c_BO is None else c_BO.index_select(0, self._index_B)
        elif self._count == 1:
            a_BIR, b_BRO = a_BIR[0], b_BRO[0]
        elif self._count != x_BTI.shape[0]:
            raise ValueError(f"{self._count} adapters for {x_BTI.shape[0]} rows: pass index_B, which names each row's adapter")
        delta_BTO = (x_BTI @ a_BIR.to(x_BTI.dtype)) @ b_BRO.to(x_BTI.dtype)
        if c_BO is not None:
            delta_BTO = delta_BTO + c_BO[:, None].to(delta_BTO.dtype)
        if self._has_adapter_B11 is not None:
            delta_BTO = torch.where(self._has_adapter_B11, delta_BTO, 0.0)
        return y_BTO + delta_BTO


def check_fits(base: BaseModel, spec: AdapterSpec) -> None:
    """Raises `ValueError` where an adapter of `spec` was made for a base of another shape."""
    if len(spec.layers) != len(base.layers):
        raise ValueError(f"this adapter was made for another base: it has {len(spec.layers)} layers, the base {len(base.layers)}")
    for layer, sites in enumerate(spec.layers):
        for site, in_features, out_features, _ in sites:
            linear = base.linears[layer, site]
            if (linear.in_features, linear.out_features) != (in_features, out_features):
                raise ValueError(
                    f"this adapter was made for another base: layer {layer} {site} is not {in_features} -> {out_features} here"
                )


@contextmanager
def attach(base: BaseModel, weights: LoraWeights, index_B: Tensor | None = None) -> Iterator[None]:
    """Inside, `base` runs under `weights`: row b under adapter `index_B[b]`, -1 for none.

    Without `index_B`, row b runs under adapter b, or all rows under the only adapter. Contexts may be nested: deltas add up.
    Backward may run after the context has been left, with gradient checkpointing too. Holds for the current thread only. Raises
    `ValueError` for adapters of another base's shape or device, for an index out of range, and in the base's forward for a wrong
    number of rows.
    """
    check_fits(base, weights.spec)
    if weights.flat_BN.device != base.device:
        raise ValueError(
            f"the adapters are on {weights.flat_BN.device}, the base on {base.device}: move them with weights.to(base.device)"
        )
    if index_B is not None:
        if index_B.ndim != 1 or index_B.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"index_B is {index_B.dtype} of shape {tuple(index_B.shape)}: give one integer for each row")
        if len(index_B) and not -1 <= int(index_B.min()) <= int(index_B.max()) < len(weights):
            raise ValueError(
                f"index_B holds {index_B.tolist()}: there are {len(weights)} adapters, count them from 0, -1 is none"
            )
        index_B = index_B.to(base.device)
    with base.active.only((*base.active.stack, _LoraAttachment(weights, index_B))):
        yield
