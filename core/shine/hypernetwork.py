"""SHINE's hypernetwork: a document's tokens in, its LoRA out, in one forward pass (arXiv 2602.06358, section 3).

    ids [B, T] -> frozen base with Meta LoRA, M memory tokens after the document
               -> memory states [B, L, M, H], the residual stream after every layer at the memory positions
               -> M2P transformer, attending across layers and across memory tokens in turn
               -> flattened: the adapter

Trained are the memory embeddings, the Meta LoRA and the M2P transformer; the base is frozen and not part of the module. Knows
nothing of text, questions or losses. A pass costs the base's forward over T + M tokens plus M2P over L M positions; the base's
last norm and head are never computed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from core.adapters import weight_files
from core.adapters.base_model import BaseModel
from core.adapters.foreign_formats import read_shine_release
from core.adapters.identity import hash_tensors
from core.adapters.lora import Composition, LoraWeights, attach, compose
from core.adapters.spec import SITES, AdapterSpec
from core.config import Section, digest, faults

Positive = Annotated[int, Field(ge=1)]


class HypernetworkSettings(Section):
    """Shape and scale of a hypernetwork; the defaults of `input_norm` and `initial_delta` are the released behaviour.

    initial_delta: None multiplies the output by sqrt(scale), so the first delta's size depends on `scale` and on the base's
    shape. A number d instead starts every linear with ||x A B|| of about d ||x W^T||, whatever the base.

    composition: how the adapters of a document's windows become one, in training and where nothing else is asked for.
    """

    rank: Positive = 8
    meta_rank: Positive = 128
    additional_meta_rank: Annotated[int, Field(ge=0)] = 0
    num_layers: Annotated[int, Field(ge=2, multiple_of=2)] = 4
    num_heads: Positive = 32
    feed_forward: Positive = 8192
    scale: Annotated[float, Field(gt=0)] = 1e-3
    input_norm: Literal["none", "rms", "layer"] = "none"
    initial_delta: Annotated[float, Field(gt=0)] | None = None
    generated_bias: bool = False
    composition: Composition = "mean"
    sites: Annotated[tuple[str, ...], Field(min_length=1)] = SITES


class M2P(nn.Module):
    """Memory states to parameters: post-norm encoder layers over `[B, L, M, H]`, even ones across L, odd ones across M."""

    def __init__(self, num_base_layers: int, num_memory: int, hidden_size: int, settings: HypernetworkSettings) -> None:
        super().__init__()
        self.layer_pe = nn.Parameter(torch.zeros(num_base_layers, hidden_size))
        self.token_pe = nn.Parameter(torch.zeros(num_memory, hidden_size))
        self.input_norm: nn.Module = {
            "none": nn.Identity(),
            "rms": nn.RMSNorm(hidden_size, eps=1e-6),
            "layer": nn.LayerNorm(hidden_size),
        }[settings.input_norm]
        self.transformer_layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size,
                settings.num_heads,
                settings.feed_forward,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-5,
                batch_first=True,
            )
            for _ in range(settings.num_layers)
        )

    def forward(self, states_BLMH: Tensor) -> Tensor:
        """`[B, L, M, H]` to `[B, L, M, H]`."""
        x_BLMH = self.input_norm(states_BLMH) + self.layer_pe[:, None] + self.token_pe
        for number, layer in enumerate(self.transformer_layers):
            across_layers = number % 2 == 0
            x_BLMH = _attend(layer, x_BLMH.transpose(1, 2)).transpose(1, 2) if across_layers else _attend(layer, x_BLMH)
        return x_BLMH


def _attend(layer: nn.Module, x_BPSH: Tensor) -> Tensor:
    """Runs an encoder layer along the third axis, with the first two as its batch."""
    out: Tensor = layer(x_BPSH.flatten(0, 1))
    return out.unflatten(0, x_BPSH.shape[:2])


class Hypernetwork(nn.Module):
    """Writes adapters of `spec` for one base. Trainable state is fp32; the memory states are read in fp32.

    trained_tokens: the longest context of its training, padding included, None where nobody knows. It says how long a document
    may be to be read in one piece, and bears no identity.
    """

    gain_K: Tensor
    _numel_K: Tensor
    _has_one_gain: bool

    def __init__(self, base: BaseModel, settings: HypernetworkSettings, trained_tokens: int | None = None) -> None:
        super().__init__()
        if base.hidden_size % settings.num_heads:
            raise ValueError(f"num_heads {settings.num_heads} does not divide the base's hidden size {base.hidden_size}")
        self.base = base
        self.settings = settings
        self.trained_tokens = trained_tokens
        self.spec = base.spec(settings.rank, settings.sites, settings.generated_bias)
        self.meta_spec = base.spec(settings.meta_rank, settings.sites)
        num_memory = math.ceil(max(self.spec.layer_numel) / base.hidden_size)
        self.memory_MH = nn.Parameter(torch.randn(num_memory, base.hidden_size) * base.embedding.weight.float().std().cpu())
        self.meta_1N = nn.Parameter(initial_meta_lora(self.meta_spec, settings.scale))
        self.additional_meta_1N: nn.Parameter | None = None
        if settings.additional_meta_rank:
            additional = initial_meta_lora(self.additional_meta_spec, settings.scale)
            self.additional_meta_1N = nn.Parameter(additional)
            self.meta_1N.requires_grad_(False)
        self.m2p = M2P(len(base.layers), num_memory, base.hidden_size, settings)
        self.register_buffer("gain_K", initial_gains(self.spec, base, settings))
        self.register_buffer("_numel_K", torch.tensor([entry.numel for entry in self.spec.table]), persistent=False)
        self.register_load_state_dict_post_hook(_note_gains)
        _note_gains(self)
        self.to(base.device)

    @property
    def additional_meta_spec(self) -> AdapterSpec:
        return self.meta_spec.with_rank(self.settings.additional_meta_rank)

    @property
    def meta(self) -> LoraWeights:
        """The Meta LoRA, one adapter; joined along the rank with the additional one of instruction tuning, where there is one."""
        meta = LoraWeights(self.meta_spec, self.meta_1N)
        if self.additional_meta_1N is None:
            return meta
        return compose([meta, LoraWeights(self.additional_meta_spec, self.additional_meta_1N)])

    def memory_states(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """`[B, L, M, H]` fp32: every layer's output (before the last norm) at the memory positions.

        Documents are padded on the left, since the memory follows the last token; positions count from column 0, padding
        included. Only the Meta LoRA acts, whatever is attached outside. Masks are not looked into, which would wait for a GPU.
        """
        if ids_BT.shape != mask_BT.shape or ids_BT.ndim != 2:
            raise ValueError(f"ids_BT {tuple(ids_BT.shape)} and mask_BT {tuple(mask_BT.shape)} must be equal [B, T]")
        base, count = self.base, len(self.memory_MH)
        memory_BMH = self.memory_MH.to(base.dtype).expand(len(ids_BT), -1, -1)
        inputs_BTH = torch.cat([base.embedding(ids_BT), memory_BMH], dim=1)
        mask = torch.cat([mask_BT, mask_BT.new_ones(len(ids_BT), count)], dim=1)
        with base.active.only(()), attach(base, self.meta):
            return torch.stack(base.layer_outputs(inputs_BTH, mask, count), dim=1)

    def parameters_from_states(self, states_BLMH: Tensor) -> LoraWeights:
        """M2P and unpacking: layer by layer the first `spec.layer_numel[l]` numbers, times the gains; the tail is dropped."""
        plain_BLZ = self.m2p(states_BLMH).flatten(2)
        sizes = self.spec.layer_numel
        if len(set(sizes)) == 1:
            flat_BN = plain_BLZ[:, :, : sizes[0]].flatten(1)
        else:
            flat_BN = torch.cat(
                [row.split([size, row.shape[1] - size], dim=1)[0] for row, size in zip(plain_BLZ.unbind(1), sizes, strict=True)],
                1,
            )
        return LoraWeights(self.spec, flat_BN * self._gain_N())

    def generate(self, ids_BT: Tensor, mask_BT: Tensor) -> LoraWeights:
        """The adapters of B documents, in fp32; carries gradient where it is enabled.

        ids_BT, mask_BT: raw document tokens (no chat template), padded on the left; int64, on the base's device. Raises
        `ValueError` for other padding; `collate` pads so, and whoever trains on its batches calls the two steps by themselves.
        """
        if ids_BT.shape == mask_BT.shape and mask_BT.ndim == 2 and mask_BT.shape[1] and not bool(mask_BT[:, -1].all()):
            raise ValueError("documents must be padded on the left: every row of mask_BT ends with 1")
        return self.parameters_from_states(self.memory_states(ids_BT, mask_BT))

    forward = generate

    def _gain_N(self) -> Tensor:
        if self._has_one_gain:
            return self.gain_K[0]
        return self.gain_K.repeat_interleave(self._numel_K, output_size=self.spec.numel)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Trainable parameters for an optimiser; biases and norms are not decayed, position embeddings are (SHINE's way)."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (plain if name.endswith("bias") or "norm" in name else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of settings, weights and base: what a Producer records. `composition` acts later and is left out."""
        settings = self.settings.model_dump(mode="json", exclude={"composition"})
        weights = hash_tensors(self.state_dict().items())
        return digest({"settings": settings, "weights": weights, "base": self.base.fingerprint})

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `hypernetwork.safetensors` and `hypernetwork.json` (settings, `trained_tokens`, adapter table, base)."""
        tensors = {name: tensor if name == "gain_K" else tensor.to(dtype) for name, tensor in self.state_dict().items()}
        settings = self.settings.model_dump(mode="json")
        description = {"settings": settings, "trained_tokens": self.trained_tokens, "spec": self.spec.to_json()}
        weight_files.save("hypernetwork", tensors, description, self.base, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, base: BaseModel) -> Self:
        """Reads what `save` wrote. Raises `ValueError` for another base, another shape or a newer format."""
        tensors, description = weight_files.load("hypernetwork", base, Path(directory))
        hypernetwork = cls(base, _settings(description["settings"]), description.get("trained_tokens"))
        hypernetwork._load(tensors)
        return hypernetwork

    @classmethod
    def from_shine_release(
        cls, directory: str | Path, base: BaseModel, settings: HypernetworkSettings | Mapping[str, Any]
    ) -> Self:
        """Reads a directory that the released SHINE code wrote (mem_tokens, metanetwork, metalora, additional Meta LoRA).

        settings: rank, meta_rank, num_layers, num_heads, feed_forward, scale; the directory does not carry them. Raises
        `ValueError` where the files do not fit them or the base.
        """
        chosen = _settings(settings)
        meta_spec = base.spec(chosen.meta_rank, chosen.sites)
        tensors, additional_rank = read_shine_release(Path(directory), meta_spec)
        hypernetwork = cls(base, chosen.model_copy(update={"additional_meta_rank": additional_rank}))
        hypernetwork._load({**tensors, "gain_K": hypernetwork.gain_K.cpu()})
        return hypernetwork

    def _load(self, tensors: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if wrong := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(
                f"these tensors are missing or unknown: {', '.join(wrong)}: num_layers or input_norm is not what the file has"
            )
        if wrong := [
            f"{n} is {tuple(t.shape)}, not {tuple(own[n].shape)}" for n, t in tensors.items() if t.shape != own[n].shape
        ]:
            raise ValueError(f"the settings do not fit the file: {'; '.join(wrong[:4])}")
        self.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def _note_gains(hypernetwork: Hypernetwork, *_: Any) -> None:
    """Whether all gains are equal: found once, since a look into a tensor waits for a GPU."""
    hypernetwork._has_one_gain = bool((hypernetwork.gain_K == hypernetwork.gain_K[0]).all())


def _settings(values: HypernetworkSettings | Mapping[str, Any]) -> HypernetworkSettings:
    if isinstance(values, HypernetworkSettings):
        return values
    try:
        return HypernetworkSettings.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(f"hypernetwork settings are not valid: {'; '.join(faults(error))}") from None


def initial_meta_lora(spec: AdapterSpec, scale: float) -> Tensor:
    """`[1, N]`: A ~ N(0, 1) sqrt(scale), B = 0."""
    parts = [torch.randn(e.numel) * math.sqrt(scale) if e.tensor == "A" else torch.zeros(e.numel) for e in spec.table]
    return torch.cat(parts)[None]


def initial_gains(spec: AdapterSpec, base: BaseModel, settings: HypernetworkSettings) -> Tensor:
    """`[K]` factors between M2P's unit-variance output and the adapter's tensors.

    Released: sqrt(scale) for A and B, scale for C. With `initial_delta` d: A gets 1 / sqrt(I), so x A is as large as x, and B
    gets d ||W||_F / sqrt(O R), so x A B is d times as large as x W^T for isotropic x; C gets d ||W||_F / sqrt(O).
    """
    gains = []
    for entry in spec.table:
        if settings.initial_delta is None:
            gains.append(settings.scale if entry.tensor == "C" else math.sqrt(settings.scale))
        elif entry.tensor == "A":
            gains.append(1 / math.sqrt(entry.shape[0]))
        else:
            weight = base.linears[entry.layer, entry.site].weight.float()
            rank = spec.rank if entry.tensor == "B" else 1
            gains.append(settings.initial_delta * weight.norm().item() / math.sqrt(weight.shape[0] * rank))
    return torch.tensor(gains)
