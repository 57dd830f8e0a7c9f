"""A frozen causal language model, its tokenizer, and the linears that adapters may change.

`load_base` reads any Hugging Face decoder whose layers expose separate q, k, v, o, gate, up and down linears (Qwen3, Llama,
Qwen2, ...). The model is never copied and its code never patched: hooks, installed once, let the adapters that are active in the
current thread (`AdapterWeights.attach`) change the outputs of linears and attention heads. Without one, logits are its own.

It does not know what an adapter computes; it only holds the stack of active ones and keeps it right when gradient checkpointing
runs a layer again during backward.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from core.adapters.head import Head
from core.adapters.identity import identity
from core.adapters.spec import SITES, AdapterSpec, SiteShape
from core.text.prompts import stop_ids

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Attachment:
    """What changes a layer while it is active; by itself, nothing."""

    def apply(self, layer: int, site: str, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """Returns the output of this linear, given its input and its own output."""
        return y_BTO

    def mix(self, layer: int, query: Tensor, heads_BTI: Tensor) -> Tensor:
        """Returns the heads' outputs as o_proj shall see them, given those of attention and the queries before rotary embedding.

        query: `[B, T, I]` or `[B, T, heads, head_dim]`, with all changes that linears underwent.
        """
        return heads_BTI


class _Active(threading.local):
    """Of the current thread: attachments, outermost first; queries of the layer that runs; where gates and outputs are kept.

    mask: what makes a layer's attention mask out of its own. narrowed: (length, count) where the last layer is computed for the
    last `count` of its `length` positions alone.
    """

    stack: tuple[Attachment, ...] = ()
    query: Tensor | None = None
    gates: dict[int, Tensor] | None = None
    outputs: list[Tensor] | None = None
    mask: Callable[[int, Tensor | None], Tensor | None] | None = None
    narrowed: tuple[int, int] | None = None

    @contextmanager
    def only(self, stack: tuple[Attachment, ...]) -> Iterator[None]:
        before = self.stack, self.query
        self.stack, self.query = stack, None
        try:
            yield
        finally:
            self.stack, self.query = before

    @contextmanager
    def narrow(self, narrowed: tuple[int, int] | None) -> Iterator[None]:
        before, self.narrowed = self.narrowed, narrowed
        try:
            yield
        finally:
            self.narrowed = before


class _Reattaching:
    """A layer's checkpointing function whose second run sees what the first did, wherever backward is called: the attachments,
    and which positions are computed."""

    def __init__(self, checkpoint: Any, active: _Active) -> None:
        self._checkpoint = checkpoint
        self._active = active

    def __call__(self, run: Any, *args: Any) -> Any:
        stack, narrowed = self._active.stack, self._active.narrowed

        def run_again(*inner: Any) -> Any:
            with self._active.only(stack), self._active.narrow(narrowed):
                return run(*inner)

        return self._checkpoint(run_again, *args)


class BaseModel:
    """A frozen decoder with hooked sites.

    `model` is the transformers model in eval mode with no trainable parameter; `tokenizer` is None where there is none.
    stored_dtype: the type of the checkpoint that it was loaded from. stored: loads that again, where `model` is less exact.

    Raises `ValueError` when a layer lacks one of the seven linears, or has it twice (fused, expert and shared layers), and for a
    model that looks ahead or whose logits cannot be had from its hidden states (`core.adapters.head`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stored_dtype: torch.dtype | None = None,
        stored: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._stored_dtype, self._stored = stored_dtype, stored
        self.decoder = cast(nn.Module, model.get_decoder())
        if not hasattr(self.decoder, "layers") or not hasattr(self.decoder, "norm"):
            raise ValueError(
                f"{type(model).__name__} has no decoder with layers and a last norm: use one built like Llama or Qwen"
            )
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self._head = Head(model, self.decoder)
        self.layers = cast(nn.ModuleList, self.decoder.layers)
        self.last_norm = cast(nn.Module, self.decoder.norm)
        self.last_norm.register_forward_pre_hook(self._skip_where_outputs_are_kept)
        self.active = _Active()
        self.linears: dict[tuple[int, str], nn.Linear] = {}
        self.linear_names: dict[tuple[int, str], str] = {}
        names = {module: name for name, module in model.named_modules()}
        for layer, block in enumerate(self.layers):
            block.register_forward_pre_hook(self._keep_attachments_when_run_again)
            block.register_forward_pre_hook(partial(self._give_mask, layer), with_kwargs=True)
            block.register_forward_hook(self._keep_output)
            for site, linear in _sites(layer, block).items():
                self.linears[layer, site] = linear
                self.linear_names[layer, site] = names[linear]
                linear.register_forward_hook(partial(self._apply_attachments, layer, site))
            self._query_module(layer).register_forward_hook(self._keep_query)
            self.linears[layer, "o"].register_forward_pre_hook(partial(self._mix_heads, layer))
        for site in ("o", "gate", "up"):
            self.linears[len(self.layers) - 1, site].register_forward_pre_hook(self._narrow)
        for site in ("o", "down"):
            self.linears[len(self.layers) - 1, site].register_forward_hook(self._widen)
        if len(set(self.linears.values())) != len(self.linears):
            raise ValueError("this model shares linears between layers: adapters need one linear for each layer and site")
        if self.device.type != "meta":
            self._head.check(model, self.decoder)

    @property
    def hidden_size(self) -> int:
        return self.embedding.embedding_dim

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def max_length(self) -> int:
        """Positions that the base was made for, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer, by tokenizer, chat template, and the model's configurations. Raises without a tokenizer."""
        said: set[int] = set()
        for config in (self.model.generation_config, self.model.config.get_text_config()):
            ids = getattr(config, "eos_token_id", None)
            said.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return stop_ids(tokenizer_of(self), said)

    def linear_shape(self, layer: int, site: str) -> tuple[int, int]:
        """Input and output features of a linear."""
        linear = self.linears[layer, site]
        return linear.in_features, linear.out_features

    def attention_shape(self, layer: int) -> tuple[int, int]:
        """Size and number of the query heads. Raises `ValueError` where queries and heads' outputs differ in width."""
        width, outputs = self.linears[layer, "q"].out_features, self.linears[layer, "o"].in_features
        heads = int(self.model.config.get_text_config().num_attention_heads)
        if width != outputs or width % heads:
            raise ValueError(
                f"layer {layer} has {heads} heads, queries of {width} numbers and {outputs} numbers into its o_proj: a gated "
                "memory needs a query and an output of one size for each head"
            )
        return width // heads, heads

    def spec(self, rank: int, sites: tuple[str, ...] = SITES, generated_bias: bool = False) -> AdapterSpec:
        """The table of a LoRA over `sites` of every layer; with `generated_bias`, linears that have a bias get a tensor C."""
        if unknown := set(sites) - set(SITES):
            raise ValueError(f"no linear is called {', '.join(sorted(unknown))}: choose from {', '.join(SITES)}")
        layers = []
        for layer in range(len(self.layers)):
            linears = [(site, self.linears[layer, site]) for site in SITES if site in sites]
            layers.append(
                tuple(
                    SiteShape(site, linear.in_features, linear.out_features, generated_bias and linear.bias is not None)
                    for site, linear in linears
                )
            )
        return AdapterSpec(tuple(layers), rank)

    def hidden_states(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Final hidden states `[B, T, H]`, after the last norm and before the head."""
        output = self.decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return cast(Tensor, output.last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits `[..., V]` from its final hidden states `[..., H]`."""
        return self._head(hidden)

    def layer_outputs(self, inputs_BTH: Tensor, mask_BT: Tensor, count: int) -> list[Tensor]:
        """`[B, count, H]` fp32 of every layer: its output (before the last norm) at the last `count` positions.

        Positions count from column 0, padding included. Not computed are the last norm, the head, and of the last layer what
        follows attention at the other positions. Raises `ValueError` for layers that give more than one vector a token.
        """
        outputs: list[Tensor] = []
        self.active.outputs = outputs
        try:
            position_ids = torch.arange(inputs_BTH.shape[1], device=inputs_BTH.device)[None]
            with self.active.narrow((inputs_BTH.shape[1], count)):
                self.decoder(inputs_embeds=inputs_BTH, attention_mask=mask_BT, position_ids=position_ids, use_cache=False)
        finally:
            self.active.outputs = None
        return outputs

    @contextmanager
    def masking(self, mask: Callable[[int, Tensor | None], Tensor | None]) -> Iterator[None]:
        """Inside, in this thread, layer i attends under `mask(i, its own mask)`; None leaves out what comes after a token."""
        before, self.active.mask = self.active.mask, mask
        try:
            yield
        finally:
            self.active.mask = before

    @contextmanager
    def checkpointing(self, enabled: bool = True) -> Iterator[None]:
        """Recomputes each layer in backward instead of keeping its activations, for forward passes begun inside, in every thread.

        Only the layers' own flags are set: dropout stays off and frozen embeddings ask for no gradient.
        """
        if not enabled:
            yield
            return
        if not all(isinstance(block, GradientCheckpointingLayer) for block in self.layers):
            raise ValueError(f"layers of type {type(self.layers[0]).__name__} cannot be recomputed: train without checkpointing")
        names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
        before = [{name: getattr(block, name, None) for name in names} for block in self.layers]
        recompute = partial(checkpoint, use_reentrant=False)
        for block in self.layers:
            block.__dict__.update(zip(names, (True, True, recompute), strict=True))
        try:
            yield
        finally:
            for block, values in zip(self.layers, before, strict=True):
                block.__dict__.update(values)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of weights, configuration, quantisation, tokenizer and chat template.

        Weights are read as the checkpoint's own type: a checkpoint has one fingerprint, whatever it runs in. Costs one pass over
        the weights; they are loaded again, on the CPU, where memory holds them less exactly than the checkpoint.
        """
        model = self.model if self._stored is None else self._stored()
        return identity(model.named_parameters(), self._stored_dtype, self.model.config, self.tokenizer)

    def _apply_attachments(self, layer: int, site: str, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for attachment in self.active.stack:
            output = attachment.apply(layer, site, args[0], output)
        return output

    def _query_module(self, layer: int) -> nn.Module:
        """What gives the queries before rotary embedding: the attention's q_norm where it has one, else q_proj."""
        attention = self.model.get_submodule(self.linear_names[layer, "q"].rpartition(".")[0])
        norm = getattr(attention, "q_norm", None)
        return norm if isinstance(norm, nn.Module) else self.linears[layer, "q"]

    def _keep_query(self, module: nn.Module, args: Any, query: Tensor) -> None:
        if self.active.stack:
            self.active.query = query

    def _mix_heads(self, layer: int, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        query, self.active.query = self.active.query, None
        if not self.active.stack:
            return None
        assert query is not None
        heads_BTI = args[0]
        for attachment in self.active.stack:
            heads_BTI = attachment.mix(layer, query, heads_BTI)
        return (heads_BTI, *args[1:])

    def _give_mask(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.active.mask is None:
            return None
        return args, {**kwargs, "attention_mask": self.active.mask(layer, kwargs["attention_mask"])}

    def _keep_output(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.active.outputs is not None:
            assert self.active.narrowed is not None
            hidden_BTH = output[0] if isinstance(output, tuple) else output
            if hidden_BTH.dim() != 3:
                raise ValueError(f"layers of {type(self.model).__name__} hand on several streams: no hypernetwork can read them")
            self.active.outputs.append(hidden_BTH[:, -self.active.narrowed[1] :].to(torch.float32, copy=True))

    def _narrow(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.active.narrowed is None else (args[0][:, -self.active.narrowed[1] :], *args[1:])

    def _widen(self, linear: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.active.narrowed is None:
            return None
        length, count = self.active.narrowed
        return nn.functional.pad(output, (0, 0, length - count, 0))

    def _skip_where_outputs_are_kept(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.active.outputs is None else (args[0][:, :0],)

    def _keep_attachments_when_run_again(self, layer: nn.Module, args: Any) -> None:
        if not getattr(layer, "gradient_checkpointing", False):
            return
        recompute = layer._gradient_checkpointing_func
        if not isinstance(recompute, _Reattaching):
            layer.__dict__["_gradient_checkpointing_func"] = _Reattaching(recompute, self.active)


def _sites(layer: int, block: nn.Module) -> dict[str, nn.Linear]:
    linears: dict[str, nn.Linear] = {}
    for site in SITES:
        found = {name: module for name, module in block.named_modules() if name.rsplit(".", 1)[-1] == f"{site}_proj"}
        [linear] = found.values() if len(found) == 1 else [None]
        if not isinstance(linear, nn.Linear) or next(iter(found)).count(".") != 1:
            raise ValueError(
                f"layer {layer} ({type(block).__name__}) must have one linear {site}_proj in its attention or MLP, it has "
                f"{', '.join(found) or 'none'}: decoders with fused, expert or shared projections are not supported"
            )
        linears[site] = linear
    return linears


def tokenizer_of(base: BaseModel) -> PreTrainedTokenizerBase:
    """The base's tokenizer; raises `ValueError` where it has none."""
    if base.tokenizer is None:
        raise ValueError("the base has no tokenizer: save one beside its weights")
    return base.tokenizer


def load_base(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> BaseModel:
    """Loads a frozen base from a directory or by its Hugging Face name; safetensors only.

    dtype: of the weights in memory. attention: transformers' name of the implementation ("sdpa", "eager", ...), by default sdpa
    where the architecture allows it, else eager. Raises `ValueError` for a path or name that holds no model, holds it as a
    pickle, lacks weights, or needs code of its own.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json: give a model directory in Hugging Face's layout, or a model's name")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        model: Any = _load(name_or_path, dtype, attention)
    except OSError as error:
        raise ValueError(f"no model with safetensors weights at {name_or_path}: {str(error).splitlines()[0]}") from error
    has_tokenizer = not path.exists() or any((path / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False) if has_tokenizer else None
    stored_dtype = config.dtype or config.get_text_config().dtype
    exact = stored_dtype is not None and torch.promote_types(stored_dtype, dtype) == dtype
    stored = None if exact else partial(_load, name_or_path, stored_dtype or "auto", attention)
    return BaseModel(model.to(device), tokenizer, stored_dtype, stored)


def _load(name_or_path: str | Path, dtype: torch.dtype | str, attention: str | None) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name_or_path,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, loading = loaded
    if absent := sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])}):
        raise ValueError(f"{name_or_path} lacks weights that its config.json asks for: {', '.join(absent[:3])}")
    return cast(PreTrainedModel, model)
