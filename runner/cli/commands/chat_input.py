"""Messages from standard input: typed with line editing, or one a line of a file or pipe."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from runner.common.errors import ConfigError, DataError

_PROMPT, _CONTINUED = "> ", "… "
_MOST_LINES = 1000
"""Lines that the history file keeps."""


class MessageReader:
    """Reads one message at a time. A line that ends with a backslash is continued in the next one."""

    def __init__(self, stream: TextIO, history: Path | None = None) -> None:
        """`history` is a file that keeps what is typed, for the arrow keys of the next session; None keeps nothing.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._stream, self._history = stream, history
        self.is_interactive = stream.isatty()
        """Whether a person types."""
        if self.is_interactive:
            self._start_editing()

    def read(self) -> str | None:
        """Return the next message, or None at the end of the input.

        Raises:
            DataError: the input is not text.
            KeyboardInterrupt: Ctrl-C.
        """
        lines: list[str] = []
        while True:
            try:
                line = self._read_line(_CONTINUED if lines else _PROMPT)
            except UnicodeDecodeError:
                raise DataError("Standard input is not UTF-8 text.") from None
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def close(self) -> None:
        """Write the history file, if there is one."""
        if self.is_interactive and self._history is not None:
            import readline

            readline.set_history_length(_MOST_LINES)
            try:
                readline.write_history_file(self._history)
            except OSError as error:
                raise ConfigError(f"--history {self._history} cannot be written: {error.strerror}.") from None

    def _read_line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            line = self._stream.readline()
            return line.removesuffix("\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    def _start_editing(self) -> None:
        try:
            import readline
        except ImportError:  # a Python built without it: lines are typed without editing
            self._history = None
            return
        readline.set_auto_history(True)
        if self._history is None:
            return
        try:
            readline.read_history_file(self._history)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"--history {self._history} cannot be read: {error.strerror}.") from None
