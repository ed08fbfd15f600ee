from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from loraplex.clients.client import Client
from loraplex.server.cli_chat import Conversation, chat, mix_of, printable, talk
from loraplex.server.errors import ContextLengthError

app = typer.Typer()
app.command()(chat)


def answer_to(prompt: str | bytes, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), input=prompt, catch_exceptions=False)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAPLEX_URL", "LORAPLEX_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def url(serve: Callable[..., Any], engine: Any) -> str:
    engine.script.eos_after = 13
    server: str = serve().url
    return server


@pytest.fixture
def conversation(url: str) -> Iterator[Conversation]:
    with Client(url) as client:
        yield Conversation(client, {"max_tokens": 20})


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Types the lines at the prompt, and raises what is no line; the end of the input follows."""
    waiting = iter(lines)

    def read_line(_: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read_line


def prompts(engine: Any) -> list[str]:
    return [engine.tokenizer.decode(command.prompt_ids) for command in engine.commands]


def test_a_piped_prompt_is_answered_with_the_text_alone(url: str, engine: Any) -> None:
    result = answer_to("Say hello.\n", "--url", url, "--adapter", "red", "--system", "Be kind.", "--max-tokens", "20")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello, world!\n", "")
    [command] = engine.commands
    assert command.adapter.name == "red"
    assert command.params.max_tokens == 20
    assert "<system>Be kind." in prompts(engine)[0]
    assert "<user>Say hello." in prompts(engine)[0]


def test_a_mix_is_typed_with_commas(url: str, engine: Any) -> None:
    result = answer_to("Hi\n", "--url", url, "--adapter", "red=0.7, blue", "--max-tokens", "3")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hel\n", "")
    assert [(one.adapter.name, one.weight) for one in engine.commands[0].mix] == [("red", 0.7), ("blue", 1.0)]


@pytest.mark.parametrize("weight", ["much", "", "nan", "inf"])
def test_a_weight_that_is_no_number_is_an_error_in_one_line(url: str, engine: Any, weight: str) -> None:
    result = answer_to("Hi\n", "--url", url, "--adapter", f"red={weight},blue=1")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: the weight of 'red' in a mix is {weight!r}; accepted is a number, as in red=0.5\n"
    )
    assert engine.commands == []


@pytest.mark.parametrize(
    ("typed_in", "mix"),
    [
        (None, None),
        ("red", "red"),
        ("lora-r=8", "lora-r=8"),
        ("a=0.7,b=-1e-2", [("a", 0.7), ("b", -0.01)]),
        ("lora-r=8=0.5,b", [("lora-r=8", 0.5), ("b", 1.0)]),
    ],
)
def test_what_has_no_comma_is_a_name(typed_in: str | None, mix: Any) -> None:
    assert mix_of(typed_in) == mix


def test_an_empty_pipe_is_an_error_in_one_line(url: str) -> None:
    result = answer_to("\n", "--url", url)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the input is empty")


def test_input_that_is_no_text_is_an_error_in_one_line(url: str) -> None:
    result = answer_to(b"\xff\xfe", "--url", url)
    assert result.exit_code == 1
    assert "accepted is UTF-8" in result.stderr


def test_an_unknown_adapter_is_an_error_in_one_line(url: str) -> None:
    result = answer_to("Hi", "--url", url, "--adapter", "nobody")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "'nobody' does not exist" in result.stderr


def test_a_conversation_remembers_what_was_said(
    conversation: Conversation, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(conversation, typed("One", "", "Two", "/quit", "Three"))
    assert len(engine.commands) == 2
    assert "<user>One" in prompts(engine)[1]
    assert "<assistant>Hello, world!" in prompts(engine)[1]
    assert capsys.readouterr().out.count("Hello, world!\n14 tokens") == 2


def test_another_adapter_begins_another_conversation(
    conversation: Conversation, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation.system = "Be kind."
    talk(conversation, typed("One", "/adapter red", "Two", "/adapter", "Three"))
    assert [command.adapter and command.adapter.name for command in engine.commands] == [None, "red", None]
    assert "One" not in prompts(engine)[1]
    assert all("Be kind." in prompt for prompt in prompts(engine))
    assert "now talking to red" in capsys.readouterr().out


def test_a_conversation_may_go_on_with_a_mix(
    conversation: Conversation, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(conversation, typed("/adapter red=0.5,blue=0.5", "One", "/adapter red,nobody", "Two", "/adapter red=x,blue"))
    assert [len(command.mix) for command in engine.commands] == [2, 2]
    assert "One" in prompts(engine)[1]
    shown = capsys.readouterr()
    assert "now talking to red=0.5,blue=0.5" in shown.out
    assert "error: The adapter 'nobody' does not exist." in shown.err
    assert "error: the weight of 'red'" in shown.err


def test_an_unknown_adapter_changes_nothing(
    conversation: Conversation, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(conversation, typed("/adapter red", "One", "/adapter nobody", "Two"))
    assert [command.adapter.name for command in engine.commands] == ["red", "red"]
    assert "One" in prompts(engine)[1]
    assert "error: The adapter 'nobody' does not exist." in capsys.readouterr().err


def test_single_turns_forget(conversation: Conversation, engine: Any) -> None:
    conversation.single_turn = True
    talk(conversation, typed("One", "Two"))
    assert "One" not in prompts(engine)[1]


def test_a_new_conversation_forgets(conversation: Conversation, engine: Any) -> None:
    talk(conversation, typed("One", "/new", "Two"))
    assert "One" not in prompts(engine)[1]


def test_commands_help_themselves(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk(conversation, typed("/help", "/adapters", "/fly away"))
    shown = capsys.readouterr()
    assert "/adapter NAME" in shown.out
    assert "blue\nred\n" in shown.out
    assert "error: /fly is no command; accepted are /adapter" in shown.err


def test_a_failed_answer_is_told_and_its_question_forgotten(
    conversation: Conversation, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(_: str) -> str:
        asked = len(engine.commands)
        engine.script.error = ContextLengthError("The prompt is too long.") if asked == 0 else None
        if asked == 2:
            raise EOFError
        return ("One", "Two")[asked]

    talk(conversation, lines)
    assert "error: The prompt is too long." in capsys.readouterr().err
    assert "One" not in prompts(engine)[1]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_heard(
    conversation: Conversation, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script.delay = 0.02

    def interrupted(text: str) -> str:
        if text == "o" and len(engine.commands) == 1:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr("loraplex.server.cli_chat.printable", interrupted)
    talk(conversation, typed("One", "Two", KeyboardInterrupt, "Three"))
    assert len(engine.commands) == 2
    assert "<assistant>Hello<user>Two" in prompts(engine)[1]
    assert engine.aborted == [engine.commands[0].request_id]


def test_a_conversation_with_an_unknown_adapter_does_not_begin(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(typer.Exit):
        chat(url=url, adapter="nobody")
    assert "'nobody' does not exist" in capsys.readouterr().err


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x9bc\n\té👋") == "a\ufffd[2Jb\ufffd\ufffdc\n\té👋"
