"""The text of --help, built without importing Hydra or MLX so that it appears at once."""

from __future__ import annotations

import textwrap

from runner.cli.commands import COMMANDS
from runner.config.groups import group_choices
from runner.config.schema import GROUPS

_WIDTH = 88
_TOP = """\
runner - fine-tune language models with LoRA on MLX, one config and one directory a run

  python -m runner [group=choice] [setting=value] …     start a run (with -m a sweep)
  python -m runner COMMAND …                            work with runs that exist

Without arguments it fine-tunes SmolLM2-135M on text-to-SQL. Every run has a directory
of its own under outputs/; a run that stopped resumes from its checkpoints exactly.

Groups (such as model=tiny):
"""
_BOTTOM = """
Settings (section.key=value; docs/config.md explains all of them):
  model.path data.path lora.rank lora.alpha lora.num_layers optimizer.learning_rate
  schedule.warmup train.iters train.batch_size train.eval_every checkpoint.every seed …

Examples:
  python -m runner lora.rank=16 optimizer.learning_rate=2e-4
  python -m runner model=qwen3_0_6b data=folder data.path=my_data
  python -m runner -m lora.rank=4,8,16 optimizer.learning_rate=1e-4,3e-4     a sweep
  python -m runner resume=outputs/2026-11-24/10-00-00                        resume exactly
  python -m runner repeat=outputs/2026-11-24/10-00-00 lora.rank=32           a new run with changes
  python -m runner adapter=old/adapters.npz                                  start from an adapter
  python -m runner lora.rank=16 supervise=true                               survive kills and the GPU

Commands (runner COMMAND --help):
COMMANDS

More:
  --cfg job            print the composed config and exit
  --config-dir DIR     also use the groups and experiments in DIR
  -m                   a sweep: one job for each combination of comma-separated values
  -sc install=bash     shell completion: eval "$(runner -sc install=bash)"
  --version

Exit codes: 0 done, 1 failed, 2 wrong configuration or input, 3 directory in use,
4 loss not finite, 5 checkpoint damaged, 6 out of memory, 7 GPU error, 8 supervise=true gave
up, 9 another rank lost, 74 storage error, 130/143/129 stopped by Ctrl-C, SIGTERM or hang-up and resumable.
"""


def help_text() -> str:
    """Return the help, with the choices that conf/ holds and all commands."""
    groups = "\n".join(_wrap(f"{group:<11}", ", ".join(group_choices(group))) for group in GROUPS)
    commands = "\n".join(_wrap(f"{name:<10}", summary) for name, summary in COMMANDS.items())
    return _TOP + groups + "\n" + _BOTTOM.replace("COMMANDS", commands)


def _wrap(label: str, text: str) -> str:
    indent = "  " + " " * len(label)
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {label}", subsequent_indent=indent, break_on_hyphens=False)
