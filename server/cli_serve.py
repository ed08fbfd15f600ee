"""``loraplex serve`` and ``loraplex demo``. The flags are made from the settings, so that there is one list of them."""

from __future__ import annotations

import asyncio
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from loraplex.server.demo.assets import adapters_folder, base_folder
from loraplex.server.errors import LoraplexError
from loraplex.server.logs import configure_logs
from loraplex.server.serve import Serving
from loraplex.server.serve import serve as serve_until_stopped
from loraplex.server.settings import Settings, load_settings

_NAMES_SHOWN = 12

Command = Callable[..., None]


def _value_type(field: FieldInfo) -> Any:
    """What typer makes of a flag: bools and lists are its business, all other values the settings check."""
    annotation = field.annotation
    if annotation is bool:
        return bool | None
    if typing.get_origin(annotation) is tuple:
        return list[str] | None
    return str | None


def _metavar(field: FieldInfo) -> str:
    choices = [
        str(choice)
        for part in (field.annotation, *typing.get_args(field.annotation))
        if typing.get_origin(part) is typing.Literal
        for choice in typing.get_args(part)
    ]
    if choices:
        return "|".join(choices)
    kinds = [part for part in (field.annotation, *typing.get_args(field.annotation)) if isinstance(part, type)]
    named = [kind for kind in kinds if kind is not types.NoneType]
    return named[0].__name__.upper() if named else "TEXT"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    default = "" if field.default is None or field.is_required() else f" [default: {_shown(field.default)}]"
    help_ = f"{field.description}{default}"
    value = _value_type(field)
    if value == bool | None:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_, show_default=False)
    else:
        option = typer.Option(flag, help=help_, metavar=_metavar(field), show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value, option])


def _shown(value: object) -> str:
    return "none" if value == () else str(value).lower() if isinstance(value, bool) else str(value)


def _with_settings(*skipped: str) -> Callable[[Command], Command]:
    """Give a command ``(..., **flags)`` a flag for every setting but the skipped ones."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(name, field) for name, field in Settings.model_fields.items() if name not in skipped]
        parameters = [*own, *made]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return command

    return decorate


@_with_settings("model")
def serve(
    model: Annotated[str | None, typer.Argument(help=f"{Settings.model_fields['model'].description}")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML or TOML file of settings.")] = None,
    **flags: Any,
) -> None:
    """Serve a base model and its adapters over an OpenAI-compatible HTTP API.

    Every flag is also an environment variable (LORAPLEX_POOL_BYTES) and a key of the --config file (pool_bytes).
    """
    _run({"model": model, **flags}, config)


@_with_settings("model", "adapters", "served_model_name")
def demo(**flags: Any) -> None:
    """Serve the built-in demo: a small trained base model and one adapter for each of its skills."""
    own = {"model": str(base_folder()), "adapters": str(adapters_folder()), "served_model_name": "loraplex-demo"}
    _run({**flags, **own}, None)


def _run(flags: dict[str, Any], config: Path | None) -> None:
    console = Console(stderr=True)
    try:
        settings = load_settings(flags, config)
        configure_logs(settings.log_level, settings.log_format)
        with _WeightsProgress(console) as progress:
            asyncio.run(
                serve_until_stopped(settings, progress=progress, on_ready=lambda s: _greet(console, progress, s))
            )
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
