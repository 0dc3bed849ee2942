"""`runner serve`: answer HTTP requests with a run's adapter, through mlx-lm's own server."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.common.text import relative_path

_DEFAULT_HOST, _DEFAULT_PORT = "127.0.0.1", 8080
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(argv: list[str]) -> int:
    """Serve the adapter that `argv` names until Ctrl-C.

    Raises:
        RunnerError: a wrong argument, an address that is in use, or an adapter or base model that cannot be used.
        KeyboardInterrupt: Ctrl-C.
    """
    options = _parse(argv)
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapter
    from runner.inference.serve import RunServer, ServeOptions

    server = RunServer(
        ServeOptions(
            host=options.host,
            port=options.port,
            max_tokens=options.max_tokens,
            temperature=options.temp,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            origins=options.allow_origin or [],
        )
    )
    try:
        loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
        name = options.name or relative_path(source.run)
        if options.host not in _LOOPBACK:
            arguments.print_note("whoever can reach this address can use the model: there is no password")
        server.serve(loaded.base, settings.config, name, on_ready=lambda: _announce(server.url, name, source.name))
    finally:
        server.close()
    return 0


def _announce(url: str, name: str, adapter: str) -> None:
    print(f"serving {name} ({adapter}) at {url}; Ctrl-C ends", flush=True)


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("serve", has_json=False)
    parser.add_argument("--host", default=_DEFAULT_HOST, help=f"address to listen at (default: {_DEFAULT_HOST})")
    parser.add_argument(
        "--port",
        type=arguments.number(int, lambda n: 0 <= n < 65536, "a port, or 0 for a free one"),
        default=_DEFAULT_PORT,
        help=f"port to listen at, 0 for a free one (default: {_DEFAULT_PORT})",
    )
    parser.add_argument("--name", help="what clients call the model (default: the path of the run)")
    parser.add_argument(
        "--allow-origin", action="append", metavar="URL", help="let pages of this web origin call the server; * for all"
    )
    parser.add_max_tokens(512)
    parser.add_sampling()
    return parser.parse(argv)
