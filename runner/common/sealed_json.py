"""JSON objects that carry their own checksum, so that a flipped bit or a cut is found.

The last member, ``"sha256"``, is the SHA-256 (hex) of all bytes before its value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from runner.common import safe_json

_KEY = b',\n "sha256": "'
_END = b'"\n}\n'
_DIGEST_LENGTH = 64


def seal(record: Mapping[str, Any]) -> bytes:
    """Return `record`, which has to have a member, as JSON with its checksum as the last one."""
    body = json.dumps(record, indent=1, allow_nan=False).removesuffix("\n}").encode() + _KEY
    return body + hashlib.sha256(body).hexdigest().encode() + _END


def unseal(data: bytes, *, max_values: int) -> dict[str, Any]:
    """Return the record that `seal` was given.

    Args:
        max_values: bound of the number of values in it, as of `safe_json.parse`.

    Raises:
        ValueError: with the reason why it is not, byte for byte, what `seal` returned.
    """
    end = len(data) - len(_END)
    body, digest = data[: max(0, end - _DIGEST_LENGTH)], data[max(0, end - _DIGEST_LENGTH) : max(0, end)]
    if not (data.endswith(_END) and body.endswith(_KEY)):
        raise ValueError("it is cut short or has no checksum")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its own checksum does not match: it was changed or damaged")
    record = safe_json.parse_object(data, max_values=max_values)
    del record["sha256"]
    return record
