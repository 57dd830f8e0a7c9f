"""SHINE's adapter writer: documents to checked adapters, one forward pass a window (`core.writing.writer` is the contract).

`HypernetworkWriter` reads a document as the hypernetwork was trained to: raw text, no template. A document longer than a window
is read in windows that end at sentences; their adapters become one (ranks concatenated, then cut to the spec's rank by SVD) or
stay one each. Windows of like length share a forward pass, in halves where memory does not hold it; a window that does not fit
alone is its document's rejection. Cost: the hypernetwork's; a composition adds two QR decompositions a linear, and a gate what
`core.writing.quality_gate` says.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from core.adapters.base_model import tokenizer_of
from core.adapters.codec import encode
from core.adapters.deltas import delta_norms, unusable
from core.adapters.layout import Encoding
from core.adapters.lora import Composition, LoraWeights, composed
from core.shine.hypernetwork import Hypernetwork
from core.store.manifest import Producer, adapter_id
from core.text.documents import NORMALISER, Document, Window
from core.text.tokens import BORDERS, Tokens, read
from core.training.fitting_batches import FittingBatches
from core.writing.quality_gate import Candidate, GateSettings, QualityGate
from core.writing.writer import AdapterWriter, Outcome, Rejected, StandingOf, WindowRule, Written

_UNUSABLE = "the hypernetwork gave no usable adapter: zero or not finite"
_OUT_OF_MEMORY = "out of memory: a window does not fit alone, lower windows.max_tokens"


class HypernetworkWriter(AdapterWriter):
    """Writes adapters with SHINE's hypernetwork, at most `max_rows` windows and `max_padded_tokens` (memory included) at a time.

    The batch limits and the gate are no part of the producer. Raises `ValueError` for a base without tokenizer, for one that
    cannot tell where sentences end, for windows that the base has no positions for. On a base without a chat
    template nothing is measured, whatever the gate says.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        encoding: Encoding = "bf16",
        rule: WindowRule | None = None,
        max_rows: int = 16,
        max_padded_tokens: int = 4096,
        gate: GateSettings | None = None,
    ) -> None:
        rule, gate = rule or WindowRule(), gate or GateSettings()
        base = hypernetwork.base
        self.tokenizer = tokenizer_of(base)
        if rule.borders == "sentence" and not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot say where in the text a token ends, so windows cannot end at sentences: "
                "load the fast tokenizer, or choose windows.borders token"
            )
        self._memory_tokens = len(hypernetwork.memory_MH)
        max_tokens = rule.longest(base.max_length, self._memory_tokens, hypernetwork.trained_tokens)
        self._hypernetwork = hypernetwork.eval()
        self.composition: Composition = rule.composition or hypernetwork.settings.composition
        self.rule = rule.model_copy(update={"max_tokens": max_tokens, "composition": self.composition})
        self.one_each = rule.one_each
        self._max_tokens = max_tokens
        self._batches = FittingBatches(max_rows, max_padded_tokens)
        measures = gate.share and self.tokenizer.chat_template is not None
        self._gate = QualityGate(base, gate, max_rows, max_padded_tokens) if measures else None
        self.encoding: Encoding = encoding
        self.spec = hypernetwork.spec
        self.producer = Producer(
            method="shine",
            weights=hypernetwork.fingerprint(),
            config={
                "base": base.fingerprint,
                "normaliser": NORMALISER,
                "windows": self.rule.model_dump(mode="json", exclude={"max_windows"}),
                "borders": BORDERS if rule.borders == "sentence" else None,
            },
        )

    def adapter_ids(self, document: Document, tokens: Tokens) -> list[str]:
        """See `AdapterWriter.adapter_ids`; one a window, or one in all where windows are composed."""
        covers = self._covers(tokens)
        if self._composes(covers):
            covers = [Window(0, len(tokens.ids))]
        identity = document.tenant, document.content_hash
        return [adapter_id(*identity, window, self.producer, self.spec, self.encoding) for window in covers]

    def write_each(
        self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None, standing: StandingOf | None = None
    ) -> Iterator[tuple[int, Outcome]]:
        """See `AdapterWriter.write_each`; longest windows first. The gate here measures against none, whatever stands."""
        if tokens is None:
            tokens = [read(self.tokenizer, document.text) for document in documents]
        units: list[tuple[int, Window]] = []
        parts: dict[int, dict[Window, Tensor | str]] = {}
        wanted: dict[int, int] = {}
        for place, each in enumerate(tokens):
            covers = self._covers(each)
            if not covers:
                yield place, Rejected("no tokens")
            elif len(covers) > self.rule.max_windows:
                limit = f"{len(covers)} windows of {self._max_tokens} tokens, {self.rule.max_windows} are allowed"
                yield place, Rejected(f"too long: {limit}; split it, or raise max_windows")
            else:
                wanted[place], parts[place] = len(covers), {}
                units += [(place, window) for window in covers]
        ids = [tokens[place].ids[window.start : window.end] for place, window in units]
        lengths = [len(each) + self._memory_tokens for each in ids]
        for batch, made in self._batches.run(lengths, lambda batch: self._generate([ids[unit] for unit in batch])):
            done: list[tuple[int, Outcome]] = []
            for unit, part in zip(batch, made or [_OUT_OF_MEMORY] * len(batch), strict=True):
                place, window = units[unit]
                parts[place][window] = part.to("cpu", copy=True) if isinstance(part, Tensor) and wanted[place] > 1 else part
                if len(parts[place]) == wanted[place]:
                    done.append((place, self._finish(documents[place], len(tokens[place].ids), parts.pop(place))))
            del made, part  # on a GPU 87 MB a window of an 8B model, which the next batch needs
            yield from done if self._gate is None else self._gated(self._gate, done, tokens)

    def settled(self, adapter_ids: Iterable[str]) -> None:
        """See `AdapterWriter.settled`; nothing was kept."""

    def _covers(self, tokens: Tokens) -> list[Window]:
        return self.rule.covers(tokens, self._max_tokens)

    def _composes(self, covers: Sequence[Window]) -> bool:
        return len(covers) > 1 and self.one_each

    @torch.inference_mode()
    def _generate(self, ids: Sequence[Sequence[int]]) -> list[Tensor | str]:
        """flat_N for each window, or what is wrong with it.

        Over a base in bf16 all matrix products are in bf16, M2P's between its fp32 norms, too: in fp32 it would take most of the
        time. A window that is its whole document stays on the device, where `codec.encode` casts it.
        """
        base, longest = self._hypernetwork.base, max(map(len, ids))
        ids_BT = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, tokens in enumerate(ids):
            ids_BT[row, longest - len(tokens) :] = torch.as_tensor(tokens)
            mask_BT[row, longest - len(tokens) :] = 1
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            weights = self._hypernetwork.generate(ids_BT.to(base.device), mask_BT.to(base.device))
        norms = delta_norms(weights).tolist()
        return [_UNUSABLE if unusable(norm) else flat_N for flat_N, norm in zip(weights.flat_BN, norms, strict=True)]

    @torch.inference_mode()
    def _finish(self, document: Document, length: int, made: dict[Window, Tensor | str]) -> Outcome:
        """made: what `_generate` gave for each window."""
        covers, parts = sorted(made), {window: part for window, part in made.items() if isinstance(part, Tensor)}
        for window in covers:
            if isinstance(fault := made[window], str):
                return Rejected(f"{fault}, tokens {window.start} to {window.end}")
        error, composes = 0.0, self._composes(covers)
        if composes:
            whole = LoraWeights(self.spec, torch.stack([parts[window] for window in covers]))
            weights, error = composed(whole, self.composition, self.spec.rank)
            if unusable(delta_norms(weights).item()):
                return Rejected("the composed adapter is zero or not finite")
            covers = [Window(0, length)]
            parts = {covers[0]: weights.flat_BN[0]}
        try:
            vectors = [encode(parts[window], self.encoding, self.spec) for window in covers]
        except ValueError as unfit:
            return Rejected(f"the adapter cannot be encoded: {unfit}")
        measured = error if composes else None
        pairs = zip(covers, vectors, strict=True)
        return Written(tuple(self.new_adapter(document, window, vector, measured) for window, vector in pairs), error)

    def _gated(
        self, gate: QualityGate, done: Sequence[tuple[int, Outcome]], tokens: Sequence[Tokens]
    ) -> Iterator[tuple[int, Outcome]]:
        """The outcomes with what the gate measured on their adapters."""
        candidates = []
        for place, outcome in done:
            for new in outcome.adapters if isinstance(outcome, Written) else ():
                covers = self._covers(tokens[place]) if new.window == (0, len(tokens[place].ids)) else [new.window]
                candidates.append(Candidate(new, [tokens[place].ids[window.start : window.end] for window in covers]))
        measured = iter(gate.measured(candidates))
        for place, outcome in done:
            if isinstance(outcome, Written):
                outcome = replace(outcome, adapters=tuple(islice(measured, len(outcome.adapters))))
            yield place, outcome
