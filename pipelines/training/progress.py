"""What a person sees of a running training: a bar over its steps, with loss and accuracy as they come."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.training.recipe import Stage
from pipelines.training.recording import SKIPPED


@contextmanager
def training_progress(stages: Sequence[Stage], console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields the observer to give to `pipelines.training.train.train`; validation results are printed above the bar and stay."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        task = progress.add_task("starting", total=sum(stage.steps for stage in stages), loss="")

        skipped = 0

        def observe(metrics: dict[str, Any]) -> None:
            nonlocal skipped
            shown: dict[str, Any] = {"loss": f"loss {metrics['loss']:.3f}"} if "loss" in metrics else {}
            progress.update(task, completed=metrics["step"], description=metrics["stage"], **shown)
            if "exact_match" in metrics:
                loss = f"loss {metrics['validation_loss']:.3f}" if "validation_loss" in metrics else "loss not finite"
                console.print(
                    f"step {metrics['step']:>6}  unseen documents: exact match {metrics['exact_match']:.3f}, {loss}",
                    highlight=False,
                )
            if metrics.get("skipped_documents", 0) > skipped:
                skipped = metrics["skipped_documents"]
                console.print(f"step {metrics['step']:>6}  {skipped} documents skipped, named in {SKIPPED}", highlight=False)

        yield observe
