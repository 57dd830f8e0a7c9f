"""What an adapter is: a table of tensors and one flat vector that holds them all.

`AdapterSpec` is the table (layer, site, tensor, shape, offset). Everything that makes, stores, ships or attaches adapters
speaks of a spec and of vectors `flat_BN` under it. The order is SHINE's (paper, section 3; github MuLabPKU/SHINE): layer by
layer, q, k, v, o, gate, up, down, in each A before B, row-major; C, a generated bias, comes last where the spec has one.
No alpha: any alpha/r is folded into B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

from torch import Tensor

from core.config import digest

SITES = ("q", "k", "v", "o", "gate", "up", "down")
Kind = Literal["lora"]


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
    """A linear that an adapter changes: y = x W^T, x of `in_features`, y of `out_features`; `bias` asks for a generated C."""

    site: str
    in_features: int
    out_features: int
    bias: bool = False


@dataclass(frozen=True)
class AdapterSpec:
    """The tensor table of a LoRA of one rank over the sites of a base.

    `layers[l]` lists the sites of decoder layer l in the order of `SITES`; layers may differ in shape.
    """

    layers: tuple[tuple[SiteShape, ...], ...]
    rank: int
    kind: Kind = "lora"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: give 1 or more")
        for layer, sites in enumerate(self.layers):
            names = [site.site for site in sites]
            if unknown := set(names) - set(SITES):
                raise ValueError(f"layer {layer} names unknown sites {sorted(unknown)}: known are {', '.join(SITES)}")
            if names != sorted(set(names), key=SITES.index):
                raise ValueError(f"layer {layer} lists its sites as {names}: list each once, in the order {', '.join(SITES)}")

    @cached_property
    def table(self) -> tuple[Entry, ...]:
        """The K entries in storage order."""
        entries, offset = [], 0
        for layer, sites in enumerate(self.layers):
            for site, in_features, out_features, bias in sites:
                tensors: list[tuple[str, tuple[int, ...]]] = [("A", (in_features, self.rank)), ("B", (self.rank, out_features))]
                if bias:
                    tensors.append(("C", (out_features,)))
                for tensor, shape in tensors:
                    entry = Entry(layer, site, tensor, shape, offset)
                    entries.append(entry)
                    offset += entry.numel
        return tuple(entries)

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

    def split(self, flat_BN: Tensor) -> dict[tuple[int, str, str], Tensor]:
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

    def with_rank(self, rank: int) -> "AdapterSpec":
        """The same sites at another rank."""
        return AdapterSpec(self.layers, rank, self.kind)

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; runs of equal layers are written once."""
        runs: list[dict[str, Any]] = []
        for sites in self.layers:
            shapes = [list(site) for site in sites]
            if runs and runs[-1]["sites"] == shapes:
                runs[-1]["count"] += 1
            else:
                runs.append({"count": 1, "sites": shapes})
        return {"kind": self.kind, "rank": self.rank, "layers": runs}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterSpec":
        """Reads what `to_json` wrote; raises `ValueError` for anything else."""
        try:
            if value["kind"] != "lora":
                raise ValueError(f"adapter kind {value['kind']!r} is not known: this version knows 'lora'")
            layers: list[tuple[SiteShape, ...]] = []
            for run in value["layers"]:
                sites = tuple(SiteShape(str(s), int(i), int(o), bool(c)) for s, i, o, c in run["sites"])
                layers.extend([sites] * int(run["count"]))
            return cls(tuple(layers), int(value["rank"]), value["kind"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an adapter spec: {error!r}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the table."""
        return digest(self.to_json())


def common_spec(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """The spec that adapters of several ranks are padded to: the same sites, the largest rank."""
    if not specs:
        raise ValueError("no adapters were given: give one or more")
    if len({spec.layers for spec in specs}) != 1:
        raise ValueError("adapters of different sites cannot share a batch: they were made for different bases")
    return specs[0].with_rank(max(spec.rank for spec in specs))
