"""mlx-lm's HTTP server with a run's model in it. This module alone knows how that server is put together.

The server loads models by path, which stock mlx-lm cannot do for a GGUF file, for a base that is converted while
loading, or for the chat template of a run. So it is given a model that is in memory, and nothing but that one.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import APIHandler, CompletionRequest, ModelProvider, ResponseGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import maybe_set_recommended_wired_limit

from runner.common.errors import ConfigError, DataError, ModelError
from runner.config.schema import Config
from runner.data.row_errors import RowError
from runner.inference.conversation import context_length
from runner.inference.prompts import PromptEncoder
from runner.models.load import BaseModel
from runner.training.decoding import decode, why_not_in_batches

_MAX_BODY_BYTES = 64 << 20
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_CACHED_CONVERSATIONS = 10
"""Key-value caches kept for the next turn, as many as stock mlx-lm keeps."""
_PROBE_QUESTIONS = ("Hi", "What is it called?", "Name one thing that is red, one that is green and one that is blue.")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `runner serve` can be told."""

    host: str
    port: int
    """0 for any free one."""
    max_tokens: int
    """Default of a request that does not say."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    origins: list[str]
    """Web origins whose pages may call the server; none by default."""


class RunServer:
    """An HTTP server that is bound to its address; `serve` answers until Ctrl-C."""

    def __init__(self, options: ServeOptions) -> None:
        """Raises ConfigError if the address cannot be bound."""
        self._options = options
        try:
            self._http = _HttpServer((options.host, options.port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{options.host}:{options.port} cannot be served: {reason}. Choose another --port, or 0 for a free one."
            ) from None

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host, port = self._http.server_address[:2]
        name = str(host) if ":" not in str(host) else f"[{host!s}]"
        return f"http://{name}:{port}/v1"

    def serve(self, base: BaseModel, config: Config, name: str, on_ready: Callable[[], None]) -> None:
        """Answer requests with `base`, which may carry an adapter, until KeyboardInterrupt.

        `name` is what clients call the model; `on_ready` is called once requests are answered.

        Raises:
            ModelError: mlx-lm cannot generate with this architecture, or a request has ended its generation.
        """
        provider = _RunModel(base, config, name, self._options)
        maybe_set_recommended_wired_limit()
        generator = ResponseGenerator(provider, LRUPromptCache(_CACHED_CONVERSATIONS))
        self._http.RequestHandlerClass = partial(_Handler, generator)
        try:
            on_ready()
            self._http.serve_forever()
        finally:
            self._http.server_close()
            is_healthy = generator.is_healthy
            generator.stop_and_join()
        if not is_healthy:
            raise ModelError(
                "mlx-lm's generation failed on a request (see above), and answers none after it: start again."
            )

    def close(self) -> None:
        """Free the address."""
        self._http.server_close()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True  # a client that stays connected does not keep the process

    def __init__(self, address: tuple[str, int], handler: type[APIHandler]) -> None:
        self.is_local = address[0] in ("localhost", "127.0.0.1", "::1")
        if ":" in address[0]:
            import socket

            self.address_family = socket.AF_INET6
        super().__init__(address, handler)


class _RunModel(ModelProvider):
    """The one model that is served, in the place of mlx-lm's loader of models by path."""

    def __init__(self, base: BaseModel, config: Config, name: str, options: ServeOptions) -> None:
        super().__init__(_arguments(options))
        self.name, self.encoder = name, PromptEncoder(base.tokenizer, config)
        self.model, self.tokenizer = base.model, _RunTokenizer(base.tokenizer, config, context_length(base.config))
        self.model_key = (name, None, None)
        prompts = [self.encoder.encode([{"role": "user", "content": text}]) for text in _PROBE_QUESTIONS]
        decode(base, prompts[:1], 1, before_step=lambda: None, log=lambda line: None)
        # Requests that come together are answered in one batch, unless that gives other answers.
        reason = why_not_in_batches(base, prompts, options.max_tokens, cache_probe=config.train.cache_probes)
        self.is_batchable = reason is None
        mx.eval(base.model.parameters())  # the server computes on a thread of its own

    def load_default(self) -> None:
        """Do nothing: the model is loaded."""

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Raises:
            ValueError: a client asks for another model.
        """
        if model_path not in ("default_model", self.name) or adapter_path or draft_model_path != "default_model":
            raise ValueError(f"This server has one model, {self.name}, without a draft model or other adapters.")
        return self.model, self.tokenizer


class _RunTokenizer(TokenizerWrapper):
    """A tokenizer that renders conversations as the run's rows were rendered."""

    has_chat_template = True

    def __init__(self, wrapped: TokenizerWrapper, config: Config, context: int | None) -> None:
        """`context`: the tokens that the model can attend to; None where its config does not say."""
        self.__dict__.update(vars(wrapped))
        self._wrapped, self._config, self._context = wrapped, config, context

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Return the rendered conversation, or its token ids; `variables` are those of the request."""
        encoder = PromptEncoder(self._wrapped, self._config, variables)
        text = encoder.render(messages, tools, add_generation_prompt)
        return self._with_room(encoder.text.encode(text, add_special_tokens=False)) if tokenize else text

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the token ids of a plain prompt."""
        return self._with_room(list(self._wrapped.encode(text, **options)))

    def _with_room(self, tokens: list[int]) -> list[int]:
        """Raise _PromptTooLong where the model's context has no room for an answer after `tokens`, and return them."""
        if self._context is not None and len(tokens) >= self._context:
            raise _PromptTooLong(
                f"The prompt has {len(tokens):,} tokens, and the model's context ends at {self._context:,}."
            )
        return tokens


