"""``loraplex serve`` and ``loraplex demo``. The flags are made from the settings, so that there is one list of them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from loraplex.server.demo.assets import adapters_folder, base_folder
from loraplex.server.lazy import run_lazily
from loraplex.server.settings import Settings

Command = Callable[..., None]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML or TOML file of settings.")]


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
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Serve a base model and its adapters over an OpenAI-compatible HTTP API.

    Every flag is also an environment variable (LORAPLEX_POOL_BYTES) and a key of the --config file (pool_bytes).
    """
    run_lazily("loraplex.server.cli_serving:run_server", {"model": model, **flags}, config)


def demo_settings() -> dict[str, str]:
    """What makes a server the demo."""
    return {"model": str(base_folder()), "adapters": str(adapters_folder()), "served_model_name": "loraplex-demo"}


@_with_settings("model", "adapters", "served_model_name")
def demo(config: ConfigFile = None, **flags: Any) -> None:
    """Serve the built-in demo: a small trained base model and one adapter for each of its skills.

    What makes it the demo (model, adapters, served_model_name) wins over the --config file.
    """
    run_lazily("loraplex.server.cli_serving:run_server", flags | demo_settings(), config)
