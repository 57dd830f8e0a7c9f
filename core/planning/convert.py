"""What converting a corpus will take, before it is done: adapters, bytes, requests, GPU hours, money, and when that pays off.

In: how much a corpus holds (`Volume`), a base without weights (`skeleton`), settings, prices. Out: a `ConvertPlan`; after the
conversion, `actual` gives the same plan with what it really took. Reads no documents and loads no weights.

The arithmetic of one window of T tokens, with M memory tokens, S = T + M, on a base of L layers and hidden size H: 2 S FLOPs a
weight of the base's linears and of the Meta LoRA; 2 S^2 Q a layer for causal attention (Q the width of all query heads); in each
layer of M2P, 2 (4 H^2 + 2 H F) L M for its linears (F its feed-forward size), and 4 L M H times the L or M that it attends to.
Embeddings and norms are left out, the final head is never computed, and composing long documents adds under a hundredth.

A question answered in context reads its document again; one answered from an adapter does not. So a document has paid off after
(its GPU time + its PUTs + its storage) / (price of its tokens in a prompt) questions. What answering costs is left out, being
about the same either way. Documents of equal content, which share an adapter, are counted one by one.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from transformers import AutoConfig, AutoModelForCausalLM

from core.adapters.base_model import BaseModel
from core.adapters.layout import ENCODINGS, Encoding, encoded_bytes
from core.adapters.spec import SITES
from core.config import Section
from core.planning.costs import Gpus, Prices
from core.shine.hypernetwork import M2P, HypernetworkSettings

PART_BYTES = 16 * 2**20
COMMIT_PUTS, COMMIT_GETS = 4, 2
MODULES = (SITES, ("q", "k", "v", "o"), ("gate", "up", "down"), ("q", "v"))


class Assumptions(Gpus):
    """What the plan takes for granted.

    documents_per_s: of one GPU, as measured; without it, GPU hours follow from FLOPs and `utilisation`. pass_s: the least time of
    a forward pass, which small bases are bound by. storage_months: how long adapters are kept until they must have paid off.
    """

    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    pass_s: Annotated[float, Field(ge=0)] = 0.05
    documents_per_s: PositiveFloat | None = None
    storage_months: Annotated[float, Field(ge=0)] = 12.0


class Volume(Section):
    """What a corpus holds; an estimate where only `sampled` documents of it were read.

    documents: those that get adapters. source_bytes: of the files. text_bytes: of the texts, in UTF-8. tokens: of the texts.
    windows: read by the hypernetwork, with `window_tokens` in all and `squared_tokens` the sum of their squares.
    """

    files: int = 0
    source_bytes: int = 0
    sampled: int = 0
    documents: float = 0
    rejected: float = 0
    text_bytes: float = 0
    tokens: float = 0
    adapters: float = 0
    windows: float = 0
    window_tokens: float = 0
    squared_tokens: float = 0

    def scaled(self, factor: float) -> "Volume":
        """As much of everything, but for the files and bytes of the source and the documents sampled."""
        estimated = [name for name, field in Volume.model_fields.items() if field.annotation is float]
        return self.model_copy(update={name: getattr(self, name) * factor for name in estimated})

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(**{name: getattr(self, name) + getattr(other, name) for name in Volume.model_fields})


class Packing(Section):
    """What goes together: windows into a forward pass, by rows and by tokens; documents into a commit, by number and by bytes."""

    batch_rows: PositiveInt = 16
    batch_tokens: PositiveInt = 4096
    shard_bytes: PositiveInt = 256 * 2**20
    buffer_documents: PositiveInt = 128


class Made(Section):
    """An adapter as it is stored, and the hypernetwork's memory for it."""

    sites: tuple[str, ...]
    rank: PositiveInt
    encoding: Encoding
    bytes: PositiveInt
    memory_tokens: PositiveInt


class WorkerMemory(Section):
    """What one worker holds on its device, in bytes: weights, and at the peak of a forward pass of a full batch."""

    base: PositiveInt
    hypernetwork: PositiveInt
    batch: PositiveInt

    @property
    def together(self) -> int:
        return self.base + self.hypernetwork + self.batch


class Alternative(Section):
    """Adapters of other sites or rank: bytes of one by encoding, and GPU hours for the corpus."""

    sites: tuple[str, ...]
    rank: PositiveInt
    bytes: dict[Encoding, int]
    gpu_hours: float


