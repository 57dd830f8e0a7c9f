"""Gated Memory: the second kind of adapter, which answers queries from weights beside attention (LIFT, arXiv 2502.14644 v3).

`GatedMemory` is B memories under one `AdapterSpec`, attached like LoRA: row b of a batch under memory `index_B[b]`, or none. For
each query head, on its query q before rotary embedding (after q_norm, and after any LoRA on q):

    m(q) = W2 SiLU(W1 q)        s(q) = w . SiLU(V q)        out = (1 - g) * attention + g * m(q), and then o_proj

    released   g = sigmoid(3 (s - 1)), which is 0.047 at s = 0: the released code's, for parity with it
    shifted    g = (sigmoid(3 (s - 1)) - sigmoid(-3)) / (1 - sigmoid(-3)), which is 0 at s = 0, -0.050 at least, 1 at most

With the shifted gate and w = 0, logits are bit for bit the base's, and gradients reach w first, then the rest. Weights are
applied from the right: W1 [heads, d, width], W2 [heads, width, d], V [heads, d, gate width], w [heads, gate width]. Keys, values
and the cache are not touched, and any implementation of attention will do. It does not know how memories are trained.
Cost at width 2 d: 4 d^2 multiply-adds a head and token, and as many numbers a head: an eighth of q_proj and 68.6 M in Llama-3-8B.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from core.adapters.base_model import Attachment, BaseModel
from core.adapters.lora import LoraWeights, Rows
from core.adapters.spec import ATTENTION, AdapterSpec, Gate, SiteShape
from core.adapters.weights import AdapterWeights

Initialisation = Literal["identity", "released"]
RELEASED_NAMES = {"W1": "mem_proj.0", "W2": "mem_proj.2", "V": "gate_proj.0", "w": "gate_proj.2"}


class GatedMemory(AdapterWeights):
    """B memories under one spec."""

    kind = "gated_memory"

    @classmethod
    def from_release(cls, base: BaseModel, tensors: Mapping[str, Tensor]) -> "GatedMemory":
        """One memory from the released code's state dict, its gate as released.

        tensors: under each layer's attention, by the base's own names, `mem_proj.0.weight` (W1), `mem_proj.2.weight` (W2),
        `gate_proj.0.weight` (V) and `gate_proj.2.weight` (w, `[heads, gate width, 1]`). Raises `ValueError` for a missing or
        further tensor, and for one of another shape than this base asks for.
        """
        names = {
            (layer, ATTENTION, tensor): f"{base.linear_names[layer, 'q'].removesuffix('q_proj')}{name}.weight"
            for layer in range(len(base.layers))
            for tensor, name in RELEASED_NAMES.items()
        }
        if wrong := sorted(set(names.values()) ^ set(tensors)):
            raise ValueError(f"these tensors are not those of a gated memory for this base: {wrong[0]} is missing or unknown")
        spec = memory_spec(base, width=tensors[names[0, ATTENTION, "W1"]].shape[-1], gate="released")
        parts = {}
        for entry in spec.table:
            name = names[entry[:3]]
            stored = tensors[name].squeeze(-1) if entry.tensor == "w" and tensors[name].ndim == 3 else tensors[name]
            if stored.shape != entry.shape:
                raise ValueError(f"{name} has shape {tuple(stored.shape)}: this base asks for {entry.shape}")
            parts[entry[:3]] = stored[None].to(base.device)
        return cls(spec, spec.join(parts))

    @contextmanager
    def attach(self, base: BaseModel, index_B: Tensor | None = None) -> Iterator[None]:
        """See `AdapterWeights.attach`. Nests with LoRA; of nested memories, the inner one mixes what the outer one gives."""
        attachment = _MemoryAttachment(base, self, Rows(base, self, index_B))
        with base.active.only((*base.active.stack, attachment)):
            yield


def weights_of(spec: AdapterSpec, flat_BN: Tensor) -> LoraWeights | GatedMemory:
    """Adapters of the kind that their spec names."""
    return LoraWeights(spec, flat_BN) if spec.kind == "lora" else GatedMemory(spec, flat_BN)


def memory_spec(base: BaseModel, width: int | None = None, gate: Gate = "shifted") -> AdapterSpec:
    """The table of memories for this base; the width is twice the head size by default. Raises as `attention_shape` does."""
    sites = [(SiteShape(ATTENTION, *base.attention_shape(layer)),) for layer in range(len(base.layers))]
    return AdapterSpec(tuple(sites), 2 * sites[0][0].in_features if width is None else width, "gated_memory", gate)


def initial(
    base: BaseModel,
    init: Initialisation = "identity",
    generator: torch.Generator | None = None,
    count: int = 1,
    width: int | None = None,
    gate: Gate | None = None,
) -> GatedMemory:
    """`count` untrained memories in fp32, each drawn anew.

    init: "identity" changes no logit: W1 and V are normal of variance 1 / fan-in, W2 and w zero, the gate is shifted. "released"
    is the released code's, uniform in +-1 / sqrt(inputs * outputs) for each tensor, by default with the released gate.
    """
    if init == "identity" and gate == "released":
        raise ValueError("the released gate is open by 0.047 at zero, so no init is the identity: choose the shifted gate")
    spec = memory_spec(base, width, gate or ("shifted" if init == "identity" else "released"))
    tensors = {}
    for entry in spec.table:
        shape = (count, *entry.shape)
        if init == "released":
            bound = (entry.numel / entry.shape[0]) ** -0.5
            tensors[entry[:3]] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        elif entry.tensor in ("W1", "V"):
            tensors[entry[:3]] = torch.randn(shape, generator=generator) * entry.shape[1] ** -0.5
        else:
            tensors[entry[:3]] = torch.zeros(shape)
    return GatedMemory(spec, spec.join(tensors).to(base.device))


def respond(tensors: Mapping[str, Tensor], gate: Gate, query_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    """What the memories hold for these queries, and the gate: `[B, T, heads, d]` in their type, `[B, T, heads]` in fp32 or more.

    tensors: W1, W2, V and w of a layer, `[B, heads, ...]`, or `[heads, ...]` where one memory serves all rows.
    """
    query_BHTD = query_BTHD.transpose(1, 2)
    w1, w2, v, w = (tensors[name].to(query_BTHD.dtype) for name in ("W1", "W2", "V", "w"))
    memory_BHTD = silu(query_BHTD @ w1) @ w2
    score_BHT = (silu(query_BHTD @ v) @ w[..., None])[..., 0]
    gate_BHT = _gate(gate, score_BHT.to(torch.promote_types(score_BHT.dtype, torch.float32)))
    return memory_BHTD.transpose(1, 2), gate_BHT.transpose(1, 2)


def _gate(gate: Gate, score: Tensor) -> Tensor:
    if gate == "released":
        return torch.sigmoid(3 * (score - 1))
    # sigmoid(z - 3) (1 - exp(-z)) with z = 3 s is the shifted gate in a form that rounds to 0 at 0; below -30 it is flat.
    z = (3 * score).clamp_min(-30)
    return -torch.expm1(-z) * torch.sigmoid(z - 3)


class _MemoryAttachment(Attachment):
    """Mixes B memories into the heads of the rows of a batch."""

    def __init__(self, base: BaseModel, memory: GatedMemory, rows: Rows) -> None:
        self._active = base.active
        self._memory = memory
        self._rows = rows

    def mix(self, layer: int, query: Tensor, heads_BTI: Tensor) -> Tensor:
        self._rows.check(len(heads_BTI))
        head_size, heads = self._memory.spec.layers[layer][0][1:3]
        shape = (*heads_BTI.shape[:2], heads, head_size)
        if query.shape not in (shape, heads_BTI.shape):
            raise ValueError(
                f"layer {layer} gives queries of shape {tuple(query.shape)} before rotary embedding: a gated memory needs {shape}"
            )
        if self._rows.all_bare:
            self._record(layer, heads_BTI.new_zeros(shape[:3]))
            return heads_BTI
        picked = {name: self._rows.pick(self._memory.tensors[layer, ATTENTION, name]) for name in RELEASED_NAMES}
        assert self._memory.spec.gate is not None
        memory_BTHD, gate_BTH = respond(picked, self._memory.spec.gate, query.view(shape))
        self._record(layer, self._rows.bare(gate_BTH, 0.0))
        mixed_BTHD = torch.lerp(heads_BTI.view(shape), memory_BTHD, gate_BTH[..., None].to(heads_BTI.dtype))
        return self._rows.bare(mixed_BTHD.flatten(2), heads_BTI)

    def _record(self, layer: int, gate_BTH: Tensor) -> None:
        if self._active.gates is not None:
            self._active.gates[layer] = gate_BTH


@dataclass(frozen=True)
class Gates:
    """The gates of a pass, of the innermost memory where several are attached. They carry gradient where the pass did."""

    layers: dict[int, Tensor] = field(default_factory=dict)

    @property
    def gates_BTLH(self) -> Tensor:
        """`[B, T, L, heads]` of the last pass; 0 in rows without a memory. Raises `ValueError` where no pass had one."""
        if not self.layers:
            raise ValueError("no gates were recorded: run the base inside both recording_gates(base) and memory.attach(base)")
        return torch.stack([self.layers[layer] for layer in sorted(self.layers)], dim=2)


@contextmanager
def recording_gates(base: BaseModel) -> Iterator[Gates]:
    """Keeps the gates of passes run inside, in this thread, under memories attached outside or inside of it.

    Under non-reentrant gradient checkpointing (`BaseModel.checkpointing`) the gates carry gradient, too.
    """
    before, gates = base.active.gates, Gates()
    base.active.gates = gates.layers
    try:
        yield gates
    finally:
        base.active.gates = before


def gate_means(gates_BTLH: Tensor, mask_BT: Tensor) -> Tensor:
    """`[L, heads]` mean gates over the tokens that the mask names, all rows together, in fp32."""
    _check_mask(gates_BTLH, mask_BT)
    return gates_BTLH.detach()[mask_BT.bool()].float().mean(dim=0)


def gate_penalty(gates_BTLH: Tensor, mask_BT: Tensor) -> Tensor:
    """`[B]` mean size of the gates over layers, heads and the tokens that the mask names; 0 in rows that it leaves empty.

    The size, not the gate: a shifted gate may fall to -0.05, and shall not be drawn there.
    """
    _check_mask(gates_BTLH, mask_BT)
    size_BT = gates_BTLH.abs().mean(dim=(2, 3))
    return torch.where(mask_BT.bool(), size_BT, 0.0).sum(dim=1) / mask_BT.bool().sum(dim=1).clamp_min(1)


def _check_mask(gates_BTLH: Tensor, mask_BT: Tensor) -> None:
    if gates_BTLH.shape[:2] != mask_BT.shape or not mask_BT.any():
        raise ValueError(
            f"the mask has shape {tuple(mask_BT.shape)} and names {int(mask_BT.bool().sum())} tokens: the gates are those of "
            f"{tuple(gates_BTLH.shape[:2])}, and one token at least must count"
        )
