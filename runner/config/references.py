"""References to environment variables in settings, `${oc.env:NAME}`, which a stored config keeps as written."""

from __future__ import annotations

import re

# OmegaConf allows blanks there.
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")


def has_environment_reference(text: str) -> bool:
    """Return whether `text` refers to an environment variable, so that its resolved form may be a secret."""
    return _ENVIRONMENT.search(text) is not None
