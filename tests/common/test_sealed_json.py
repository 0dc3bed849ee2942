"""A sealed record comes back as it was, and nothing else comes back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.common.sealed_json import seal, unseal

RECORD = {"schema": 1, "files": {"a": {"size": 3}}, "note": "Ω"}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(record=st.dictionaries(st.text().filter(lambda key: key != "sha256"), VALUES, min_size=1, max_size=4))
def test_a_record_comes_back_as_it_was(record):
    assert unseal(seal(record), max_values=10_000) == record


def test_a_sealed_record_is_readable_json_with_its_checksum_last():
    assert list(json.loads(seal(RECORD))) == [*RECORD, "sha256"]


@pytest.mark.parametrize("cut", range(0, len(seal(RECORD))))
def test_a_cut_record_is_refused(cut):
    with pytest.raises(ValueError, match="cut short"):
        unseal(seal(RECORD)[:cut], max_values=100)


def test_a_flipped_bit_is_found_anywhere():
    data = seal(RECORD)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 4
        with pytest.raises(ValueError):
            unseal(bytes(flipped), max_values=100)
