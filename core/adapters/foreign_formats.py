"""Other people's files: PEFT adapters in and out, released SHINE checkpoints in.

PEFT: `adapter_config.json` and `adapter_model.safetensors`; A is stored transposed to `[R, I]`, B to `[O, R]`, lora_alpha = r, so
any scale is folded into B. PEFT's files name their base; those that are written here also hold its fingerprint. SHINE (github
MuLabPKU/SHINE): pickled tensors, read with `weights_only=True` and nothing else; this is the only place in the project that opens
a pickle at all.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, check_fits
from core.adapters.spec import SITES, AdapterSpec

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BASE_KEY = "imprint_base"
# Fields of a LoraConfig that leave y = x W^T + (x A) B as it is. Any other field that is set makes another kind of adapter.
PEFT_NEUTRAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "init_lora_weights", "runtime_config", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
    *("eva_config", "ensure_weight_tying", "rank_pattern", "alpha_pattern"),
}
PEFT_REASONS = {
    "use_dora": "DoRA scales the base's own weights",
    "modules_to_save": "it replaces whole modules of the base",
    "lora_bias": "it adds a bias to B",
    "fan_in_fan_out": "it is for transposed linears (Conv1D)",
    "layer_replication": "it runs layers of the base twice",
    "trainable_token_indices": "it changes embeddings",
    "target_parameters": "it changes parameters that are no linears",
}
# Other ways to initialise (PiSSA, OLoRA, LoftQ...) also change the base's weights.
PEFT_INITIALISED = (None, True, False, "gaussian", "eva", "orthogonal")


def write_peft(directory: str | Path, base: BaseModel, weights: LoraWeights, base_name: str | None = None) -> None:
    """Writes one adapter as the two files that `peft.PeftModel.from_pretrained` reads; the config last.

    weights: exactly one adapter, in the type to be stored. base_name: what the config calls the base, if not what it was loaded
    by; vLLM compares it with its own `--model`, letter by letter. Linears whose factors are all zero are left out, unless all
    are. Raises `ValueError` for several adapters, for one of another base, or for a generated bias, which PEFT has no place for.
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
        "base_model_name_or_path": peft_base_name(base, base_name),
        "r": weights.spec.rank,
        "lora_alpha": weights.spec.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{site}_proj" for site in sites] if everywhere else [base.linear_names[linear] for linear in changed],
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors, directory / PEFT_TENSORS, metadata={_BASE_KEY: base.fingerprint}
    )  # one: of several safetensors shuffles the order
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def peft_base_name(base: BaseModel, base_name: str | None = None) -> str | None:
    """What `write_peft` calls the base."""
    return base_name or base.model.config._name_or_path or None


def holds_peft(directory: Path, base_name: str | None) -> bool:
    """Whether `write_peft` has come to its end in a directory, under this name of the base."""
    try:
        config = json.loads((directory / PEFT_CONFIG).read_text())
    except (FileNotFoundError, ValueError):
        return False
    named = isinstance(config, dict) and config.get("base_model_name_or_path") == base_name
    return named and (directory / PEFT_TENSORS).is_file()


def check_peft_base(directory: str | Path, base: BaseModel, base_name: str) -> None:
    """Raises `ValueError` where an adapter says that it was trained for another base. base_name: what the caller calls the base.

    Files that Imprint wrote hold the base's fingerprint, which decides. Of others the name in the config must be `base_name`, or
    the same directory; a config without a name says nothing.
    """
    directory = Path(directory)
    config = _peft_config(directory)
    with _sound(directory), safe_open(directory / PEFT_TENSORS, framework="pt") as file:
        fingerprint = (file.metadata() or {}).get(_BASE_KEY)
    if fingerprint is not None:
        if fingerprint != base.fingerprint:
            raise ValueError(
                f"{directory} was made for a base with other weights ({fingerprint[:12]}): give the base it was made for"
            )
        return
    named = config.get("base_model_name_or_path")
    if not named or named == base_name or (Path(named).is_dir() and Path(base_name).is_dir() and Path(named).samefile(base_name)):
        return
    raise ValueError(
        f"{directory} was trained for {named}, and the base is {base_name}: give that base, or if both are the same weights "
        f"say so by --base-name {named}"
    )