class ConvertPlan(Section):
    """The plan, or what it took, which is `measured`. Costs are in `prices.currency`.

    flops: of all forward passes. gpu_hours: of CPU processes where `hardware` says so, and these cost nothing here.
    prompt_gpu_s: of one GPU, to read a mean document in a prompt. already: documents that took nothing, as they had adapters.
    """

    volume: Volume
    made: Made
    worker: WorkerMemory
    shards: PositiveInt
    flops: float
    gpu_hours: float
    prompt_gpu_s: float
    prices: Prices
    assumptions: Assumptions
    alternatives: tuple[Alternative, ...] = ()
    hardware: Literal["GPU", "CPU"] = "GPU"
    measured: bool = False
    already: int = 0

    @property
    def adapter_bytes(self) -> float:
        """Of all adapters."""
        return self.volume.adapters * self.made.bytes

    @property
    def stored_bytes(self) -> float:
        """Adapters and texts; the manifest adds under a kilobyte a document."""
        return self.adapter_bytes + self.volume.text_bytes

    @property
    def puts(self) -> int:
        """Parts of shards, and what commits write beside them; merging the manifest adds under a tenth."""
        return self.shards * (COMMIT_PUTS + math.ceil(self.stored_bytes / self.shards / PART_BYTES))

    @property
    def gets(self) -> int:
        """Files of the source, and what commits read."""
        return self.volume.files + self.shards * COMMIT_GETS

    @property
    def hours(self) -> float:
        """By the clock, all GPUs at work."""
        return self.gpu_hours / self.assumptions.gpus

    @property
    def gpu_cost(self) -> float:
        return self.gpu_hours * self.prices.gpu_hour if self.hardware == "GPU" else 0.0

    @property
    def request_cost(self) -> float:
        return (self.puts * self.prices.put_per_thousand + self.gets * self.prices.get_per_thousand) / 1000

    @property
    def month_cost(self) -> float:
        """Of keeping the store for a month."""
        return self.stored_bytes / 1e9 * self.prices.storage_per_gb_month

    @property
    def cost(self) -> float:
        """Of converting, and of keeping for `assumptions.storage_months`."""
        return self.gpu_cost + self.request_cost + self.month_cost * self.assumptions.storage_months

    @property
    def tokens_saved(self) -> float:
        """Prompt tokens that a question does not need, mean over documents."""
        return self.volume.tokens / self.volume.documents

    @property
    def break_even(self) -> float | None:
        """Questions a document until it has paid off against prompts at their price; None where prompts are free."""
        return self._questions(self.tokens_saved / 1e6 * self.prices.prompt_per_million)

    @property
    def break_even_own(self) -> float | None:
        """The same against prompts read on one's own GPUs, used as well as in conversion."""
        return self._questions(self.prompt_gpu_s / 3600 * self.prices.gpu_hour)

    def _questions(self, prompt_cost: float) -> float | None:
        return self.cost / self.volume.documents / prompt_cost if prompt_cost else None


def skeleton(name_or_path: str | Path) -> BaseModel:
    """A base without weights or tokenizer, on torch's meta device, from its configuration alone.

    name_or_path: a directory with a config.json, or a Hugging Face name, of which that one file is fetched. Raises `ValueError`
    where there is none, and as `BaseModel` does.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json: give a model directory in Hugging Face's layout, or a model's name")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"no model configuration at {name_or_path}: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        return BaseModel(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def memory_tokens(base: BaseModel, settings: HypernetworkSettings) -> int:
    """M, as the hypernetwork chooses it: enough for the largest layer's numbers."""
    return math.ceil(max(base.spec(settings.rank, settings.sites, settings.generated_bias).layer_numel) / base.hidden_size)


def forward_flops(base: BaseModel, settings: HypernetworkSettings, volume: Volume) -> float:
    """Of the hypernetwork's forward passes over all windows, padding left out.

    What follows attention in the last layer is computed at the memory positions alone.
    """
    layers, hidden, memory = len(base.layers), base.hidden_size, memory_tokens(base, settings)
    read = volume.window_tokens + volume.windows * memory
    squares = volume.squared_tokens + 2 * memory * volume.window_tokens + volume.windows * memory**2
    meta = base.spec(settings.meta_rank + settings.additional_meta_rank, settings.sites).numel
    late = [site for site in SITES[SITES.index("o") :] if site in settings.sites]
    late_meta = base.spec(settings.meta_rank + settings.additional_meta_rank, tuple(late)).layer_numel[-1] if late else 0
    late_weights = sum(math.prod(base.linear_shape(layers - 1, site)) for site in SITES[SITES.index("o") :])
    encoder = 2 * read * (_weights(base) + meta) + 2 * squares * _query_widths(base)
    encoder -= 2 * volume.window_tokens * (late_weights + late_meta)
    linears = 2 * (4 * hidden**2 + 2 * hidden * settings.feed_forward)
    m2p = settings.num_layers * layers * memory * (linears + 4 * hidden * (layers + memory) / 2)
    return encoder + volume.windows * m2p


def worker_memory(base: BaseModel, settings: HypernetworkSettings, packing: Packing, dtype: torch.dtype) -> WorkerMemory:
    """Of a worker whose base is in `dtype`; the hypernetwork's weights and memory states are fp32.

    Weights are exact. A batch peaks in M2P: its input, one layer's queries, keys, values, attention and feed-forward, which is
    5 + 2 F / H times the memory states `[B, L, M, H]` (measured on the CPU: 9.1 at F = 2 H); or in one of the base's layers.
    """
    layers, hidden, memory = len(base.layers), base.hidden_size, memory_tokens(base, settings)
    with torch.device("meta"):
        m2p = M2P(layers, memory, hidden, settings)
    meta = base.spec(settings.meta_rank + settings.additional_meta_rank, settings.sites).numel
    trained = sum(each.numel() for each in m2p.parameters()) + meta + memory * hidden
    states = 4 * packing.batch_rows * layers * memory * hidden
    widest = max(max(base.linear_shape(*place)) for place in base.linears)
    layer = packing.batch_tokens * (4 * hidden + 3 * widest) * dtype.itemsize
    return WorkerMemory(
        base=sum(each.numel() for each in base.model.parameters()) * dtype.itemsize,
        hypernetwork=4 * trained,
        batch=max(round(states * (5 + 2 * settings.feed_forward / hidden)), states + layer),
    )