class _PromptTooLong(ValueError):
    """Raised for a prompt after which the model's context has no room for an answer."""


class _Handler(APIHandler):
    """mlx-lm's request handler for one model: it lists that one, and refuses what cannot be answered rightly."""

    server: _HttpServer

    def do_GET(self) -> None:
        """Answer a request for the model or the state of the server."""
        if self._is_for_this_machine():
            super().do_GET()

    def do_POST(self) -> None:
        """Answer a request for text; end the server where it can answer no other."""
        length = self.headers.get("Content-Length") or ""
        if not self._is_for_this_machine():
            return
        if length.isdecimal() and int(length) > _MAX_BODY_BYTES:
            self._refuse(413, f"The request has more than {_MAX_BODY_BYTES:,} bytes.")
            return
        super().do_POST()
        if not self.response_generator.is_healthy:
            self.server.shutdown()

    def handle_text_completions(self) -> CompletionRequest:
        """Return the request.

        Raises:
            ValueError: its prompt is no text, or has no token; mlx-lm's generation would end for all requests.
        """
        _check_options(self.body)
        prompt = self.body.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError("prompt must be a text; several prompts are several requests.")
        if not self._model.tokenizer.encode(prompt):
            raise ValueError("prompt must not be empty.")
        return super().handle_text_completions()

    def _is_for_this_machine(self) -> bool:
        """Refuse a request to another host's name where the server is reached from this machine alone: a page from
        elsewhere may have had its name resolved to this machine."""
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if self.server.is_local and name not in _LOOPBACK_NAMES:
            self._refuse(421, "This server answers on the loopback interface only.")
            return False
        return True

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """Begin an answer. mlx-lm has 404 for every prompt that it cannot answer, in the handler of what was raised."""
        if isinstance(sys.exc_info()[1], (_PromptTooLong, DataError, RowError)):
            status_code = 400
        super()._set_completion_headers(status_code)

    def _refuse(self, status: int, reason: str) -> None:
        self.close_connection = True
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": reason}).encode())

    def handle_chat_completions(self) -> CompletionRequest:
        """Return the request.

        Raises:
            ValueError: it has messages that this model was not trained on.
        """
        _check_options(self.body)
        _check_messages(self.body)
        if not self._model.encoder.uses_template:
            raise ValueError("The model was trained on plain prompts, without a chat template: use /v1/completions.")
        return super().handle_chat_completions()

    def handle_models_request(self) -> None:
        """List the model."""
        entry = {"id": self._model.name, "object": "model", "created": int(time.time()), "owned_by": "runner"}
        content = json.dumps({"object": "list", "data": [entry]}).encode()
        self._set_completion_headers(200)
        self.end_headers()
        self.wfile.write(content)

    @property
    def _model(self) -> _RunModel:
        model = self.response_generator.model_provider
        assert isinstance(model, _RunModel)
        return model


def _check_options(body: Mapping[str, Any]) -> None:
    """Raise ValueError for options that would end mlx-lm's generation for all requests."""
    stops = body.get("stop")
    if not all(isinstance(stop, str) and stop for stop in (stops if isinstance(stops, list) else [stops or "none"])):
        raise ValueError("stop must be a text, or a list of texts, none of them empty.")
    bias = body.get("logit_bias")
    if bias is not None and not (
        isinstance(bias, dict)
        and all(token.isdecimal() and type(value) in (int, float) for token, value in bias.items())
    ):
        raise ValueError("logit_bias must give a number for each of some token ids.")


def _check_messages(body: Mapping[str, Any]) -> None:
    """Raise ValueError unless `messages` are texts. mlx-lm would fetch images from anywhere before it looks further."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of one message or more.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} must be an object with role and content.")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise ValueError(f"message {number} has a part that is not text; only text is answered.")
        if any(part.get("type") != "text" for part in parts) or not isinstance(content, str | list | None):
            raise ValueError(f"message {number} has content that is not text; only text is answered.")


def _arguments(options: ServeOptions) -> Namespace:
    """Return the arguments that mlx-lm's server reads; those that `runner serve` has no option for as it sets them."""
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=0,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        allowed_origins=options.origins,
        temp=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        max_tokens=options.max_tokens,
        decode_concurrency=32,
        prompt_concurrency=8,
        prefill_step_size=2048,
        prompt_cache_size=_CACHED_CONVERSATIONS,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=5000,
        pipeline=False,
    )
