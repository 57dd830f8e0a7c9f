"""What an adapter is: a table of tensors and one flat vector that holds them all.

`AdapterSpec` is the table (layer, site, tensor, shape, offset). Everything that makes, stores, ships or attaches adapters
speaks of a spec and of vectors `flat_BN` under it (`core.adapters.weights`), of either kind:

- lora: the order is SHINE's (paper, section 3; github MuLabPKU/SHINE): layer by layer, q, k, v, o, gate, up, down, in each A
  before B, row-major; C, a generated bias, comes last where the spec has one. No alpha: any alpha/r is folded into B.
- gated_memory (LIFT, arXiv 2502.14644 v3): layer by layer W1, W2, V, w of the attention's query heads. The rank is the width of
  the memory; the gate's is floor(sqrt(head_dim)).

Imports no torch, so that whoever only lists adapters need not wait for it; `split` and `join` work on tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from core.config import digest

if TYPE_CHECKING:
    from torch import Tensor

SITES = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = "attention"
MAX_LAYERS = 4096
Kind = Literal["lora", "gated_memory"]
Gate = Literal["shifted", "released"]


class Entry(NamedTuple):
    """One tensor of an adapter: `flat[offset : offset + prod(shape)]`."""

    layer: int
    site: str
    tensor: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class SiteShape(NamedTuple):
    """A linear that an adapter changes: y = x W^T, x of `in_features`, y of `out_features`; `bias` asks for a generated C.

    The site "attention" of a gated memory: `in_features` is the head size, `out_features` counts the query heads.
    """

    site: str
    in_features: int
    out_features: int
    bias: bool = False


@dataclass(frozen=True)
class AdapterSpec:
    """The tensor table of an adapter of one rank over the sites of a base.

    `layers[l]` lists the sites of decoder layer l in the order of `SITES`; layers may differ in shape. A gated memory has the
    site "attention" in every layer, its rank is the memory's width, and `gate` names the gate's formula
    (core.adapters.gated_memory).
    """

    layers: tuple[tuple[SiteShape, ...], ...]
    rank: int
    kind: Kind = "lora"
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: give 1 or more")
        if self.kind not in get_args(Kind):
            raise ValueError(f"adapter kind {self.kind!r} is not known: this version knows {', '.join(get_args(Kind))}")
        gates = get_args(Gate) if self.kind == "gated_memory" else (None,)
        if self.gate not in gates:
            raise ValueError(f"an adapter of kind {self.kind} has the gate {self.gate!r}: give {' or '.join(map(str, gates))}")
        for layer, sites in enumerate(self.layers):
            self._check(layer, sites)

    def _check(self, layer: int, sites: tuple[SiteShape, ...]) -> None:
        names = [site.site for site in sites]
        known = SITES if self.kind == "lora" else (ATTENTION,)
        if unknown := set(names) - set(known):
            raise ValueError(f"layer {layer} names unknown sites {sorted(unknown)}: known are {', '.join(known)}")
        if names != sorted(set(names), key=known.index):
            raise ValueError(f"layer {layer} lists its sites as {names}: list each once, in the order {', '.join(known)}")
        if min((min(site.in_features, site.out_features) for site in sites), default=1) < 1:
            raise ValueError(f"layer {layer} has a site without features: give 1 or more")
        if self.kind == "gated_memory" and [site.bias for site in sites] != [False]:
            raise ValueError(f"layer {layer} of a gated memory must have the one site {ATTENTION!r}, without bias")

    @cached_property
    def table(self) -> tuple[Entry, ...]:
        """The K entries in storage order."""
        entries, offset = [], 0
        for layer, sites in enumerate(self.layers):
            for site in sites:
                for tensor, shape in self._tensors(site):
                    entry = Entry(layer, site.site, tensor, shape, offset)
                    entries.append(entry)
                    offset += entry.numel
        return tuple(entries)

    def _tensors(self, site: SiteShape) -> list[tuple[str, tuple[int, ...]]]:
        if self.kind == "gated_memory":
            head_size, heads, gate_width = site.in_features, site.out_features, isqrt(site.in_features)
            return [
                ("W1", (heads, head_size, self.rank)),
                ("W2", (heads, self.rank, head_size)),
                ("V", (heads, head_size, gate_width)),
                ("w", (heads, gate_width)),
            ]
        bias = [("C", (site.out_features,))] if site.bias else []
        return [("A", (site.in_features, self.rank)), ("B", (self.rank, site.out_features)), *bias]

    @cached_property
    def numel(self) -> int:
        """N, the numbers of one adapter."""
        return sum(entry.numel for entry in self.table)

    @cached_property
    def layer_numel(self) -> tuple[int, ...]:
        """Numbers of each layer, which lie together."""
        sizes = [0] * len(self.layers)
        for entry in self.table:
            sizes[entry.layer] += entry.numel
        return tuple(sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [entry.numel for entry in self.table]

    def split(self, flat_BN: "Tensor") -> "dict[tuple[int, str, str], Tensor]":
        """Views `[B, *shape]` of every tensor, by (layer, site, tensor).

        One `split`, so that its backward is one concatenation: slices taken one by one would each fill a whole vector of zeros.
        """
        if flat_BN.ndim != 2 or flat_BN.shape[1] != self.numel:
            raise ValueError(f"flat_BN has shape {tuple(flat_BN.shape)}: this spec wants [B, {self.numel}]")
        parts = flat_BN.split(self._sizes, dim=1)
        return {
            (entry.layer, entry.site, entry.tensor): part.unflatten(1, entry.shape)
            for entry, part in zip(self.table, parts, strict=True)
        }

    def join(self, tensors: "Mapping[tuple[int, str, str], Tensor]") -> "Tensor":
        """`flat_BN` of tensors `[B, *shape]`: what `split` undoes."""
        import torch

        return torch.cat([tensors[entry.layer, entry.site, entry.tensor].flatten(1) for entry in self.table], dim=1)

    def with_rank(self, rank: int) -> "AdapterSpec":
        """The same sites at another rank."""
        return replace(self, rank=rank)

    def has_sites_of(self, other: "AdapterSpec") -> bool:
        """Whether each site of `other`, with its bias, is here in the same shape: `padded_to` takes it, but for the rank."""
        if self.kind_name != other.kind_name or len(self.layers) != len(other.layers):
            return False
        pairs = zip(self.layers, other.layers, strict=True)
        return all(set(theirs) <= {*own, *(site._replace(bias=False) for site in own)} for own, theirs in pairs)

    @property
    def kind_name(self) -> str:
        """The kind as people read it, with its gate."""
        return self.kind if self.gate is None else f"{self.kind} ({self.gate} gate)"

    @property
    def zeros_change_nothing(self) -> bool:
        """Whether a vector of zeros is the same as no adapter; the released gate is open by 0.047 at zero."""
        return self.gate != "released"

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; runs of equal layers are written once."""
        runs: list[dict[str, Any]] = []
        for sites in self.layers:
            shapes = [list(site) for site in sites]
            if runs and runs[-1]["sites"] == shapes:
                runs[-1]["count"] += 1
            else:
                runs.append({"count": 1, "sites": shapes})
        gate = {} if self.gate is None else {"gate": self.gate}
        return {"kind": self.kind, "rank": self.rank, "layers": runs, **gate}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterSpec":
        """Reads what `to_json` wrote; raises `ValueError` for anything else."""
        try:
            layers: list[tuple[SiteShape, ...]] = []
            for run in value["layers"]:
                sites = tuple(SiteShape(str(s), int(i), int(o), bool(c)) for s, i, o, c in run["sites"])
                count = int(run["count"])
                if not 1 <= count <= MAX_LAYERS - len(layers):
                    raise ValueError(f"an adapter spec counts {count} equal layers: it may have 1 to {MAX_LAYERS} in all")
                layers.extend([sites] * count)
            return cls(tuple(layers), int(value["rank"]), value["kind"], value.get("gate"))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not an adapter spec: {error!r}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the table."""
        return digest(self.to_json())


def common_spec(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """The spec that adapters of several ranks and sites are padded to: every site and bias of theirs, the largest rank."""
    if not specs:
        raise ValueError("no adapters were given: give one or more")
    if len(kinds := {spec.kind_name for spec in specs}) != 1:
        raise ValueError(f"adapters of kinds {' and '.join(sorted(kinds))} cannot share a batch: run them one kind at a time")
    if len({len(spec.layers) for spec in specs}) != 1:
        raise ValueError("adapters of different depth cannot share a batch: they were made for different bases")
    layers = [_all_sites(layer) for layer in zip(*(spec.layers for spec in specs), strict=True)]
    return replace(specs[0], layers=tuple(layers), rank=max(spec.rank for spec in specs))


def _all_sites(layers: Iterable[tuple[SiteShape, ...]]) -> tuple[SiteShape, ...]:
    """The sites that any of several specs has in one layer, with a bias where one has it."""
    sites: dict[str, SiteShape] = {}
    for site in chain.from_iterable(layers):
        known = sites.setdefault(site.site, site)
        if known._replace(bias=site.bias) != site:
            raise ValueError("adapters of different shapes cannot share a batch: they were made for different bases")
        if site.bias:
            sites[site.site] = site
    return tuple(sites[name] for name in (*SITES, ATTENTION) if name in sites)
