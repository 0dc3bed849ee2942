"""Write trl.json: the token ids of the tests against TRL, what TRL's trainers compute on them, and how it was made.

Prints how far our updates are from TRL's. TRL is in the Python RUNNER_REFERENCE_PYTHON:

    python tests/training/methods/reference/record_trl.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from runner.backends import blas  # noqa: E402

blas.load_blas()  # before MLX is imported

from trl_updates import (  # noqa: E402
    OURS,
    RECORDED,
    RUNS,
    Batches,
    adapted_model,
    before_training,
    compare,
    mx,
    np,
    our_names,
    our_update,
    run_trl,
    their_measures,
    their_summary,
)

from runner.models.lora import AdaptedModel  # noqa: E402


def make_batches(adapted: AdaptedModel) -> Batches:
    """Return batches of random prompts, with answers of which the adapted model finds some likely."""
    random = np.random.default_rng(11)

    def tokens(count: int) -> list[int]:
        return random.integers(3, 259, count).tolist()

    def likely(prompt: list[int], count: int) -> list[int]:
        found = list(prompt)
        while len(found) < len(prompt) + count:
            logits = np.array(adapted.model(mx.array([found]))[0, -1], np.float64)
            found.append(int((logits + random.gumbel(size=logits.shape)).argmax()))
        return found[len(prompt) :]

    adapted.model.eval()
    prompts = [tokens(int(count)) for count in (5, 3, 7, 4)]
    lengths = [(6, 4), (9, 11), (3, 5), (7, 2)]
    pairs = [
        {"prompt": prompt, "chosen": likely(prompt, good), "rejected": tokens(bad)}
        for prompt, (good, bad) in zip(prompts, lengths, strict=True)
    ]
    short = [{**pair, "prompt": pair["prompt"][-1:]} for pair in pairs]
    answers = [likely(prompt, good) for prompt, (good, _) in zip(prompts, lengths, strict=True)]
    labeled = [
        {"prompt": prompt, "answer": answer, "mismatched": likely(prompt, bad), "good": number != 1}
        for number, (prompt, answer, (_, bad)) in enumerate(zip(prompts, answers, lengths, strict=True))
    ]
    with_adapter = adapted.params()
    adapted.place(before_training(with_adapter))
    unlikely = [{**row, "mismatched": likely(row["prompt"], len(row["mismatched"]))} for row in labeled]
    adapted.place(with_adapter)
    groups = [
        {"prompt": prompt, "answers": [likely(prompt, int(n)) for n in random.integers(2, 13, 4)], "rewards": rewards}
        for prompt, rewards in zip(
            prompts, ([1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0] * 4, [0.0, 0.0, 0.0, 1.0]), strict=True
        )
    ]
    return {
        "pairs": pairs,
        "pairs without a prompt": short,
        "labeled": labeled,
        "labeled, unlikely": unlikely,
        "labeled, good": [{**row, "good": True} for row in labeled],
        "labeled, bad": [{**row, "good": False} for row in labeled],
        "groups": groups,
    }


def main() -> None:
    python = os.environ["RUNNER_REFERENCE_PYTHON"]
    names = ("trl", "torch", "transformers", "peft")
    code = f"import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in {names!r}), sep=', ')"
    versions = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    batches = make_batches(adapted_model())
    with tempfile.TemporaryDirectory() as folder:
        trl = run_trl(Path(folder), batches)
    runs = {name: their_summary(trl, name) for name in RUNS}
    made = f"{versions}; written by tests/training/methods/reference/record_trl.py"
    lines = [
        f'{{"made": {json.dumps(made)}',
        *(f' "{kind}": {{\n{rows(found)}\n }}' for kind, found in (("batches", batches), ("runs", runs))),
    ]
    RECORDED.write_text(",\n".join(lines) + "\n}\n")
    for name in OURS:
        run = RUNS[name]
        for backend in ("mlx", "cpu"):
            for n in (1, 2):
                loss, grads, measures = our_update(run.method, batches[run.batch], backend, n)
                difference, relative = compare(loss, grads, float(trl[f"{name}/loss"]), our_names(trl, name))
                print(f"{name:36} {backend:4} {n} loss {difference:.1e} gradient {relative:.1e}")
                theirs = their_measures(trl, name)
                print("   ", *(f"{key} {value:.4f} {theirs.get(key, np.nan):.4f}" for key, value in measures.items()))


def rows(table: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache_folder:
        os.environ["RUNNER_CACHE"] = cache_folder
        main()
