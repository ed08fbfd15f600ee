"""The work of ``loraplex serve``: a progress bar while weights are read, a greeting, and errors in one line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from loraplex.server.errors import LoraplexError
from loraplex.server.logs import configure_logs
from loraplex.server.serve import Serving, serve
from loraplex.server.settings import load_settings

_NAMES_SHOWN = 12


def run_server(flags: dict[str, Any], config: Path | None) -> None:
    """Serve until a signal comes; exit status 1 and one line of explanation where that cannot be."""
    console = Console(stderr=True)
    try:
        settings = load_settings(flags, config)
        configure_logs(settings.log_level, settings.log_format)
        with _WeightsProgress(console) as progress:
            asyncio.run(serve(settings, progress=progress, on_ready=lambda s: _greet(console, progress, s)))
    except LoraplexError as error:
        console.print(f"[red]error:[/red] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None


def _greet(console: Console, progress: _WeightsProgress, serving: Serving) -> None:
    progress.stop()
    shown = ", ".join(serving.adapters[:_NAMES_SHOWN])
    more = len(serving.adapters) - _NAMES_SHOWN
    adapters = (
        f"{len(serving.adapters)} adapters" + (f": {shown}" if shown else "") + (f" and {more} more" * (more > 0))
    )
    console.print(f"[green]ready:[/green] {escape(serving.model_name)} with {escape(adapters)}", soft_wrap=True)
    console.print(f"       {serving.url}  (Ctrl-C drains and stops)", soft_wrap=True)


class _WeightsProgress:
    """A progress bar that appears with the first bytes and goes when the server is ready."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("reading weights"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _WeightsProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("weights", total=total)
        self._bar.update(self._task, completed=done)

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()
