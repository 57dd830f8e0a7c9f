"""`imprint store`: a store's contents and its upkeep. Thin: one function a command; what it shows is `pipelines.store.tables`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import REFERENCE
from pipelines.terminal import console, counted, say, told

store_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Looks into a store, checks it, shrinks it, erases from it.\n\nExample: `imprint store ls runs/store`",
)

StoreUrl = Annotated[str, typer.Argument(help="The store: a path, a `file://` or an `s3://` URL.")]
Tenant = Annotated[str, typer.Option(help="Whose documents.")]
Collection = Annotated[str | None, typer.Option(help="Of this collection only.")]
Prefix = Annotated[str, typer.Option(help="Documents whose name begins with this.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")]
GraceHours = Annotated[float, typer.Option(help="Leave alone what is younger: readers and writers may need it. 1 or more.")]


@store_app.command("ls")
def list_documents(
    store: StoreUrl,
    tenant: Tenant = "default",
    collection: Collection = None,
    prefix: Prefix = "",
    limit: Annotated[int, typer.Option(help="Documents on a page, 1 to 1000.")] = 50,
    page: Annotated[str | None, typer.Option(help="Go on where a page ended: the token that it gave.")] = None,
    as_json: AsJson = False,
) -> None:
    """Lists documents by collection and name, a page at a time.

    Example: `imprint store ls runs/store --prefix reports/2026`
    """
    from core.store.store import Store
    from pipelines.store.tables import page_json, page_table

    with told():
        opened = Store.open(store)
        found = next(opened.pages(tenant, collection, prefix, page, limit))
        if as_json:
            console.print_json(json.dumps(page_json(opened.sequence, found)))
            return
        if found.documents:
            console.print(page_table(found))
        else:
            others = ", ".join(repr(each) for each in opened.tenants()[:10]) or "none at all"
            say([f"no such documents of tenant {tenant!r}; tenants here: {others}"])
        if found.next_token is not None:
            say([f"more: --page {found.next_token}"])


@store_app.command("show")
def show_document(
    store: StoreUrl,
    document: Annotated[str, typer.Argument(help="The document's name.")],
    tenant: Tenant = "default",
    collection: Annotated[str, typer.Option(help="The document's collection.")] = "default",
    text: Annotated[bool, typer.Option("--text", help="The text alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Shows a document: where it lies, its adapters, their figures, and who made them.

    Example: `imprint store show runs/store test-1-0-000000`
    """
    from core.store.store import Store
    from pipelines.store.tables import document_json, document_tables

    with told():
        opened = Store.open(store)
        row = opened.find_document(tenant, collection, document)
        if row is None:
            raise ValueError(f"no document {document!r} in collection {collection!r}: `imprint store ls` lists them")
        if text:
            say([opened.get_text(row)])
        elif as_json:
            console.print_json(json.dumps(document_json(opened, row)))
        else:
            console.print(document_tables(opened, row))


