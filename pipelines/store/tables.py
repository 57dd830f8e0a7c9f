"""A store as people read it in a terminal, and as JSON: pages, documents, figures, what upkeep found and did.

Bytes are decimal, times are UTC. Reads what it shows through `core.store.store`; changes nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.text import Text

from core.store.answering import choose, why_withheld
from core.store.answering import newest as latest
from core.store.manifest import AdapterRow, DocumentRow
from core.store.store import DocumentPage, Store
from core.store.upkeep.results import Collected, Compacted, Erased, Holdings, Verified
from core.writing.gain import gain
from pipelines.terminal import counted, framed, size

_SHOWN = 20


def page_table(page: DocumentPage) -> RenderableType:
    """A page of documents, with what their newest adapter is."""
    table = framed("")
    for name in ("collection", "document"):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    for name, width in (("text", 8), ("adapters", 8), ("newest", 11), ("quality", 7), ("since", 10)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for row, own in page.documents:
        newest = latest(own) if own else None
        figures = ("", "") if newest is None else (_form(newest), _figure(newest.quality))
        names = Text(row.collection), Text(row.name)
        table.add_row(*names, size(row.length), str(len(own)) if own else "none", *figures, f"{row.created:%Y-%m-%d}")
    return table


def page_json(version: int, page: DocumentPage) -> dict[str, Any]:
    documents = [_plain(row) | {"adapters": [each.adapter_id for each in adapters]} for row, adapters in page.documents]
    return {"version": version, "documents": documents, "next_page": page.next_token}


def document_tables(store: Store, row: DocumentRow) -> RenderableType:
    """A document, its adapters, and who made them."""
    about = framed("")
    about.show_header = False
    for name, value in (
        ("document", row.name),
        ("title", row.title or "none"),
        ("of", f"collection {row.collection}, tenant {row.tenant}"),
        ("content", row.content_hash),
        ("text", f"{size(row.length)} in {row.shard} at {row.offset}"),
        ("since", f"version {row.sequence}, {row.created:%Y-%m-%d %H:%M:%S}"),
    ):
        about.add_row(Text(name, "dim"), Text(value, overflow="fold"))
    adapters = store.find_adapters(row.tenant, row.content_hash)
    if not adapters:
        return Group(about, Text("It has no adapter: it answers in context."))
    table = framed("Adapters, by window, as they landed")
    for name, width in (("id", 8), ("window", 7), ("made by", 12)):
        table.add_column(name, no_wrap=True, min_width=width)
    for name, width in (("form", 11), ("bytes", 8), ("quality", 7), ("error", 5), ("gain", 4), ("since", 10)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    producers = store.producers()
    for each in adapters:
        table.add_row(
            each.adapter_id[:8],
            f"{each.window_start}-{each.window_end}",
            f"{producers[each.producer_fingerprint].method} {each.producer_fingerprint[:6]}",
            _form(each),
            size(each.length),
            _figure(each.quality),
            _figure(each.error),
            _figure(gain(each.matched_loss, each.shuffled_loss, each.base_loss)) + (" withheld" if each.withheld else ""),
            f"{each.created:%Y-%m-%d}",
        )
    makers = framed("Made by")
    for name in ("producer", "method", "weights", "base"):
        makers.add_column(name, overflow="ellipsis", no_wrap=True)
    for fingerprint in dict.fromkeys(each.producer_fingerprint for each in adapters):
        maker = producers[fingerprint]
        makers.add_row(fingerprint[:6], maker.method, maker.weights[:12], Text(str(maker.config.get("base", ""))[:60]))
    return Group(about, table, makers, *(Text(line) for line in _how_good(adapters)))


def _how_good(adapters: Sequence[AdapterRow]) -> list[str]:
    """In plain words: which adapter answers, and what was measured."""
    chosen, lines = choose(adapters), []
    if chosen.row is None:
        lines.append(f"It answers in context: {chosen.reason}.")
    else:
        lines.append(f"Adapter {chosen.row.adapter_id[:8]} answers, where a server can run it.")
    for row in adapters:
        name = row.adapter_id[:8]
        if row.withheld:
            lines.append(f"{name}: {why_withheld(row)}.")
        elif row.quality is not None and row.questions and row.standing_quality is not None:
            lines.append(
                f"{name} answers {row.quality:.0%} of {row.questions} questions that it was not trained on; what answered "
                f"before it {row.standing_quality:.0%}."
            )
        elif (saved := gain(row.matched_loss, row.shuffled_loss, row.base_loss)) is not None:
            lines.append(f"{name} saves {saved:.2f} nats a token of the document's text.")
        else:
            lines.append(f"{name} was not measured.")
    return lines


def document_json(store: Store, row: DocumentRow) -> dict[str, Any]:
    adapters = store.find_adapters(row.tenant, row.content_hash)
    producers = store.producers()
    made = {each.producer_fingerprint: producers[each.producer_fingerprint].model_dump(mode="json") for each in adapters}
    return _plain(row) | {"adapters": [_plain(each) for each in adapters], "producers": made}


def stats_json(holds: Holdings) -> dict[str, Any]:
    return holds._asdict() | {"written": holds.written.isoformat()}


def stats_table(holds: Holdings) -> RenderableType:
    table = framed("")
    table.show_header = False
    live = holds.text_bytes + holds.adapter_bytes
    share = f"{live / holds.shard_bytes:.0%} of them live" if holds.shard_bytes else "empty"
    makers = f"{counted(holds.producers, 'producer')}, {counted(holds.specs, 'spec')}"
    rows, alive = counted(holds.part_rows, "row"), holds.documents + holds.adapters
    for name, value, note in (
        ("version", f"{holds.version:,}", f"written {holds.written:%Y-%m-%d %H:%M:%S}"),
        ("documents", f"{holds.documents:,}", f"{size(holds.text_bytes)} of text"),
        ("adapters", f"{holds.adapters:,}", f"{size(holds.adapter_bytes)}, {makers}"),
        ("parts", f"{holds.parts:,}", f"{size(holds.part_bytes)}, {rows}, {alive:,} of them live"),
        ("shards", f"{holds.shards:,}", f"{size(holds.shard_bytes)}, {share}"),
        ("orphans", f"{holds.orphans:,}", f"{size(holds.orphan_bytes)} that no version names"),
        ("on disk", size(holds.stored_bytes), "older versions and orphans included"),
    ):
        table.add_row(Text(name, "dim"), Text(value, justify="right"), note)
    return table


def tenants_table(store: Store) -> RenderableType:
    """Documents and adapters of each tenant: a pass over all rows."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for kind in ("documents", "adapters"):
        for table in store.tables(kind):  # type: ignore[arg-type]
            columns = pa.table({"tenant": table["tenant"].cast(pa.string()), "length": table["length"]})
            grouped = columns.group_by("tenant").aggregate([("length", "sum"), ("length", "count")])
            for tenant, total, count in zip(*(grouped[name].to_pylist() for name in _GROUPED), strict=True):
                sums[tenant].update({kind: count, f"{kind} bytes": total})
    table = framed("Tenants")
    for name in ("tenant", "documents", "text", "adapters", "bytes"):
        table.add_column(name, justify="left" if name == "tenant" else "right")
    for tenant, figures in sorted(sums.items()):
        counts = f"{figures['documents']:,}", size(figures["documents bytes"])
        table.add_row(Text(tenant), *counts, f"{figures['adapters']:,}", size(figures["adapters bytes"]))
    return table