def read_peft(directory: str | Path, base: BaseModel) -> LoraWeights:
    """Reads a PEFT LoRA for `base` as one adapter, on the base's device, with the linears that it changes.

    alpha/r (alpha/sqrt(r) with rsLoRA) is folded into B; ranks and alphas may differ between linears, smaller ranks are padded
    with zeros. The stored type is kept where nothing has to be folded in, the widest where there are several, otherwise fp32.
    Raises `ValueError` for what a LoRA cannot express and for every name or shape that does not fit the base.
    """
    directory = Path(directory)
    config = _peft_config(directory)
    names = {
        f"{PEFT_PREFIX}{name}.lora_{tensor}.weight": (layer, site, tensor)
        for (layer, site), name in base.linear_names.items()
        for tensor in "AB"
    }
    with _sound(directory):
        stored = load_file(directory / PEFT_TENSORS)
    if unknown := sorted(stored.keys() - names.keys()):
        raise ValueError(
            f"{directory} changes what this base does not have or Imprint does not adapt, such as {', '.join(unknown[:3])}: "
            f"give the base it was trained for, and adapters of {', '.join(SITES)} only"
        )
    if not stored:
        raise ValueError(f"{directory} holds no tensors: save the adapter again")
    found = {names[name]: tensor for name, tensor in stored.items()}
    with_a, with_b = ({(layer, site) for layer, site, tensor in found if tensor == factor_name} for factor_name in "AB")
    if halves := sorted(base.linear_names[linear] for linear in with_a ^ with_b):
        raise ValueError(f"{directory} has only one factor of {', '.join(halves[:3])}: save the adapter again")
    if other := {tensor.dtype for tensor in found.values() if not tensor.is_floating_point()}:
        raise ValueError(f"{directory} holds {', '.join(map(str, other))}: save the adapter in a floating type")
    scales = {linear: _rank_and_scale(config, base.linear_names[linear]) for linear in with_a}
    whole = base.spec(max(rank for rank, _ in scales.values()))
    layers = tuple(tuple(shape for shape in shapes if (layer, shape.site) in with_a) for layer, shapes in enumerate(whole.layers))
    spec = AdapterSpec(layers, whole.rank)
    plain = all(scale == 1 for _, scale in scales.values())
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in found.values())) if plain else torch.float32
    tensors = {}
    for layer, site, factor in (entry[:3] for entry in spec.table):
        tensor, (rank, scale) = found[layer, site, factor], scales[layer, site]
        features = base.linear_shape(layer, site)["AB".index(factor)]
        expected = (rank, features) if factor == "A" else (features, rank)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{base.linear_names[layer, site]}.lora_{factor} is {tuple(tensor.shape)}, r and the base want "
                f"{expected}: give the base it was trained for"
            )
        missing = spec.rank - rank
        padding = (0, missing) if factor == "A" else (0, 0, 0, missing)
        value = tensor.to(dtype) * (scale if factor == "B" and scale != 1 else 1)
        tensors[layer, site, factor] = torch.nn.functional.pad(value.T, padding)[None]
    return LoraWeights(spec, spec.join(tensors).to(base.device))


def _peft_config(directory: Path) -> dict[str, Any]:
    """An adapter's config; `ValueError` where it is missing, or of another kind of adapter."""
    for name in (PEFT_CONFIG, PEFT_TENSORS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}: give a directory that PEFT saved with safetensors")
    try:
        config = json.loads((directory / PEFT_CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{directory}/{PEFT_CONFIG} is not JSON ({error}): save the adapter with PEFT") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else "nameless"
        raise ValueError(f"{directory} holds a {kind} adapter: only LORA can be read")
    if unsupported := sorted(key for key, value in config.items() if value and key not in PEFT_NEUTRAL):
        reasons = "; ".join(f"{key}: {PEFT_REASONS[key]}" for key in unsupported if key in PEFT_REASONS)
        raise ValueError(
            f"{directory} uses {', '.join(unsupported)}: only a plain LoRA can be read" + (f" ({reasons})" if reasons else "")
        )
    if config.get("init_lora_weights") not in PEFT_INITIALISED:
        raise ValueError(
            f"{directory} was initialised by {config['init_lora_weights']}, which changes the base too: convert it to a plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{directory} trained biases of the base: only bias = none can be read")
    if missing := {"r", "lora_alpha"} - config.keys():
        raise ValueError(f"{directory}/{PEFT_CONFIG} lacks {', '.join(sorted(missing))}: save the adapter with PEFT")
    return config


def _rank_and_scale(config: Mapping[str, Any], linear: str) -> tuple[int, float]:
    """r, and what B is multiplied with, of one linear: PEFT's own match of its patterns."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank, alpha = config["r"], config["lora_alpha"]
    if ranks or alphas:
        from peft.utils.other import get_pattern_key  # takes half a second, which few adapters need

        try:
            rank = ranks.get(get_pattern_key(list(ranks), linear), rank)
            alpha = alphas.get(get_pattern_key(list(alphas), linear), alpha)
        except (AttributeError, TypeError, re.error):
            raise ValueError(
                f"rank_pattern or alpha_pattern in {PEFT_CONFIG} is no table of patterns: save the adapter again"
            ) from None
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{linear} has the rank {rank!r} and the alpha {alpha!r}: r is 1 or more, lora_alpha a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@contextmanager
def _sound(directory: Path) -> Iterator[None]:
    """Says what to do about a file that is no safetensors."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{directory}/{PEFT_TENSORS} is damaged ({error}): copy or save the adapter again") from None


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