@store_app.command("stats")
def show_stats(
    store: StoreUrl,
    tenants: Annotated[bool, typer.Option("--tenants", help="Each tenant's share too: reads all rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Counts documents, adapters, parts, shards, and what lies on disk for nothing.

    Example: `imprint store stats runs/store`
    """
    from core.store.store import Store
    from core.store.upkeep.keeper import Upkeep
    from pipelines.store.tables import stats_json, stats_table, tenants_table

    with told():
        holds = Upkeep(store).holdings()
        if as_json:
            console.print_json(json.dumps(stats_json(holds)))
            return
        console.print(stats_table(holds))
        if tenants:
            console.print(tenants_table(Store.open(store)))


@store_app.command("verify")
def verify_store(
    store: StoreUrl,
    threads: Annotated[int, typer.Option(help="Reads that run side by side.", min=1)] = 8,
) -> None:
    """Reads and checks every byte; names every fault, and exits with 1 where there is one.

    Example: `imprint store verify runs/store`
    """
    from rich.progress import Progress

    from core.store.upkeep.keeper import Upkeep
    from pipelines.store.tables import verified_lines

    with told():
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("reading", total=None)
            found = Upkeep(store).verify(threads, lambda done, total: progress.update(task, completed=done, total=total))
        say(verified_lines(found))
    if found.faults:
        raise typer.Exit(1)


@store_app.command("diff")
def show_differences(
    before: Annotated[str, typer.Argument(help="A store, or a version of one: `runs/store@12`.")],
    after: Annotated[str, typer.Argument(help="Another, or another version of it.")],
    as_json: AsJson = False,
) -> None:
    """Says which documents and adapters came, went or changed from one store, or version, to another: one a line.

    Example: `imprint store diff runs/store@2 runs/store`
    """
    from collections import Counter

    from core.store.upkeep.keeper import compare

    with told():
        count = Counter[str]()
        for each in compare(before, after):
            count[f"{each.kind} {each.change}"] += 1
            if as_json:
                say([json.dumps(each._asdict(), ensure_ascii=False)])
            else:
                say([f"{each.change:8} {each.kind[:-1]:8} {'/'.join(each.key)}"])
        if not as_json:
            say([", ".join(f"{what}: {number:,}" for what, number in sorted(count.items())) or "no difference"])


@store_app.command("compact")
def compact_store(store: StoreUrl) -> None:
    """Makes full shards and parts of many small ones, and empties shards that are mostly dead; `gc` then frees the space.

    Example: `imprint store compact runs/store`
    """
    from core.store.upkeep.keeper import Upkeep
    from pipelines.store.tables import compacted_lines

    with told(), console.status("compacting"):
        done = Upkeep(store).compact()
    say(compacted_lines(done))


@store_app.command("gc")
def collect_garbage(store: StoreUrl, grace_hours: GraceHours = 24, dry_run: DryRun = False) -> None:
    """Deletes what no version needs any more: old versions, orphaned parts and shards, unfinished writes.

    What was the newest version within the grace period stays whole, and so does what is younger: a writer may be about to
    name it. In a bucket that keeps versions, the earlier versions of the store's objects go too.

    Example: `imprint store gc runs/store --dry-run`
    """
    from core.store.upkeep.keeper import Upkeep
    from pipelines.store.tables import collected_lines

    with told():
        done = Upkeep(store).collect(grace_s=3600 * grace_hours, dry_run=dry_run)
    say(collected_lines(done, dry_run, grace_hours))


@store_app.command("rm")
def erase_documents(
    store: StoreUrl,
    document: Annotated[str | None, typer.Argument(help="A document's name.", show_default=False)] = None,
    tenant: Tenant = "default",
    collection: Annotated[
        str | None, typer.Option(help="All of this collection; with a name, where it is.", show_default="default, with a name")
    ] = None,
    prefix: Prefix = "",
    everything: Annotated[bool, typer.Option("--all", help="All documents of the tenant.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Delete old objects at once, not after the grace period.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    grace_hours: GraceHours = 24,
    dry_run: DryRun = False,
) -> None:
    """Erases documents for good: names, titles, texts, hashes and adapters, in every shard, part and bucket version.

    They no longer answer from the first second on. Their bytes go with `--now`, or with the first `imprint store gc` after the
    grace period. Adapters of a text that another document of the tenant has stay.

    Example: `imprint store rm runs/store old.txt --now`
    """
    from core.store.upkeep.keeper import Upkeep
    from pipelines.store.tables import erased_lines

    with told():
        if everything == bool(document or collection or prefix):
            raise ValueError("give a document's name, --prefix, --collection, or --all for everything of the tenant")
        in_collection = "default" if document is not None and collection is None else collection
        target = (tenant, in_collection, document, prefix)
        upkeep = Upkeep(store)
        count = upkeep.matching(*target)
        if dry_run:
            say([f"would erase {count:,} documents"])
            return
        if not yes and count > 1:
            typer.confirm(f"Erase {count:,} documents for good?", abort=True)
        with console.status("erasing") as status:
            done = upkeep.erase(*target, now, 3600 * grace_hours, lambda step: status.update(f"erasing: {step}"))
    say(erased_lines(done, grace_hours))


@store_app.command("export")
def export_documents(
    store: StoreUrl,
    out: Annotated[Path, typer.Argument(help="Where to write a directory for each adapter, and documents.jsonl.")],
    base: Annotated[str, typer.Option(help="Model directory or Hugging Face name.", show_default="the reference base")] = str(
        REFERENCE / "base"
    ),
    base_name: Annotated[
        str | None, typer.Option(help="What the adapters call their base: for vLLM, its `--model`.", show_default="as of --base")
    ] = None,
    tenant: Tenant = "default",
    collection: Collection = None,
    prefix: Prefix = "",
) -> None:
    """Exports the newest LoRA of each document as the two files that PEFT reads.

    Example: `imprint store export runs/store runs/peft-all --prefix reports/`
    """
    from pipelines.conversion.exporting import LACKS, export_many

    with told(), console.status("exporting"):
        adapters, lacks = export_many(store, tenant, collection, prefix, base, out, base_name)
    say([f"written: {counted(adapters, 'adapter')} to {out}"])
    say(f"left out: {counted(count, 'document')} with {LACKS[lack]}" for lack, count in lacks.most_common())
