"""What transformers learns about itself is the same from the cache, from a damaged cache and from none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import quick_imports

ROOT = Path(__file__).resolve().parents[1]
# Prints how often transformers' files were read through, and a digest of what came out.
LOOK = """
import hashlib, sys
from pathlib import Path
from runner import quick_imports
if {hooked}: quick_imports.install()
read = 0
def watch(event, args):
    global read
    if event == "open" and "modeling_llama.py" in str(args[0]): read += 1
sys.addaudithook(watch)
import transformers
from transformers import AutoTokenizer
from transformers.utils import import_utils
folder = Path(transformers.__file__).parent / "models"
told = []
for prefix in (None, "models"):
    for place in (folder, str(folder / "__init__.py")):
        found = import_utils.define_import_structure(place, prefix)
        told.append(sorted((sorted(k), sorted((n, sorted(v)) for n, v in of.items())) for k, of in found.items()))
other = import_utils.define_import_structure(folder / "llama")
told.append(sorted(str(sorted(k)) for k in other))
print(read, hashlib.sha256(repr(told).encode()).hexdigest(), AutoTokenizer.__module__)
"""


def look(cache: Path, hooked: bool = True) -> list[str]:
    environment = {**os.environ, "RUNNER_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    code = LOOK.format(hooked=hooked)
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return out.stdout.split()


@pytest.mark.slow
def test_the_answer_is_transformers_own_and_the_second_import_reads_no_model_file(tmp_path):
    plain = look(tmp_path / "unused", hooked=False)
    first, second = look(tmp_path), look(tmp_path)
    assert int(plain[0]) >= 2 and not (tmp_path / "unused").exists()
    assert second[0] == "1"  # the look at one model's folder, which is not kept
    assert int(first[0]) < int(plain[0])
    assert plain[1:] == first[1:] == second[1:]
    (file,) = (tmp_path / "imports").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert look(tmp_path)[1:] == plain[1:]
    assert json.loads(file.read_bytes()) == json.loads(whole)


@pytest.mark.parametrize("damaged", [b"", b"[[1]]", b"\xff", b"{}", b'[["torch", 1]]'])
def test_what_is_damaged_is_no_answer(tmp_path, damaged):
    (tmp_path / "file").write_bytes(damaged)
    assert quick_imports._read(tmp_path / "file") in (None, {})


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert look(tmp_path / "file")[1:] == look(tmp_path)[1:]


def test_another_place_than_that_of_the_wheel_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    models = tmp_path / "transformers" / "models"
    models.mkdir(parents=True)
    calls = []

    def own(path, prefix=None):
        calls.append(path)
        return {frozenset(): {"llama": {"Llama"}}}

    ours = quick_imports.remembering(own, models)
    assert ours(models) == ours(models) == {frozenset(): {"llama": {"Llama"}}}
    assert len(calls) == 2 and not (tmp_path / "imports").exists()
