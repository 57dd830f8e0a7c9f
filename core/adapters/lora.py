"""LoRA adapters as one flat vector each: attach many at once to one frozen base, compose, re-compress.

`LoraWeights` is B adapters under one `AdapterSpec`. `attach` lets the rows of a batch run under different adapters: row b under
adapter `index_B[b]`, or none. At one linear: y = x W^T + (x A) B + C, with no alpha. The base is never copied or changed
(`merged`, for saving a base of its own, does both for a while); the cost is two batched matrix products a linear,
2 T R (I + O) multiply-adds a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor

from core.adapters.base_model import Attachment, BaseModel
from core.adapters.spec import ATTENTION, AdapterSpec, common_spec
from core.adapters.weights import AdapterWeights

WeightsT = TypeVar("WeightsT", bound=AdapterWeights)


class LoraWeights(AdapterWeights):
    """B LoRA adapters under one spec."""

    kind = "lora"

    def factors(self, layer: int, module: str) -> tuple[Tensor, Tensor]:
        """`(a_BIR, b_BRO)` of one linear; module is one of q, k, v, o, gate, up, down."""
        try:
            return self.tensors[layer, module, "A"], self.tensors[layer, module, "B"]
        except KeyError:
            raise ValueError(f"this adapter has no linear {module!r} in layer {layer}") from None

    @contextmanager
    def attach(self, base: BaseModel, index_B: Tensor | None = None) -> Iterator[None]:
        """See `AdapterWeights.attach`. Deltas of nested contexts add up."""
        with base.active.only((*base.active.stack, _LoraAttachment(self, Rows(base, self, index_B)))):
            yield


def _pack(spec: AdapterSpec, tensors: dict[tuple[int, str, str], Tensor]) -> LoraWeights:
    return LoraWeights(spec, spec.join(tensors))


def stack(parts: Sequence[WeightsT]) -> WeightsT:
    """All adapters of `parts`, of one kind, as one batch, padded to their largest rank and to all their sites."""
    spec = common_spec([part.spec for part in parts])
    return type(parts[0])(spec, torch.cat([part.padded_to(spec).flat_BN for part in parts]))


def compose(parts: Sequence[LoraWeights]) -> LoraWeights:
    """The sum of the deltas, row by row: ranks are concatenated, A and B are never averaged (spec of SHINE, section 4.10)."""
    sites = common_spec([part.spec for part in parts])
    spec = sites.with_rank(sum(part.spec.rank for part in parts))
    parts = [part.padded_to(sites.with_rank(part.spec.rank)) for part in parts]
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


Composition = Literal["mean", "sum"]


def compose_groups(weights: LoraWeights, sizes: Sequence[int], composition: Composition) -> LoraWeights:
    """One adapter for each of `len(sizes)` groups of neighbours: the first `sizes[0]` adapters, the next `sizes[1]`, and so on.

    Exact and differentiable: ranks are concatenated, to the largest group's times the rank, zeros where a group is smaller. The
    delta of a group is the sum of its members' deltas, or their mean.
    """
    if sum(sizes) != len(weights) or min(sizes, default=0) < 1:
        raise ValueError(f"groups of {', '.join(map(str, sizes))} do not divide {len(weights)} adapters: each takes 1 or more")
    most = max(sizes)
    if most == 1:
        return weights
    device = weights.flat_BN.device
    sizes_G = torch.tensor(sizes, device=device)
    group_B = torch.arange(len(sizes), device=device).repeat_interleave(sizes_G, output_size=len(weights))
    place_B = group_B * most + torch.arange(len(weights), device=device) - (sizes_G.cumsum(0) - sizes_G)[group_B]
    padded_BN = weights.flat_BN.new_zeros(len(sizes) * most, weights.spec.numel).index_copy(0, place_B, weights.flat_BN)
    tensors = {}
    for key, value in LoraWeights(weights.spec, padded_BN).tensors.items():
        members = value.unflatten(0, (len(sizes), most))
        if key[2] == "A":
            tensors[key] = members.transpose(1, 2).flatten(2)
            continue
        if composition == "mean":
            members = members / sizes_G.view(-1, *[1] * (members.ndim - 1))
        tensors[key] = members.flatten(1, 2) if key[2] == "B" else members.sum(dim=1)
    return _pack(weights.spec.with_rank(most * weights.spec.rank), tensors)


@torch.no_grad()
def composed(weights: LoraWeights, composition: Composition, rank: int) -> tuple[LoraWeights, float]:
    """B adapters as one of `rank` at most, and the relative error of the cut: the mean of their deltas, or the sum.

    Exact with `rank` >= min(B R, I, O) at every linear.
    """
    if not len(weights):
        raise ValueError("no adapters were given: give one or more")
    if len(weights) == 1 and weights.spec.rank <= rank:
        return weights, 0.0
    whole = compose_groups(weights.to(dtype=torch.float32), [len(weights)], composition)
    cut, error_B = recompress(whole, min(rank, whole.spec.rank))
    return cut.to(dtype=weights.flat_BN.dtype), error_B.item()


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


class Rows:
    """Which adapter each row of a batch runs under: adapter `index_B[b]`, -1 for none, as `AdapterWeights.attach` says.

    Raises `ValueError` for adapters of another base's shape or device, and for an index out of range.
    """

    def __init__(self, base: BaseModel, weights: AdapterWeights, index_B: Tensor | None) -> None:
        check_fits(base, weights.spec)
        if weights.flat_BN.device != base.device:
            raise ValueError(
                f"the adapters are on {weights.flat_BN.device}, the base on {base.device}: move them with weights.to(base.device)"
            )
        self._adapters = len(weights)
        self._rows: int | None = None
        self._index_B: Tensor | None = None
        self._has_adapter_B: Tensor | None = None
        self.all_bare = False
        self.grouped = False
        """Whether every adapter serves equally many rows that stand together, in order: then nothing needs to be picked."""
        if index_B is None:
            return
        if index_B.ndim != 1 or index_B.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"index_B is {index_B.dtype} of shape {tuple(index_B.shape)}: give one integer for each row")
        indices = index_B.tolist()
        if any(not -1 <= index < len(weights) for index in indices):
            raise ValueError(f"index_B holds {indices}: there are {len(weights)} adapters, count them from 0, -1 is none")
        self._rows = len(indices)
        self.all_bare = all(index < 0 for index in indices)
        if min(indices, default=0) < 0:
            self._has_adapter_B = (index_B >= 0).to(base.device)
        in_place = len(indices) == len(weights) and all(index in (-1, row) for row, index in enumerate(indices))
        self._index_B = None if in_place else index_B.clamp_min(0).to(base.device)
        share = len(indices) // max(len(weights), 1)
        self.grouped = share > 1 and indices == [row // share for row in range(share * len(weights))]

    def check(self, rows: int) -> None:
        """Raises `ValueError` where a batch of `rows` is not the one that was spoken of."""
        if self._rows is not None and rows != self._rows:
            raise ValueError(f"index_B names adapters for {self._rows} rows, the batch has {rows}: give one index for each")
        if self._rows is None and self._adapters not in (1, rows):
            raise ValueError(f"{self._adapters} adapters for {rows} rows: pass index_B, which names each row's adapter")

    def pick(self, tensor: Tensor) -> Tensor:
        """`[rows, ...]` of each adapter's tensor `[B, ...]`; `[...]` where one adapter serves all rows."""
        if self._rows is None:
            return tensor[0] if self._adapters == 1 else tensor
        return tensor if self._index_B is None else tensor.index_select(0, self._index_B)

    @property
    def all_adapted(self) -> bool:
        """Whether no row is without an adapter."""
        return self._has_adapter_B is None

    def bare(self, changed: Tensor, otherwise: Tensor | float) -> Tensor:
        """`changed` `[rows, ...]`, and `otherwise` in the rows without an adapter."""
        if self._has_adapter_B is None:
            return changed
        return torch.where(self._has_adapter_B.view(-1, *[1] * (changed.ndim - 1)), changed, otherwise)


