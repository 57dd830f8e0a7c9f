"""`imprint import-shine`, `import-peft` and `export`: other people's files in and out. Thin: one function a command."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import REFERENCE
from pipelines.terminal import console, say, told

exchange_app = typer.Typer()

Base = Annotated[str, typer.Option(help="Model directory or Hugging Face name.", show_default="the reference base")]


@exchange_app.command("import-shine")
def import_shine(
    directory: Annotated[
        Path, typer.Argument(help="What the released SHINE code saved: mem_tokens.pt, metanetwork.pth, metalora.pth.")
    ],
    out: Annotated[Path, typer.Argument(help="Where to write Imprint's safetensors checkpoint.")],
    base: Annotated[str, typer.Option(help="The base that it was trained for.")],
    rank: Annotated[int, typer.Option(help="Rank of the adapters it writes.")] = 8,
    meta_rank: Annotated[int, typer.Option(help="Rank of its Meta LoRA.")] = 128,
    num_layers: Annotated[int, typer.Option(help="Layers of its M2P transformer.")] = 4,
    num_heads: Annotated[int, typer.Option(help="Heads of its M2P transformer.")] = 32,
    feed_forward: Annotated[int, typer.Option(help="Feed-forward size of its M2P transformer.")] = 8192,
    scale: Annotated[float, typer.Option(help="Its output scale.")] = 1e-3,
) -> None:
    """Converts a released SHINE checkpoint; no pickle is trusted. The defaults are those of the Qwen3-8B release.

    Example: `imprint import-shine checkpoint-7 runs/shine --base Qwen/Qwen3-8B`
    """
    from core.adapters.base_model import load_base
    from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings

    with told():
        settings = HypernetworkSettings(
            rank=rank, meta_rank=meta_rank, num_layers=num_layers, num_heads=num_heads, feed_forward=feed_forward, scale=scale
        )
        network = Hypernetwork.from_shine_release(directory, load_base(base), settings)
        network.save(out)
    console.print(f"written: {out}, {network.spec.numel:,} numbers an adapter", highlight=False)


@exchange_app.command("import-peft")
def import_peft(
    directory: Annotated[Path, typer.Argument(help="What PEFT saved: adapter_config.json, adapter_model.safetensors.")],
    store: Annotated[str, typer.Argument(help="The store; made where there is none.")],
    name: Annotated[str, typer.Argument(help="The document that shall answer from it.")],
    base: Base = str(REFERENCE / "base"),
    text: Annotated[Path | None, typer.Option(help="The document's text.", show_default="the store's, if it has one")] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What the adapter calls its base, where that is not --base.", show_default="as of --base")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose document.")] = "default",
    collection: Annotated[str, typer.Option(help="The document's collection.")] = "default",
) -> None:
    """Puts any PEFT LoRA into a store, to be served as the adapter of a document.

    Example: `imprint import-peft runs/peft/vostilo runs/store vostilo.txt`
    """
    from pipelines.conversion.importing import import_peft as run_import

    with told():
        document, adapter, had = run_import(directory, store, name, base, text, tenant, collection, base_name)
    what = f"rank {adapter.rank} in {adapter.encoding}, {adapter.length:,} bytes, for {document.name}"
    say([f"{'there already' if had else 'imported'}: adapter {adapter.adapter_id[:8]}, {what}"])


@exchange_app.command()
def export(
    store: Annotated[str, typer.Argument(help="The store.")],
    document: Annotated[str, typer.Argument(help="The document's name.")],
    out: Annotated[Path, typer.Argument(help="Where to write adapter_config.json and adapter_model.safetensors.")],
    base: Base = str(REFERENCE / "base"),
    base_name: Annotated[
        str | None, typer.Option(help="What the adapter calls its base: for vLLM, its `--model`.", show_default="as of --base")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose document.")] = "default",
    collection: Annotated[str, typer.Option(help="The document's collection.")] = "default",
) -> None:
    """Exports a document's adapter as the two files that PEFT reads.

    Example: `imprint export runs/store vostilo.txt runs/peft/vostilo`
    """
    from pipelines.conversion.exporting import export_peft

    with told():
        export_peft(store, tenant, collection, document, base, out, base_name)
    console.print(f"written: {out}")
