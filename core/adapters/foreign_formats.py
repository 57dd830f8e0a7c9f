"""Other people's files: PEFT adapters in and out, released SHINE checkpoints in.

PEFT: `adapter_config.json` and `adapter_model.safetensors`; A is stored transposed to `[R, I]`, B to `[O, R]`, lora_alpha = r, so
any scale is folded into B. SHINE (github MuLabPKU/SHINE): pickled tensors, read with `weights_only=True` and nothing else; this
is the only place in the project that opens a pickle at all.
"""

import json
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, check_fits
from core.adapters.spec import SITES, AdapterSpec

PEFT_PREFIX = "base_model.model."
# Fields of a LoraConfig that leave y = x W^T + (x A) B as it is. Any other field that is set makes another kind of adapter.
PEFT_NEUTRAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "init_lora_weights", "runtime_config", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
    *("eva_config", "ensure_weight_tying"),
}
# Other ways to initialise (PiSSA, OLoRA, LoftQ...) also change the base's weights.
PEFT_INITIALISED = (None, True, False, "gaussian", "eva", "orthogonal")


def write_peft(directory: str | Path, base: BaseModel, weights: LoraWeights) -> None:
    """Writes one adapter as the two files that `peft.PeftModel.from_pretrained` reads.

    weights: exactly one adapter, in the type to be stored. Linears whose factors are all zero are left out, unless all are.
    Raises `ValueError` for several adapters, for one of another base, or for a generated bias, which PEFT has no place for.
    """
    check_fits(base, weights.spec)
    if len(weights) != 1:
        raise ValueError(f"PEFT's files hold one adapter, {len(weights)} were given: select one")
    if any(entry.tensor == "C" for entry in weights.spec.table):
        raise ValueError("PEFT cannot hold a generated bias: train with generated_bias = false to export")
    linears = [(layer, shape.site) for layer, shapes in enumerate(weights.spec.layers) for shape in shapes]
    changed = [linear for linear in linears if any(bool(factor.any()) for factor in weights.factors(*linear))] or linears
    tensors = {}
    for layer, site in changed:
        for tensor, factor in zip("AB", weights.factors(layer, site), strict=True):
            name = f"{PEFT_PREFIX}{base.linear_names[layer, site]}.lora_{tensor}.weight"
            tensors[name] = factor[0].detach().cpu().T.contiguous()
    sites = [site for site in SITES if site in {site for _, site in changed}]
    everywhere = len(changed) == len(sites) * len(base.layers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model.config._name_or_path or None,
        "r": weights.spec.rank,
        "lora_alpha": weights.spec.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{site}_proj" for site in sites] if everywhere else [base.linear_names[linear] for linear in changed],
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_peft(directory: str | Path, base: BaseModel) -> LoraWeights:
    """Reads a PEFT LoRA for `base` as one adapter, on the base's device; alpha/r (alpha/sqrt(r) with rsLoRA) is folded into B.

    The stored type is kept where nothing has to be folded in, otherwise fp32. Linears that the adapter leaves out get zeros.
    Raises `ValueError` for what a plain LoRA cannot express and for every name or shape that does not fit the base.
    """
    directory = Path(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}: give a directory that PEFT saved with safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory} holds a {config.get('peft_type')} adapter: only LORA can be read")
    if unsupported := sorted(key for key, value in config.items() if value and key not in PEFT_NEUTRAL):
        raise ValueError(f"{directory} uses {', '.join(unsupported)}: only a plain LoRA of one rank can be read")
    if config.get("init_lora_weights") not in PEFT_INITIALISED:
        raise ValueError(
            f"{directory} was initialised by {config['init_lora_weights']}, which changes the base too: convert it to a plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{directory} trained biases of the base: only bias = none can be read")
    if missing := {"r", "lora_alpha"} - config.keys():
        raise ValueError(f"{directory}/adapter_config.json lacks {', '.join(sorted(missing))}: save the adapter with PEFT")
    rank = int(config["r"])
    factor = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    names = {
        f"{PEFT_PREFIX}{name}.lora_{tensor}.weight": (layer, site, tensor)
        for (layer, site), name in base.linear_names.items()
        for tensor in "AB"
    }
    stored = load_file(directory / "adapter_model.safetensors")
    if unknown := sorted(stored.keys() - names.keys()):
        raise ValueError(
            f"{directory} changes what this base does not have or Imprint does not adapt, such as {', '.join(unknown[:3])}: "
            f"give the base it was trained for, and adapters of {', '.join(SITES)} only"
        )
    found = {names[name]: tensor for name, tensor in stored.items()}
    with_a, with_b = ({(layer, site) for layer, site, tensor in found if tensor == factor_name} for factor_name in "AB")
    if halves := sorted(base.linear_names[linear] for linear in with_a ^ with_b):
        raise ValueError(f"{directory} has only one factor of {', '.join(halves[:3])}: save the adapter again")
    spec = base.spec(rank)
    dtype = torch.float32 if factor != 1 or not found else next(iter(found.values())).dtype
    parts = []
    for entry in spec.table:
        tensor = found.get((entry.layer, entry.site, entry.tensor))
        if tensor is None:
            parts.append(torch.zeros(entry.numel, dtype=dtype))
            continue
        if tensor.T.shape != entry.shape:
            raise ValueError(
                f"{base.linear_names[entry.layer, entry.site]}.lora_{entry.tensor} is {tuple(tensor.shape)}, r and the base want "
                f"{entry.shape[::-1]}: give the base it was trained for"
            )
        parts.append((tensor.to(dtype) * factor if entry.tensor == "B" else tensor.to(dtype)).T.flatten())
    return LoraWeights(spec, torch.cat(parts)[None].to(base.device))


