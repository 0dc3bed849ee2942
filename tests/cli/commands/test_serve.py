"""`runner serve` answers HTTP requests as `runner generate` does, and refuses what it cannot answer rightly."""

from __future__ import annotations

import inspect
import json
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm.server
import pytest

from runner.cli.commands import generate, serve
from runner.common.errors import ConfigError, ModelError
from runner.inference.serve import ServeOptions, _arguments

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "twice: sour"}]


class Server:
    """A server process on a free port of the loopback device."""

    def __init__(self, cli: Any, *arguments: str) -> None:
        self.process = cli.start("serve", *arguments, "--port", "0")
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+/v1); Ctrl-C ends", line)
        assert found, line + (self.process.communicate()[0] if self.process.poll() is not None else "")
        self.url = found[1]

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, messages: Any = QUESTION, **body: Any) -> str:
        status, content = self.post("/chat/completions", messages=messages, **body)
        assert status == 200, content
        return json.loads(content)["choices"][0]["message"]["content"]

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_cli: Callable) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_cli(folder, in_process=True)("model=tiny", "data=tiny", "train.iters=12", "hydra.run.dir=run")
    return folder / "run"


@pytest.fixture(scope="module")
def server(run: Path, make_cli: Callable) -> Iterator[Server]:
    """A server for all tests of this module; Ctrl-C ends it, with the exit code of a stop."""
    served = Server(make_cli(run.parent), "run")
    try:
        yield served
        code, output = served.stop()
        assert code == 130
        assert "Traceback" not in output and "runner:" not in output
    finally:
        served.process.kill()
        served.process.communicate()


def generated(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert generate.run([str(run), "twice: sour", "--json", "--max-tokens", "12", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["answers"][-1]["text"]


def test_the_answer_is_that_of_generate(run: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    expected = generated(run, capsys)
    assert server.ask(max_tokens=12) == expected
    assert server.ask(max_tokens=12, model="run") == expected
    assert server.ask(max_tokens=12, seed=1) == expected  # not in a batch
    with_system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert server.ask(with_system, max_tokens=12) == generated(run, capsys, "--system", "Be brief.")
    parts = [{"role": "user", "content": [{"type": "text", "text": "twice: "}, {"type": "text", "text": "sour"}]}]
    assert server.ask(parts, max_tokens=12) == expected


def test_a_stream_has_the_same_answer(run: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = server.post("/chat/completions", messages=QUESTION, max_tokens=12, stream=True)
    lines = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
    assert status == 200 and lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert len(deltas) > 2
    assert "".join(deltas) == generated(run, capsys)


def test_requests_that_come_together_get_the_same_answers(server: Server) -> None:
    questions = [
        [{"role": "user", "content": text}] for text in ("a", "swap: red blue", "twice: sour", "abcdefghijk" * 4)
    ]
    alone = [server.ask(question, max_tokens=8) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda question: server.ask(question, max_tokens=8), questions)) == alone


def test_what_cannot_be_answered_rightly_is_refused(server: Server) -> None:
    def refused(expected: int = 400, **body: Any) -> str:
        status, content = server.post("/chat/completions", **{"messages": QUESTION, "max_tokens": 2, **body})
        assert status == expected, content
        return json.loads(content)["error"]

    assert "one model, run," in refused(404, model="meta-llama/Llama-3.2-3B")
    assert "one model, run," in refused(404, adapters="/etc")
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
    assert "not text" in refused(messages=[{"role": "user", "content": [image]}])
    assert "list of one message or more" in refused(messages=[])
    assert "must be an object" in refused(messages=["a"])
    assert "does not read it" in refused(chat_template_kwargs={"enable_thinking": True})
    assert "context ends at 2,048" in refused(messages=[{"role": "user", "content": "x" * 3000}])
    assert server.ask(max_tokens=2)  # it goes on


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": ["a", "b"]},
        {"prompt": None},
        {"prompt": "a", "stop": [5]},
        {"prompt": "a", "stop": ["", "b"]},
        {"prompt": "a", "logit_bias": {"x": 1}},
        {"prompt": "a", "logit_bias": {"5": "y"}},
    ],
    ids=str,
)
def test_what_would_end_the_generation_is_refused_and_the_server_answers_on(server: Server, body: Any) -> None:
    status, content = server.post("/completions", **body, max_tokens=2)
    assert status == 400 and json.loads(content)["error"].split()[1] == "must", content
    assert server.ask(max_tokens=2)


def test_other_hosts_and_huge_requests_are_refused(server: Server) -> None:
    for headers, expected in (({"Host": "evil.example:80"}, 421), ({"Content-Length": str(10**11)}, 413)):
        request = urllib.request.Request(f"{server.url}/completions", b"{}", headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == expected
    assert server.ask(max_tokens=2)


def test_a_server_that_can_answer_nothing_more_ends(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    clients: list[threading.Thread] = []

    def ask(url: str) -> None:
        body = json.dumps({"messages": QUESTION, "max_tokens": 2}).encode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/chat/completions", body, timeout=60)
        asked.append(refused.value.code)

    def announce(url: str, name: str, adapter: str) -> None:
        clients.append(threading.Thread(target=ask, args=(url,)))
        clients[0].start()

    monkeypatch.setattr(serve, "_announce", announce)
    monkeypatch.setattr(mlx_lm.server.ResponseGenerator, "_make_state_machine", lambda *_: 1 / 0)
    with pytest.raises(ModelError, match="generation failed on a request"):
        serve.run([str(run), "--port", "0"])
    clients[0].join(timeout=60)  # the server may end before its client has read the answer
    assert asked == [404]


def test_the_one_model_is_listed_and_pages_of_other_origins_get_no_access(server: Server) -> None:
    request = urllib.request.Request(f"{server.url}/models", headers={"Origin": "http://elsewhere.example"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["run"]
        assert response.headers["Access-Control-Allow-Origin"] is None


@pytest.mark.long
def test_a_run_without_a_template_answers_plain_prompts_alone(run: Path, make_cli: Callable) -> None:
    served = Server(make_cli(run.parent), "run", "data.chat_template=false")
    status, content = served.post("/chat/completions", messages=QUESTION)
    assert status == 400 and "use /v1/completions" in content
    status, content = served.post("/completions", prompt="twice: sour", max_tokens=2)
    assert status == 200 and json.loads(content)["choices"][0]["text"]
    assert served.stop()[0] == 130


def test_an_address_in_use_is_refused_before_a_model_is_loaded(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be served: .*in use"):
            serve.run([str(run), "--port", str(port), "model.path=nowhere"])


def test_every_argument_that_mlx_lms_server_reads_is_there() -> None:
    options = ServeOptions(host="", port=0, max_tokens=1, temperature=0, top_p=1, top_k=0, min_p=0, origins=[])
    read = set(re.findall(r"cli_args\.(\w+)", inspect.getsource(mlx_lm.server)))
    assert len(read) > 15
    assert read <= set(vars(_arguments(options)))