def plan_convert(
    volume: Volume,
    base: BaseModel,
    settings: HypernetworkSettings,
    encoding: Encoding,
    packing: Packing,
    prices: Prices,
    assumptions: Assumptions,
    dtype: torch.dtype = torch.float32,
) -> ConvertPlan:
    """The plan, for a base in `dtype`; a `skeleton` will do as the base. Raises `ValueError` for an empty corpus."""
    if not volume.documents:
        raise ValueError("there are no documents to plan for: check the source, and why its files are rejected")
    spec = base.spec(settings.rank, settings.sites, settings.generated_bias)
    made = Made(
        sites=settings.sites,
        rank=settings.rank,
        encoding=encoding,
        bytes=encoded_bytes(spec, encoding),
        memory_tokens=memory_tokens(base, settings),
    )
    buffers = math.ceil(volume.documents / packing.buffer_documents)
    prompt_flops = 2 * volume.tokens * _weights(base) + 2 * volume.squared_tokens * _query_widths(base)
    alternatives = [
        Alternative(
            sites=other.sites,
            rank=other.rank,
            bytes={each: encoded_bytes(base.spec(other.rank, other.sites, other.generated_bias), each) for each in ENCODINGS},
            gpu_hours=_gpu_s(base, other, volume, packing, assumptions) / 3600,
        )
        for other in _others(settings)
    ]
    return ConvertPlan(
        volume=volume,
        made=made,
        worker=worker_memory(base, settings, packing, dtype),
        shards=buffers * math.ceil((volume.adapters * made.bytes + volume.text_bytes) / buffers / packing.shard_bytes),
        flops=forward_flops(base, settings, volume),
        gpu_hours=alternatives[0].gpu_hours,
        prompt_gpu_s=prompt_flops / volume.documents / assumptions.flops_per_s,
        prices=prices,
        assumptions=assumptions,
        alternatives=tuple(alternatives),
    )


def actual(
    plan: ConvertPlan,
    documents: int,
    rejected: int,
    already: int,
    tokens: int,
    adapters: int,
    adapter_bytes: int,
    shards: int,
    hours: float,
    processes: int,
    hardware: Literal["GPU", "CPU"],
) -> ConvertPlan:
    """The plan with what a conversion took; FLOPs, texts and windows, which nobody counted, are the plan's by the token.

    documents: those converted, with `tokens` in all; adapter_bytes: of all adapters; hours: by the clock. Raises `ValueError`
    where nothing was converted.
    """
    if not documents or not adapters:
        raise ValueError("no document was converted: there is nothing to hold against the plan")
    share = tokens / plan.volume.tokens
    taken = {
        "documents": documents,
        "rejected": rejected,
        "tokens": tokens,
        "adapters": adapters,
        "sampled": documents + rejected,
    }
    return plan.model_copy(
        update={
            "volume": plan.volume.scaled(share).model_copy(update=taken),
            "made": plan.made.model_copy(update={"bytes": round(adapter_bytes / adapters)}),
            "shards": shards,
            "flops": plan.flops * share,
            "gpu_hours": hours * processes,
            "assumptions": plan.assumptions.model_copy(update={"gpus": processes}),
            "alternatives": (),
            "hardware": hardware,
            "measured": True,
            "already": already,
        }
    )


def _gpu_s(base: BaseModel, settings: HypernetworkSettings, volume: Volume, packing: Packing, assumptions: Assumptions) -> float:
    """Seconds of one GPU; at a measured rate, whatever is made."""
    if assumptions.documents_per_s is not None:
        return volume.documents / assumptions.documents_per_s
    mean_tokens = volume.window_tokens / volume.windows + memory_tokens(base, settings)
    rows = max(1.0, min(packing.batch_rows, packing.batch_tokens // mean_tokens))
    return max(forward_flops(base, settings, volume) / assumptions.flops_per_s, volume.windows / rows * assumptions.pass_s)


def _others(settings: HypernetworkSettings) -> list[HypernetworkSettings]:
    """The settings themselves, and then with other ranks, and with the rank on other sites."""
    ranks = [settings.rank, *(rank for rank in (settings.rank // 2, settings.rank * 2, settings.rank * 4) if rank)]
    sites = [each for each in MODULES if set(each) != set(settings.sites)]
    changes = [{"rank": rank} for rank in ranks] + [{"sites": each} for each in sites]
    return [settings.model_copy(update=change) for change in changes]


def _weights(base: BaseModel) -> int:
    return sum(math.prod(base.linear_shape(*place)) for place in base.linears)


def _query_widths(base: BaseModel) -> int:
    return sum(base.linear_shape(layer, "q")[1] for layer in range(len(base.layers)))