_GROUPED = ("tenant", "length_sum", "length_count")


def verified_lines(found: Verified) -> list[str]:
    lines = [
        f"version {found.sequence}: {counted(found.documents, 'document')} and {counted(found.adapters, 'adapter')} in "
        f"{counted(found.parts, 'part')}, {size(found.bytes)} of text and adapters, {counted(found.roots, 'root')}"
    ]
    if found.orphans:
        total = size(sum(each.size for _, each in found.orphans))
        lines.append(f"{counted(len(found.orphans), 'object')} that no version names, {total}: `imprint store gc` collects them")
        lines += [f"  {name}, {size(each.size)}, written {each.modified:%Y-%m-%d %H:%M}" for name, each in found.orphans[:_SHOWN]]
        lines += [f"  and {len(found.orphans) - _SHOWN:,} more"] if len(found.orphans) > _SHOWN else []
    lines += [f"fault: {fault}" for fault in found.faults]
    lines.append(counted(len(found.faults), "fault") if found.faults else "all of it is sound")
    return lines


def collected_lines(done: Collected, dry_run: bool, grace_hours: float) -> list[str]:
    names = [*done.roots, *done.parts, *done.shards]
    kinds = (("root", done.roots), ("part", done.parts), ("shard", done.shards))
    what = ", ".join(counted(len(found), kind) for kind, found in kinds)
    lines = [f"{'would collect' if dry_run else 'collected'} {what}, {size(done.bytes)}"]
    if not dry_run and done.unfinished + done.earlier:
        lines.append(
            f"and {counted(done.unfinished, 'unfinished write')}, {counted(done.earlier, 'earlier version')} in the bucket"
        )
    if done.young:
        lines.append(
            f"{counted(done.young, 'object')} that no version names, younger than {grace_hours:g} h: a writer may need them"
        )
    if dry_run:
        lines += [f"  {name}" for name in names[:_SHOWN]]
        lines += [f"  and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    return lines


def compacted_lines(done: Compacted) -> list[str]:
    return [
        f"{counted(done.parts_before, 'part')} before, {done.parts_after:,} now; "
        f"{counted(done.shards_before, 'shard')} before, {done.shards_after:,} now; {size(done.moved_bytes)} moved"
    ]


def erased_lines(done: Erased, grace_hours: float) -> list[str]:
    lines = [
        f"erased {counted(done.documents, 'document')} and {counted(done.adapters, 'adapter')}; "
        f"{counted(done.shards, 'shard')} rewritten, {size(done.moved_bytes)} of others' bytes moved"
    ]
    if done.collected is None:
        lines.append(
            f"the bytes stay on disk for readers of older versions: `imprint store gc` takes them after {grace_hours:g} h"
        )
    else:
        gone = counted(len(done.collected.parts) + len(done.collected.shards), "old object")
        lines.append(f"deleted {gone} and {counted(done.collected.earlier, 'earlier version')} in the bucket: no byte is left")
        if done.collected.young:
            lines.append(
                f"{counted(done.collected.young, 'young object')} that no version names may be of a killed writer: "
                f"`imprint store gc` takes what is left of that after {grace_hours:g} h"
            )
    return lines


def _form(adapter: AdapterRow) -> str:
    return f"rank {adapter.rank} {adapter.encoding}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _plain(row: DocumentRow | AdapterRow) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(row).items()}
