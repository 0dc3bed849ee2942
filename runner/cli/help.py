"""The text of --help, made without importing Hydra or MLX so that it answers at once."""

from __future__ import annotations

from runner.cli.commands import COMMANDS
from runner.config.groups import group_choices
from runner.config.schema import GROUPS

_TOP = """\
runner - fine-tune language models with LoRA on MLX, one config and one directory a run

  python -m runner [group=choice] [setting=value] …

Without a word it fine-tunes SmolLM2-135M on text-to-SQL. Every run writes its own
directory under outputs/, with checkpoints; what stopped goes on from there exactly.

Groups (python -m runner model=tiny):
"""
_BOTTOM = """
Settings (any of them as section.key=value; docs/config.md explains all):
  model.path data.path lora.rank lora.alpha lora.num_layers optimizer.learning_rate
  schedule.warmup train.iters train.batch_size train.eval_every checkpoint.every seed …

Examples:
  python -m runner lora.rank=16 optimizer.learning_rate=2e-4
  python -m runner model=qwen3_0_6b data=folder data.path=my_data
  python -m runner -m lora.rank=4,8,16 optimizer.learning_rate=1e-4,3e-4     a sweep
  python -m runner resume=outputs/2026-11-24/10-00-00                        go on, exactly
  python -m runner repeat=outputs/2026-11-24/10-00-00 lora.rank=32           again, changed
  python -m runner adapter=old/adapters.npz                                  warm start

Verbs, over output directories (runner VERB --help):
VERBS

More:
  --cfg job            print the composed settings and stop
  --config-dir DIR     your own groups and experiments beside ours
  -m                   sweep: comma-separated values multiply
  -sc install=bash     shell completion: eval "$(runner -sc install=bash)"
  --version

Exit codes: 0 done, 1 failed, 2 wrong configuration or input, 3 directory in use,
4 loss not finite, 5 checkpoint damaged, 74 storage, 130/143/129 stopped (Ctrl-C, SIGTERM, hang-up), resumable.
"""


def help_text() -> str:
    """The help, with the choices that conf/ holds now."""
    rows = []
    for group in GROUPS:
        names = group_choices(group)
        rows.append(f"  {group:<11}{', '.join(names)}")
    verbs = "\n".join(f"  {verb:<10}{about}" for verb, about in COMMANDS.items())
    return _TOP + "\n".join(_folded(row) for row in rows) + "\n" + _BOTTOM.replace("VERBS", verbs)


def _folded(row: str, width: int = 88) -> str:
    out, line = [], ""
    for part in row.split(", "):
        piece = part if not line else f", {part}"
        if len(line) + len(piece) > width:
            out.append(f"{line},")
            line = f"{'':<13}{part}"
        else:
            line += piece
    return "\n".join([*out, line])
