"""The settings of the chat template, and what can be read in a template's text: dates and generation marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from runner.common.errors import DataError, did_you_mean
from runner.config.schema import DataConfig

_MAX_TEMPLATE_BYTES = 1_000_000
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ANY_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
DATE_FUNCTION = "strftime_now"
_GIVEN_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"),
    DATE_FUNCTION,
}
_DIRECTIVES = "aAbBcdDeFGghHIjmMnpRSTuUVwWxXyYzZ"
"""The letters of strftime's directives; each is replaced by its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateOptions:
    """What decides the text of a conversation beside the model's own template."""

    text: str | None = None
    """A template (jinja) that replaces the tokenizer's."""
    args: dict[str, Any] = field(default_factory=dict)
    """Variables for the template, such as enable_thinking."""
    date: str | None = None
    """The date (YYYY-MM-DD) that the template gets as today's; None for the real one."""

    @classmethod
    def from_config(cls, data: DataConfig) -> TemplateOptions:
        """Return the options of the data settings; the template is read from its file.

        Raises:
            DataError: the file cannot be read.
        """
        text = read_template(Path(data.template).expanduser()) if data.template is not None else None
        return cls(text=text, args=dict(data.template_args), date=data.template_date)


def read_template(file: Path) -> str:
    """Return the template in `file`.

    Raises:
        DataError: the file cannot be read, or is larger than any template.
    """
    try:
        with open(file, "rb") as opened:
            content = opened.read(_MAX_TEMPLATE_BYTES + 1)
        if len(content) > _MAX_TEMPLATE_BYTES:
            raise DataError(f"data.template={file}: larger than {_MAX_TEMPLATE_BYTES:,} bytes, so no chat template.")
        return content.decode()
    except OSError as error:
        raise DataError(f"data.template={file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"data.template={file} cannot be read: it is not UTF-8 text.") from None


def has_generation_marks(template: str) -> bool:
    """Return whether the template marks what the assistant writes with ``{% generation %}``."""
    return _MARKS.search(template) is not None


def read_variables(template: str) -> set[str] | None:
    """Return the variables that the template reads, beside those of the row; None where it cannot be parsed."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_ANY_MARK.sub("", template))
    except TemplateSyntaxError:
        return None  # rendering gives the reason
    return meta.find_undeclared_variables(parsed) - _GIVEN_VARIABLES


def require_read(args: Mapping[str, Any], template: str, also: Mapping[str, str]) -> None:
    """Refuse a variable in `args` that the template never reads: it would have no effect.

    `also` are further names of variables, with the names in the template.

    Raises:
        DataError: names the nearest variable that the template reads, or all of them.
    """
    variables = read_variables(template)
    if variables is None:
        return
    known = variables | {name for name, meant in also.items() if meant in variables}
    for name in args:
        if name not in known:
            listed = f"It reads: {', '.join(sorted(known))}." if known else "It reads none."
            raise DataError(
                f"data.template_args.{name} has no effect: the chat template does not read it."
                f"{did_you_mean(name, known)} {listed}"
            )


def writes_date(template: str) -> bool:
    """Return whether the template asks for today's date."""
    return DATE_FUNCTION in template


def with_fixed_date(template: str, date: str) -> str:
    """Return the template with `date` (YYYY-MM-DD) as today's, at midnight.

    A macro takes the place of the function ``strftime_now``: data given to a template may not contain functions.
    """
    moment = datetime.fromisoformat(date)
    steps = "".join(f"|replace('%{d}', '{moment.strftime(f'%{d}')}')" for d in _DIRECTIVES)
    unpadded = "".join(f"|replace('%-{d}', '{int(moment.strftime(f'%{d}'))}')" for d in "dmHIMSjyU")
    # `+%}` keeps the line break that the template may begin with.
    macro = f"{{%- macro {DATE_FUNCTION}(format) -%}}{{{{- format{unpadded}{steps} -}}}}{{%- endmacro +%}}"
    return macro + template
