"""What LIFT trains for a document: the flat vector of one adapter, where it starts, and what is stored of it in the end.

A `Form` is LoRA, PiSSA or Gated Memory under one spec for one base. In: a base, `AdapterSettings`, a generator of random
numbers, an adapter to start from. Out: `flat_N` to train, a context that lets rows of a batch run under many such vectors at
once, and the adapter that is stored. The base is never copied or changed. Knows nothing of documents, losses and optimisers.

PiSSA (arXiv 2404.02948) trains the principal singular vectors A0 B0 = top of W^T and freezes the rest of W. Here W stays whole
and -A0 B0 is attached beside A B: the same function, one frozen adapter for all documents. Stored is the difference, at twice
the rank. Its start costs one SVD a linear, once for a base.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import GatedMemory, Initialisation, initial
from core.adapters.lora import LoraWeights, compose, compose_groups, recompress
from core.adapters.spec import SITES, AdapterSpec, Kind
from core.adapters.weights import AdapterWeights
from core.config import Section

DEFAULT_RANK = 128
EXACT_SVD_FEATURES = 1024


class AdapterSettings(Section):
    """What is trained.

    rank: None is 128, for PiSSA no more than the smallest linear holds; a gated memory's is its width, None twice the head size.
    scale: alpha/r of a LoRA, folded into B when the adapter is stored. gate: how a gated memory starts.
    """

    kind: Literal["lora", "pissa", "gated_memory"] = "lora"
    rank: PositiveInt | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0
    sites: Annotated[tuple[str, ...], Field(min_length=1)] = SITES
    gate: Initialisation = "identity"

    @model_validator(mode="after")
    def _fits(self) -> "AdapterSettings":
        if self.kind != "lora" and self.scale != 1:
            raise ValueError(f"scale is {self.scale} and kind {self.kind}: only a lora can be scaled")
        return self


class Form(ABC):
    """How vectors of `spec` act on a base while they are trained."""

    kind: ClassVar[Kind]
    spec: AdapterSpec

    @property
    def stored_spec(self) -> AdapterSpec:
        """The table of what `stored` gives."""
        return self.spec

    @abstractmethod
    def initial(self, generator: torch.Generator, start: AdapterWeights | None = None) -> Tensor:
        """`[N]` fp32 on the CPU. start: adapters whose sum is trained on. Raises `ValueError` for one that does not fit."""

    @abstractmethod
    def attach(self, flat_BN: Tensor, index_B: Tensor | None) -> AbstractContextManager[None]:
        """As `AdapterWeights.attach`, for vectors in training."""

    @abstractmethod
    def stored(self, flat_BN: Tensor) -> AdapterWeights:
        """The adapters as they are stored and served, without gradient."""


class LoraForm(Form):
    """A random (uniform within 1/sqrt(I), PEFT's way), B zero; `scale` acts on B."""

    kind = "lora"

    def __init__(self, base: BaseModel, settings: AdapterSettings) -> None:
        self._base = base
        self.spec = base.spec(settings.rank or DEFAULT_RANK, settings.sites)
        self._gain_N: Tensor | None = None
        if settings.scale != 1:
            gains = [torch.full((entry.numel,), 1.0 if entry.tensor == "A" else settings.scale) for entry in self.spec.table]
            self._gain_N = torch.cat(gains).to(base.device)

    def initial(self, generator: torch.Generator, start: AdapterWeights | None = None) -> Tensor:
        tensors: dict[tuple[int, str, str], Tensor] = {}
        given = {} if start is None else self._reduced(start).tensors
        for layer, site, tensor, shape, _ in self.spec.table:
            value = torch.zeros(1, *shape)
            if tensor == "A":
                value.uniform_(-1, 1, generator=generator).div_(math.sqrt(shape[0]))
            known = given.pop((layer, site, tensor), None)
            if known is not None:
                used = known.shape[1:]
                value[:, : used[0], : used[1]] = known
            tensors[layer, site, tensor] = value
        if given:
            raise ValueError(f"the adapter to start from has sites that LIFT's has not ({next(iter(given))}): train them too")
        flat_N = self.spec.join(tensors)[0]
        return flat_N if self._gain_N is None else flat_N / self._gain_N.cpu()

    def _reduced(self, start: AdapterWeights) -> LoraWeights:
        """The sum of the given adapters at no more than the spec's rank, fp32 on the CPU."""
        if not isinstance(start, LoraWeights) or not len(start):
            raise ValueError(f"cannot start from {len(start)} adapters of kind {start.spec.kind}: give one or more of kind lora")
        whole = compose_groups(start.detach().to("cpu", torch.float32), [len(start)], "sum")
        return whole if whole.spec.rank <= self.spec.rank else recompress(whole, self.spec.rank)[0]

    def attach(self, flat_BN: Tensor, index_B: Tensor | None) -> AbstractContextManager[None]:
        return self._weights(flat_BN).attach(self._base, index_B)

    def stored(self, flat_BN: Tensor) -> AdapterWeights:
        return self._weights(flat_BN.detach().clone())

    def _weights(self, flat_BN: Tensor) -> LoraWeights:
        return LoraWeights(self.spec, flat_BN if self._gain_N is None else flat_BN * self._gain_N)


class PissaForm(Form):
    """A and B start as the principal singular vectors of W, singular values shared evenly; the delta starts at zero."""

    kind = "lora"

    def __init__(self, base: BaseModel, settings: AdapterSettings) -> None:
        self._base = base
        shapes = base.spec(1, settings.sites).layers
        most = min(min(site.in_features, site.out_features) for sites in shapes for site in sites)
        rank = settings.rank or min(DEFAULT_RANK, most)
        if rank > most:
            raise ValueError(f"rank is {rank}, but the smallest linear has {most} singular vectors: give {most} or less")
        self.spec = base.spec(rank, settings.sites)
        self._start = LoraWeights(self.spec, self._principal())
        negated = {key: -value if key[2] == "B" else value for key, value in self._start.tensors.items()}
        self._removed = LoraWeights(self.spec, self.spec.join(negated))

    @property
    def stored_spec(self) -> AdapterSpec:
        return self.spec.with_rank(2 * self.spec.rank)

    @torch.no_grad()
    def _principal(self) -> Tensor:
        tensors = {}
        for layer, site, tensor, _, _ in self.spec.table:
            if tensor == "A":
                u_IR, s_R, v_OR = _top(self._base.linears[layer, site].weight.mT, self.spec.rank)
                root_R = s_R.sqrt()
                tensors[layer, site, "A"] = (u_IR * root_R)[None]
                tensors[layer, site, "B"] = (v_OR * root_R).mT[None]
        return self.spec.join(tensors)

    def initial(self, generator: torch.Generator, start: AdapterWeights | None = None) -> Tensor:
        if start is not None:
            raise ValueError("PiSSA starts from the base's own singular vectors: to start from an adapter, train a lora")
        return self._start.flat_BN[0].cpu()

    @contextmanager
    def attach(self, flat_BN: Tensor, index_B: Tensor | None) -> Iterator[None]:
        removed = self._removed.to(dtype=flat_BN.dtype)
        nowhere = None if index_B is None else torch.where(index_B < 0, -1, 0)
        with removed.attach(self._base, nowhere), LoraWeights(self.spec, flat_BN).attach(self._base, index_B):
            yield

    def stored(self, flat_BN: Tensor) -> AdapterWeights:
        trained = LoraWeights(self.spec, flat_BN.detach())
        removed = LoraWeights(self.spec, self._removed.flat_BN.to(flat_BN.dtype).expand(len(flat_BN), -1))
        return compose([trained, removed])


def _top(w_IO: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values of a linear's weight, with vectors `[I, R]` and `[O, R]`; fp32, or fp64 where W is.

    Exact up to `EXACT_SVD_FEATURES`, randomised above, four power iterations (PiSSA, section 4) from a fixed seed.
    """
    w_IO = w_IO.to(torch.promote_types(w_IO.dtype, torch.float32))
    if min(w_IO.shape) <= EXACT_SVD_FEATURES:
        u_IR, s_R, v_RO = torch.linalg.svd(w_IO, full_matrices=False)
        return u_IR[:, :rank], s_R[:rank], v_RO[:rank].mT
    with torch.random.fork_rng(devices=[w_IO.device] if w_IO.is_cuda else []):
        torch.manual_seed(0)
        u_IR, s_R, v_OR = torch.svd_lowrank(w_IO, q=min(rank + 16, *w_IO.shape), niter=4)
    return u_IR[:, :rank], s_R[:rank], v_OR[:, :rank]


class GatedMemoryForm(Form):
    """A gated memory as `core.adapters.gated_memory.initial` makes it."""

    kind = "gated_memory"

    def __init__(self, base: BaseModel, settings: AdapterSettings) -> None:
        self._base, self._settings = base, settings
        self.spec = self._new(torch.Generator()).spec

    def _new(self, generator: torch.Generator) -> GatedMemory:
        return initial(self._base, self._settings.gate, generator, width=self._settings.rank)

    def initial(self, generator: torch.Generator, start: AdapterWeights | None = None) -> Tensor:
        if start is None:
            return self._new(generator).flat_BN[0].cpu()
        if start.spec != self.spec or len(start) != 1:
            raise ValueError(f"cannot start from {len(start)} adapters of kind {start.spec.kind}: give one memory of this shape")
        return start.flat_BN[0].detach().cpu().float()

    def attach(self, flat_BN: Tensor, index_B: Tensor | None) -> AbstractContextManager[None]:
        return GatedMemory(self.spec, flat_BN).attach(self._base, index_B)

    def stored(self, flat_BN: Tensor) -> AdapterWeights:
        return GatedMemory(self.spec, flat_BN.detach().clone())


def form_of(base: BaseModel, settings: AdapterSettings) -> Form:
    """The form that the settings name, for this base."""
    match settings.kind:
        case "lora":
            return LoraForm(base, settings)
        case "pissa":
            return PissaForm(base, settings)
        case "gated_memory":
            return GatedMemoryForm(base, settings)