def read_shine_release(directory: Path, meta_spec: AdapterSpec) -> tuple[dict[str, Tensor], int]:
    """A released directory's tensors, named as in `Hypernetwork.state_dict`, and the additional Meta LoRA's rank (0: none)."""
    memory = _safe_pickle(directory / "mem_tokens.pt")
    network = _safe_pickle(directory / "metanetwork.pth")
    tensors = {"memory_MH": memory.detach().float()}
    tensors |= {f"m2p.{name}": value.detach().float() for name, value in network.items()}
    tensors["meta_1N"] = _meta_lora(directory / "metalora.pth", meta_spec)
    additional = directory / "ift_additional_metalora.pth"
    if not additional.exists():
        return tensors, 0
    nested = _safe_pickle(additional)
    rank = int(nested[0]["attention"]["q"]["A"].shape[-1])
    tensors["additional_meta_1N"] = _meta_lora(additional, meta_spec.with_rank(rank))
    return tensors, rank


def _safe_pickle(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a SHINE directory holds mem_tokens.pt, metanetwork.pth and metalora.pth")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path} holds more than tensors: not opened (weights_only); give the released file") from None


def _meta_lora(path: Path, spec: AdapterSpec) -> Tensor:
    """`[1, N]` from SHINE's nesting: layer -> attention | mlp -> module -> A `[1, I, R]`, B `[1, R, O]`, C (None)."""
    nested = _safe_pickle(path)
    if len(nested) != len(spec.layers):
        raise ValueError(f"{path} has {len(nested)} layers, the base {len(spec.layers)}: give the base it was trained for")
    parts = []
    for entry in spec.table:
        group = "mlp" if entry.site in ("gate", "up", "down") else "attention"
        leaf = nested[entry.layer][group][entry.site]
        if leaf.get("C") is not None:
            raise ValueError(f"{path} has a bias in layer {entry.layer} {entry.site}: released Meta LoRAs have none")
        tensor = leaf[entry.tensor].detach().float()
        if tuple(tensor.shape) != (1, *entry.shape):
            raise ValueError(
                f"{path}: layer {entry.layer} {entry.site}.{entry.tensor} is {tuple(tensor.shape)}, "
                f"the settings and the base want {(1, *entry.shape)}: is meta_rank right?"
            )
        parts.append(tensor.flatten())
    return torch.cat(parts)[None]
