"""``loraplex chat``: a conversation with a running server, or one answer to what comes in on a pipe."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from loraplex.clients.client import Client
from loraplex.clients.connection import DEFAULT_URL
from loraplex.clients.errors import ErrorDetails, InvalidConfiguration, LoraplexClientError
from loraplex.clients.options import GenerationOptions
from loraplex.clients.types import StreamEvent
from loraplex.server.cli_options import ApiKey, Url
from loraplex.server.cli_report import client_errors_reported, describe, fail, print_error

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (gives input() its line editing and history)

HELP = """\
/adapter NAME  talk to another adapter, in a new conversation; without NAME to the base model;
               NAME=WEIGHT,NAME=WEIGHT is a mix of adapters
/adapters      list the adapters
/new           begin a new conversation
/help          this
/quit          leave (Ctrl-D does, too); Ctrl-C stops an answer"""

_STEERING = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

ReadLine = Callable[[str], str]


def chat(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="Adapter to talk to, or a mix: NAME=WEIGHT,NAME=WEIGHT.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, max=2.0, help="0 is greedy.")] = None,
    single_turn: Annotated[
        bool, typer.Option("--single-turn", help="Answer each line by itself, without those before it.")
    ] = False,
) -> None:
    """Chat with a model or an adapter of a running server.

    If the input is no terminal, all of it is one prompt, and the answer is all of the output.
    """
    options: GenerationOptions = {"max_tokens": max_tokens, "temperature": temperature}
    with client_errors_reported(), Client(url, api_key=api_key) as client:
        conversation = Conversation(client, options, adapter, system, single_turn)
        if sys.stdin.isatty():
            talk(conversation, input)
        else:
            _answer_once(conversation)


@dataclass(slots=True)
class Conversation:
    """What was said, to whom, and how more of it is asked for."""

    client: Client
    options: GenerationOptions
    adapter: str | None = None
    system: str | None = None
    single_turn: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, hear: Callable[[StreamEvent], None]) -> None:
        """Ask, and give every piece of the answer to ``hear``.

        A question whose answer failed is forgotten; an answer that Ctrl-C cut short stays as far as it was heard.

        Raises:
            LoraplexClientError: there was no answer, or half of one.
        """
        question = {"role": "user", "content": text}
        heard: list[str] = []
        try:
            self._stream(question, heard, hear)
        except KeyboardInterrupt:
            self._remember(question, heard)
            raise
        self._remember(question, heard)

    def begin(self) -> None:
        """Forget what was said."""
        self.turns.clear()

    def switch(self, adapter: str | None) -> None:
        """Talk to another adapter, or to a mix, from now on.

        Raises:
            AdapterNotFound: there is none of that name.
            InvalidConfiguration: a weight of the mix is no number.
        """
        for name in names_of(adapter):
            self.client.get_adapter(name)
        self.adapter = adapter
        self.begin()

    def _stream(self, question: dict[str, str], heard: list[str], hear: Callable[[StreamEvent], None]) -> None:
        messages = [*self._before(), question]
        with self.client.stream_chat(messages, adapter_id=mix_of(self.adapter), **self.options) as stream:
            for event in stream:
                heard.append(event.text)
                hear(event)

    def _remember(self, question: dict[str, str], heard: list[str]) -> None:
        self.turns += [question, {"role": "assistant", "content": "".join(heard)}]

    def _before(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system if self.single_turn else [*system, *self.turns]


def talk(conversation: Conversation, read_line: ReadLine) -> None:
    """Read lines and answer them, until ``/quit`` or the end of the input."""
    console = Console()
    if conversation.adapter is not None:
        conversation.switch(conversation.adapter)
    _note(console, "Type a message, or /help.")
    while True:
        try:
            line = read_line(f"\n{conversation.adapter or 'base model'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        with _errors_survived():
            if line.startswith("/"):
                _obey(conversation, console, line)
            elif line:
                _answer(conversation, console, line)


@contextlib.contextmanager
def _errors_survived() -> Iterator[None]:
    try:
        yield
    except LoraplexClientError as error:
        print_error(describe(error))


def _obey(conversation: Conversation, console: Console, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/adapter":
        conversation.switch(argument.strip() or None)
        _note(console, f"now talking to {conversation.adapter or 'the base model'}")
    elif command == "/adapters":
        for adapter in conversation.client.list_adapters():
            console.print(Text(adapter.name))
    elif command == "/new":
        conversation.begin()
        _note(console, "a new conversation")
    elif command == "/help":
        console.print(Text(HELP), soft_wrap=True)
    else:
        print_error(f"{command} is no command; accepted are /adapter, /adapters, /new, /help and /quit")


def _answer(conversation: Conversation, console: Console, text: str) -> None:
    started = time.monotonic()
    last: list[StreamEvent] = []

    def hear(event: StreamEvent) -> None:
        last[:] = [event]
        console.print(Text(printable(event.text)), end="", soft_wrap=True)

    try:
        conversation.ask(text, hear)
    except KeyboardInterrupt:
        return
    finally:
        console.print()
    usage = last[-1].usage if last else None
    if usage is not None:
        _note(console, f"{usage.completion_tokens} tokens, {time.monotonic() - started:.1f} s")


def _note(console: Console, text: str) -> None:
    console.print(Text(text, style="dim"), soft_wrap=True)


def _answer_once(conversation: Conversation) -> None:
    try:
        prompt = sys.stdin.read().rstrip("\n")
        prompt.encode()
    except UnicodeError as error:
        fail(f"the input is no text: {error}; accepted is UTF-8")
    if not prompt:
        fail("the input is empty; accepted is a prompt on the standard input")
    conversation.ask(prompt, lambda event: typer.echo(event.text, nl=False))
    typer.echo()


def mix_of(adapter: str | None) -> str | list[tuple[str, float]] | None:
    """What was typed as an adapter: a name, or the parts of a mix between commas; a part without a weight weighs 1.

    A comma tells them apart: no adapter's name has one, but it may hold an equals sign.
    """
    if adapter is None or "," not in adapter:
        return adapter
    return [_weighted(part.strip()) for part in adapter.split(",")]


def names_of(adapter: str | None) -> list[str]:
    """The adapters that were typed; none for the base model."""
    mix = mix_of(adapter)
    return [mix] if isinstance(mix, str) else [name for name, _ in mix or ()]


def _weighted(part: str) -> tuple[str, float]:
    name, equals, weight = part.rpartition("=")
    if not equals:
        return part, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(weight)):
            return name, number
    message = f"the weight of {name!r} in a mix is {weight!r}; accepted is a number, as in {name}=0.5"
    raise InvalidConfiguration(ErrorDetails(message, param="adapter"))


def printable(text: str) -> str:
    """A model's text as it may go to a terminal: without the characters that steer one."""
    return text.translate(_STEERING)
