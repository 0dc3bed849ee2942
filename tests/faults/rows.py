"""The faults that runs have to survive, by number, and what must hold; each test here names the row it covers.

"Equal": the run ends bitwise equal to one that was never interrupted. docs/reliability.md has the same rows.
"""

ROWS = {
    1: "SIGKILL at random times: the run resumes, Equal",
    2: "SIGKILL at each system call of a save: the old checkpoint or the new one is whole",
    3: "SIGKILL while old checkpoints are removed: another valid one remains, leftovers are removed",
    4: "SIGKILL while a metrics row is written: no step is missing, none appears twice",
    5: "SIGKILL three times, inside gradient accumulation, at the end of an epoch, during evaluation: Equal",
    6: "power cut, whatever was not synced is lost: a valid checkpoint loads",
    7: "full disk, file size limit, EIO on write, fsync, close, rename: exit code 74, the old checkpoint intact",
    8: "truncated files and flipped bits: each is detected and named, the checkpoint before it is used",
    9: "all checkpoints damaged: the resume is refused, the run never starts over silently",
    10: "the checkpoint that the user named is damaged: an error, no other one is used",
    11: "two runs in one directory: the second is refused with the pid of the first; a killed run holds no lock",
    12: "runs started in the same second: each has a directory of its own",
    13: "output directory read-only, missing or a file: refused before the model is loaded",
    14: "SIGTERM or Ctrl-C in a step, a save, an evaluation: saved, exit code 143 or 130, Equal; a second ends at once",
    15: "loss or metric NaN or Inf: stops before the update, is never the best, the last finite checkpoint remains",
    16: "invalid data: reported with file and line before training, or left out and counted",
    17: "data, base model or adapter shape changed: refused with the difference",
    18: "a setting changed on resume: refused where it is frozen, else applied and logged",
    19: "another base model of the same shapes: refused by its fingerprint",
    20: "the clock jumps by a year: the newest checkpoint and the rotation are the same",
    21: "symbolic links, '..', absolute names, FIFOs: nothing outside the run directory is touched",
    22: "hostile safetensors files: refused in under a second and under 200 MB",
    23: "YAML bombs, Python tags, _target_, pickles: nothing is executed, refused in under a second",
    24: "best outside the last K, equal losses, higher steps of another run: best, newest, resume source are retained",
    25: "a save fails in the background: the run stops at the next step, exit code not 0",
    26: "a job of a sweep fails, diverges or is killed: the others finish, it is reported, exit code not 0",
    27: "a sweep is killed: its resume runs failed jobs again, continues interrupted ones, keeps the rest; Equal",
    28: "secrets in the environment or the config: in no file that a run writes",
}
