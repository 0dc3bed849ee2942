"""`runner chat` keeps a history, obeys its commands, and serves scripts as well as people."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cli.commands import chat, generate
from runner.cli.commands.chat_session import ChatSession, Speaker
from runner.common.errors import ConfigError
from runner.inference.conversation import Piece


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_cli: Callable) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    settings = ["data.max_length=128", "optimizer.learning_rate=1e-3", "schedule=constant", "train.iters=12"]
    make_cli(folder, in_process=True)("model=tiny", "data=tiny", *settings, "hydra.run.dir=run")
    return folder / "run"


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`say(lines, *arguments)` pipes lines into the chat and returns what it prints."""

    def do(lines: list[str], *arguments: str) -> Any:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert chat.run([*arguments]) == 0
        return capsys.readouterr()

    return do


def answers(printed: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.out.splitlines()]


def test_the_first_answer_is_that_of_generate_and_the_second_one_sees_it(
    run: Path, say: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = answers(say(["twice: sour", "swap: red blue"], str(run), "--json", "--max-tokens", "12"))
    generate.run([str(run), "twice: sour", "--json", "--max-tokens", "12"])
    expected = json.loads(capsys.readouterr().out)
    assert first["message"] == "twice: sour"
    assert first["answers"][0]["text"] == expected["answers"][0]["text"]
    assert first["answers"][0]["prompt_tokens"] == expected["prompt_tokens"]
    alone = answers(say(["swap: red blue"], str(run), "--json", "--max-tokens", "12"))[0]["answers"][0]
    assert second["answers"][0]["prompt_tokens"] > alone["prompt_tokens"] + 12
    assert second["answers"][0]["reused_tokens"] >= expected["prompt_tokens"]


def test_base_and_adapter_answer_side_by_side_each_with_its_own_history(run: Path, say: Callable) -> None:
    options = ["--json", "--max-tokens", "12"]
    messages = ["twice: sour", "swap: red blue"]
    both = answers(say(messages, str(run), "--base", *options))
    adapter = answers(say(messages, str(run), *options))
    for together, alone in zip(both, adapter, strict=True):
        base_answer, adapter_answer = together["answers"]
        assert (base_answer["by"], adapter_answer["by"]) == ("base", "adapter (step 12)")
        assert adapter_answer == alone["answers"][0]
    assert both[0]["answers"][0]["text"] != both[0]["answers"][1]["text"]
    out = say(messages, str(run), "--base", "--max-tokens", "2").out
    assert out.index("--- base") < out.index("--- adapter (step 12)")


def test_commands_change_the_conversation(run: Path, say: Callable, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    lines = [
        "abc",
        "def",
        "/undo",
        f"/save {saved}",
        "/reset",
        "/undo",
        "/system Be brief.",
        "/system",
        "//abc",
        "/quit",
        "no",
    ]
    printed = say(lines, str(run), "--max-tokens", "3")
    assert "the last message and its answer are removed" in printed.err and "nothing to undo" in printed.err
    assert "(system: Be brief.)" in printed.err
    (row,) = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == "abc"
    spoken = answers(say(["/system Be brief.", "//abc", "a\\", "b"], str(run), "--max-tokens", "3", "--json"))
    assert [answer["message"] for answer in spoken] == ["/abc", "a\nb"]
    plain = answers(say(["//abc"], str(run), "--max-tokens", "3", "--json"))
    assert spoken[0]["answers"][0]["prompt_tokens"] > plain[0]["answers"][0]["prompt_tokens"] + 9
    assert answers(say(["//abc"], str(run), "--max-tokens", "3", "--json", "--system", "Be brief."))[0] == spoken[0]


def test_a_saved_conversation_is_data_to_train_on(
    run: Path, say: Callable, tiny: Callable, train: Callable, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    say(["abc", f"/save {data / 'train.jsonl'}"], str(run), "--max-tokens", "12", "--temp", "1")
    trained = train(tiny(**{"data.path": str(data), "train.iters": 1}), tmp_path / "next")
    assert json.loads((trained / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/sytem x"], "/sytem is not a command. Did you mean '/system'"),
        (["/save"], "needs the name of a file"),
        (["/save {run}/config.yaml"], "exists already"),
        (["x" * 3000], "the model's context ends at 2,048"),
    ],
)
def test_a_script_ends_where_a_line_cannot_be_carried_out(
    run: Path, say: Callable, lines: list[str], message: str
) -> None:
    from runner.common.errors import RunnerError

    with pytest.raises(RunnerError, match=message):
        say([line.replace("{run}", str(run)) for line in lines], str(run), "--max-tokens", "3")


def test_a_conversation_longer_than_the_rows_of_the_training_says_so_once(run: Path, say: Callable) -> None:
    printed = say(["x" * 130, "y"], str(run), "--max-tokens", "3")
    assert printed.err.count("the run was trained on rows of at most 128") == 1


def test_a_run_without_a_template_takes_no_system_message(run: Path, say: Callable) -> None:
    with pytest.raises(ConfigError, match="needs a chat template"):
        say(["a"], str(run), "--system", "x", "data.chat_template=false")
    with pytest.raises(ConfigError, match="needs a chat template"):
        say(["/system x"], str(run), "data.chat_template=false")


class Terminal:
    """The chat on a terminal of its own."""

    def __init__(self, cli: Any, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        own = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True, "env": {"TERM": "dumb"}}
        self.process = cli.start("chat", *arguments, **own)
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until the screen shows `text`; what came before it is done with."""
        while text not in self.shown:
            assert select.select([self.master], [], [], 60)[0], self.shown
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        code = self.process.wait(60)
        os.close(self.master)
        return code


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(run: Path, cli: Any) -> None:
    terminal = Terminal(cli, str(run), "--max-tokens", "100000", "--history", "typed")
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    terminal.type("swap: red blue\n")
    terminal.wait_for("\r\n" * 5)  # the model goes on with line breaks to the end of its context, for seconds
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/undo\n")
    terminal.wait_for("its answer are removed")
    terminal.wait_for("> ")
    terminal.type("/nothing\n")
    terminal.wait_for("is not a command")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert (cli.folder / "typed").read_text().splitlines()[-2:] == ["/undo", "/nothing"]  # libedit escapes blanks


@pytest.mark.long
def test_on_a_terminal_ctrl_c_twice_ends_with_130(run: Path, cli: Any) -> None:
    terminal = Terminal(cli, str(run))
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("> ")
    terminal.interrupt()
    assert terminal.wait() == 130


@pytest.mark.parametrize("during_the_answer", [False, True])
def test_ctrl_c_that_stopped_an_answer_ends_the_chat_when_typed_again(
    during_the_answer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*arguments: object, **options: object) -> Iterator[Piece]:
        if during_the_answer:
            raise KeyboardInterrupt
        yield Piece("", 0, 0.0, 1, 0, "interrupted")

    def read() -> str:
        if asked:
            raise KeyboardInterrupt
        asked.append("abc")
        return asked[0]

    asked: list[str] = []
    reader: Any = SimpleNamespace(read=read, is_interactive=True)
    conversation: Any = SimpleNamespace(answer=answer)
    loaded: Any = SimpleNamespace(adapted=None, base=None)
    options: Any = {"max_tokens": 3, "sampler": None, "system": None, "trained_length": 9, "as_json": False}
    with pytest.raises(KeyboardInterrupt):
        ChatSession(loaded, [Speaker("base", conversation, False)], **options).run(reader)
    assert "Ctrl-C again" not in capsys.readouterr().err
