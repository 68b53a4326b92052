"""What a fit shows in the terminal: a bar with rate and ETA, and a line for each epoch."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vbdcompress.records import EpochRow

REFRESH_SECONDS = 0.2


class FitProgress:
    """A `training.Listener` that draws; a context manager around one or several fits.

    Args:
        console: to draw on; without a terminal only the epoch lines are printed.
        every: print a line for every n-th epoch, and for the first and last.
    """

    def __init__(self, console: Console, every: int = 1) -> None:
        self.console, self.every = console, every
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self._seen, self._since, self._drawn = 0, time.monotonic(), 0.0

    def __enter__(self) -> "FitProgress":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_start(self, title: str, epochs: int) -> None:
        """Begin another fit: a new bar."""
        self._begin(title, epochs)
        self.console.print(f"[bold]{title}[/bold]  ({epochs} epochs)")

    def _begin(self, title: str, total: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(title, total=total, rate="")

    def on_cut(self, done: int, cuts: int) -> None:
        """Move the bar of the thresholds at which the fitted network is cut and measured."""
        if done == 0:
            title = f"Measuring error and size at {cuts} thresholds"
            self._begin(title, cuts)
            self.console.print(f"[bold]{title}[/bold]")
        elif self.task is not None:
            self.progress.update(self.task, completed=done)

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Move the bar, a few times a second."""
        self._seen += examples
        now = time.monotonic()
        if self.task is not None and now - self._drawn >= REFRESH_SECONDS:
            rate = f"{self._seen / max(1e-9, now - self._since):,.0f} examples/s"
            done = epoch - 1 + (step / steps if steps else 0)
            self.progress.update(self.task, completed=done, rate=rate)
            self._drawn = now
            if now - self._since > 5:
                self._seen, self._since = 0, now

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """Print the epoch's line."""
        if row.epoch % self.every and row.epoch not in (1, epochs):
            return
        parts = [f"{row.epoch:>{len(str(epochs))}}/{epochs}", f"NLL {row.nll:.4f}"]
        if row.sparsity is not None:
            parts += [f"KL {row.kl:7.4f}", f"beta {row.beta:.2f}", f"sparsity {100 * row.sparsity:4.1f}%"]
        if row.error is not None:
            parts.append(f"val. error {row.error:.2f}%")
        parts.append(f"{row.examples_per_second:,.0f}/s")
        self.console.print("  " + "  ".join(parts), highlight=False, soft_wrap=True)