class _LoraAttachment(Attachment):
    """Applies B adapters to the rows of a batch."""

    def __init__(self, weights: LoraWeights, rows: Rows) -> None:
        self._tensors = {} if rows.all_bare else weights.tensors
        self._rows = rows

    def apply(self, layer: int, site: str, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        self._rows.check(len(x_BTI))
        a_BIR = self._tensors.get((layer, site, "A"))
        if a_BIR is None:
            return y_BTO
        b_BRO, c_BO = self._tensors[layer, site, "B"], self._tensors.get((layer, site, "C"))
        if self._rows.grouped:
            x_BTI = x_BTI.reshape(len(a_BIR), -1, x_BTI.shape[-1])
        else:
            a_BIR, b_BRO = self._rows.pick(a_BIR), self._rows.pick(b_BRO)
            c_BO = None if c_BO is None else self._rows.pick(c_BO)
        a_BIR, b_BRO = a_BIR.to(x_BTI.dtype), b_BRO.to(x_BTI.dtype)
        if a_BIR.ndim == 2 and c_BO is None and self._rows.all_adapted and _adds_in_place(y_BTO):
            y_BTO.view(-1, y_BTO.shape[-1]).addmm_(x_BTI.reshape(-1, x_BTI.shape[-1]) @ a_BIR, b_BRO)
            return y_BTO
        delta_BTO = (x_BTI @ a_BIR) @ b_BRO
        if c_BO is not None:
            delta_BTO = delta_BTO + c_BO.unsqueeze(-2).to(delta_BTO.dtype)
        return y_BTO + self._rows.bare(delta_BTO.view(y_BTO.shape), 0.0)


def _adds_in_place(y_BTO: Tensor) -> bool:
    """Whether a delta may be added by the product that makes it, which spares two passes over the output.

    Only in fp32, where that gives the very numbers of product and sum at ranks from 2 to some hundreds, and at others one
    rounding less; and where no gradient is taken, for the linear's own output is overwritten.
    """
    return y_BTO.dtype == torch.float32 and y_BTO.is_contiguous() and not torch.is_grad_enabled()


def check_fits(base: BaseModel, spec: AdapterSpec) -> None:
    """Raises `ValueError` where an adapter of `spec`, of either kind, was made for a base of another shape."""
    if len(spec.layers) != len(base.layers):
        raise ValueError(f"this adapter was made for another base: it has {len(spec.layers)} layers, the base {len(base.layers)}")
    for layer, sites in enumerate(spec.layers):
        for site, in_features, out_features, _ in sites:
            shape = base.attention_shape(layer) if site == ATTENTION else base.linear_shape(layer, site)
            if shape != (in_features, out_features):
                raise ValueError(
                    f"this adapter was made for another base: layer {layer} {site} is not {in_features} -> {out_features} here"
                )


def attach(base: BaseModel, weights: AdapterWeights, index_B: Tensor | None = None) -> AbstractContextManager[None]:
    """Inside, `base` runs under `weights`, of either kind, as `AdapterWeights.attach` promises."""
    return weights.attach(base, index_B)


@contextmanager
def merged(base: BaseModel, weights: LoraWeights) -> Iterator[None]:
    """Inside, the base's linears hold the one adapter's delta, for saving a base of its own; afterwards they are what they were.

    The sum is made in fp32 (fp64 on an fp64 base) and rounded to the base's type. Holds for all threads. Raises `ValueError` for
    several adapters, for one of another base's shape and for one with a generated bias.
    """
    check_fits(base, weights.spec)
    if len(weights) != 1:
        raise ValueError(f"{len(weights)} adapters cannot be merged into one base: compose them first, or give one")
    if any(tensor == "C" for _, _, tensor in weights.tensors):
        raise ValueError("an adapter with a generated bias cannot be merged: this base's linears may have no bias to add it to")
    before = {key: linear.weight.data for key, linear in base.linears.items()}
    try:
        with torch.no_grad():
            for (layer, site), weight in before.items():
                if (layer, site, "A") in weights.tensors:
                    a_BIR, b_BRO = weights.factors(layer, site)
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    delta_OI = (a_BIR[0].to(wide) @ b_BRO[0].to(wide)).mT
                    base.linears[layer, site].weight.data = (weight.to(wide) + delta_OI).to(weight.dtype)
        yield
    finally:
        for key, weight in before.items():
            base.linears[key].weight.data = weight
