"""From mlx-lm's and mlx-examples' settings to ours, key by key. docs/migrating.md is the same as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.common.errors import did_you_mean
from runner.config import schema
from runner.config.groups import group_choices
from runner.data.source import HUB_ID
from runner.migrate.carry import Carried
from runner.migrate.old import EXAMPLES, MLX_LM, Old
from runner.migrate.rates import optimizer, schedule
from runner.migrate.values import Cannot, number, text, texts, truth, whole

_REMOTE_CODE = "importing does not switch it on: once you have read the model's code, add model.trust_remote_code=true"
_KEPT = {MLX_LM.name: "every save stays", EXAMPLES.name: "one file is overwritten"}
_HF_DATASET = (
    "data come from a folder here, or from a hub id that holds such files: write the rows to data/train.jsonl, "
    "data/valid.jsonl and data/test.jsonl, or give another folder with data.path"
)


def carry(old: Old, our_defaults: bool = False) -> Carried:
    """Everything that `old` says, and its program's own defaults, as our settings."""
    to = Carried(old, our_defaults)
    _model_and_data(to)
    _lora(to)
    optimizer(to)
    _lengths(to)
    schedule(to)
    _evaluation_and_saves(to)
    _around(to)
    if old.program is EXAMPLES:
        _examples(to)
    _rest(to)
    to.check()
    return to


def _model_and_data(to: Carried) -> None:
    to.put("model", text, "model.path")
    if to.old.said.get("hf_dataset"):
        to.leave("hf_dataset", _HF_DATASET)
        to.accept("hf_dataset", "its rows", {}, {"data": "folder"}, "the folder data/, once it is written")
        to.elsewhere("data", "hf_dataset wins over it there")
    else:
        to.elsewhere("hf_dataset", "empty: not used")
        # With the group, because our default data set brings a metric of its own.
        to.put("data", text, "data.path", note=_of_the_hub(to.value("data")), groups={"data": "folder"})
    note = "" if to.old.said.get("mask_prompt") else "there the prompt is learned too"
    to.put("mask_prompt", truth, "data.mask_prompt", note=note)
    to.put("max_seq_length", whole, "data.max_length")
    source = to.old.said.get("hf_dataset")
    single = source if isinstance(source, dict) else {}
    for feature, name in (
        ("prompt_feature", "prompt"),
        ("completion_feature", "completion"),
        ("text_feature", "text"),
        ("chat_feature", "messages"),
    ):
        if feature in single and feature not in to.old.said:
            _try(to, f"hf_dataset.{feature}", single[feature], text, f"data.keys.{name}")
        to.put(feature, text, f"data.keys.{name}")


def _lora(to: Carried) -> None:
    kind = to.value("fine_tune_type") or "lora"
    known = schema.metadata()["lora.type"].choices
    if to.has("fine_tune_type") and kind not in known:
        to.leave("fine_tune_type", f"not there yet ({', '.join(map(str, known))}): the command below trains lora")
    else:
        to.put("fine_tune_type", text, "lora.type")
    if "lora_layers" in to.old.said:
        to.seen.add("lora_layers")
        if "num_layers" in to.old.said:
            to.elsewhere("lora_layers", "num_layers is given as well and counts")
        else:
            new = to.old.program is MLX_LM
            _layers(
                to, "lora_layers", "an older name of num_layers; mlx-lm 0.32 ignores it without a word" if new else ""
            )
    if "lora_layers" not in to.old.said or "num_layers" in to.old.said:
        _layers(to, "num_layers", "")
    _lora_parameters(to)


def _layers(to: Carried, key: str, note: str) -> None:
    layers = to.read(key, whole) if to.has(key) else None
    if layers is None:
        return
    if to.old.program is EXAMPLES and layers < 1:
        to.leave(key, "there it adapts no layer at all; -1 means all of them here: add lora.num_layers=-1")
    elif layers < 1:
        note = note or ("" if layers == -1 else f"{layers} means all blocks there")
        to.put(key, whole, "lora.num_layers", note=note, value=-1)
    else:
        to.put(key, whole, "lora.num_layers", note=note)


def _lora_parameters(to: Carried) -> None:
    if "lora_parameters" not in to.old.said:
        return
    given = to.value("lora_parameters")
    if not isinstance(given, dict):
        to.leave("lora_parameters", "it is not a mapping with rank, scale and dropout")
        return
    given = {str(k): v for k, v in given.items()}
    for name in ("rank", "scale", "dropout"):
        if given.get(name) is None and not (name == "scale" and given.get("alpha") is not None):
            to.leave(f"lora_parameters.{name}", "it is missing, where mlx-lm stops; here its default counts", "(none)")
    for name, kind in (("rank", whole), ("scale", number), ("dropout", number)):
        if given.get(name) is not None:
            _try(to, f"lora_parameters.{name}", given[name], kind, f"lora.{name}")
    if given.get("alpha") is not None:
        if given.get("scale") is not None:
            to.leave("lora_parameters.alpha", "mlx-lm reads scale alone, and scale is carried over", given["alpha"])
        else:
            note = "mlx-lm refuses alpha without scale; here scale = alpha / rank"
            _try(to, "lora_parameters.alpha", given["alpha"], number, "lora.alpha", note)
    if given.get("keys") is not None:
        _keys(to, given["keys"])
    for name in sorted(set(given) - {"rank", "scale", "dropout", "alpha", "keys"}):
        to.leave(f"lora_parameters.{name}", "mlx-lm does not read it", given[name])


def _keys(to: Carried, value: Any) -> None:
    key = "lora_parameters.keys"
    try:
        names = texts(value)
    except Cannot as reason:
        to.leave(key, f"{reason}", value)
        return
    outside = [n for n in names if n == "lm_head" or n.split(".")[0] in ("model", "language_model", "transformer")]
    if outside:
        to.leave(key, "outside the blocks, which alone are adapted here", outside)
    inside = [n for n in names if n not in outside]
    if inside:
        to.accept(key, value, {"lora.keys": inside})
    else:
        to.leave(key, "none of them is left, and here every linear layer of a block is adapted without keys", value)


def _lengths(to: Carried) -> None:
    """Micro-batches there, optimizer updates here."""
    share = to.read("grad_accumulation_steps", whole, 1)
    if share < 1:
        to.leave("grad_accumulation_steps", "it has to be 1 or more")
        share = 1
    elif to.old.program is MLX_LM:
        note = "weighted by tokens here; a mean of means there" if share > 1 else ""
        to.put("grad_accumulation_steps", whole, "train.grad_accumulation", note=note)
    to.put("batch_size", whole, "train.batch_size")
    for key, name in (
        ("iters", "train.iters"),
        ("steps_per_report", "train.report_every"),
        ("steps_per_eval", "train.eval_every"),
        ("save_every", "checkpoint.every"),
    ):
        count = to.read(key, whole) if to.has(key) else None
        if count is None:
            continue
        if count < 1:
            to.leave(key, "it has to be 1 or more")
            continue
        exact = key == "iters"
        updates = max(1, count // share if exact else (2 * count + share) // (2 * share))
        note = f"{count} micro-batches there, updates here: {count} / {share}" if share > 1 else ""
        if exact and count < share:
            note += "; there no update would be made at all"
        elif exact and count % share:
            note += f"; the last {count % share} made no update there"
        elif count % share:
            note += ", rounded"
        if key == "save_every":
            there = _KEPT[to.old.program.name]
            kept = f"there {there}; here the last 3 and the best, all with checkpoint.keep_every={updates}"
            note = f"{note}; {kept}" if note else kept
        to.put(key, whole, name, note=note, value=updates)


def _evaluation_and_saves(to: Carried) -> None:
    drawn = "the first batches" if to.old.program is EXAMPLES else "other random batches each time"
    fixed = f"there {drawn}, here the same ones each time, short and long rows among them"
    to.put("val_batches", whole, "train.eval_batches", note="" if to.value("val_batches") == -1 else fixed)
    tests = to.old.said.get("test") is True
    if tests and to.old.said.get("train") is not True:
        to.leave("test", "testing alone trains nothing: python -m runner test RUN does that for a run directory")
    elif "test" in to.old.said:
        to.put("test", truth, "train.test", note="of the best weights" if tests and to.our_defaults else "")
    if "test_batches" in to.old.said:
        reason = "train.test goes over train.eval_batches batches; python -m runner test RUN over the whole test split"
        to.leave("test_batches", reason)
    if not to.our_defaults:
        to.accept("result", "the last weights", {"checkpoint.result": "last"}, note="here the best by validation loss")


def _around(to: Carried) -> None:
    train = to.old.said.get("train")
    if train is True:
        to.elsewhere("train", "a run always trains")
    elif not to.old.said.get("test"):
        to.leave("train", f"{to.old.program.name} trains nothing without it (--train); the command below trains", train)
    else:
        to.elsewhere("train", "off there, where it tests alone; the command below trains")
    to.put("seed", whole, "seed")
    if to.old.program is MLX_LM:
        to.put("grad_checkpoint", truth, "train.grad_checkpoint")
    to.put(
        "resume_adapter_file", text, "adapter", note="weights only, as there; here they have to fit this run exactly"
    )
    for key in ("adapter_path", "adapter_file"):
        to.elsewhere(key, "the result lies in RUN/adapters; hydra.run.dir=FOLDER names RUN, a new or empty folder")
    if "trust_remote_code" in to.old.said:
        if not to.old.said["trust_remote_code"]:
            to.elsewhere("trust_remote_code", "off here too")
        else:
            unheard = "" if "trust_remote_code" in to.old.flagged else "mlx-lm hears the flag only, not the YAML; "
            to.leave("trust_remote_code", unheard + _REMOTE_CODE)
    if "clear_cache_threshold" in to.old.said:
        reason = "it has no effect in mlx-lm 0.32, where it does not reach the trainer; here: train.cache_limit_gb=1"
        to.leave("clear_cache_threshold", reason)
    _loggers(to)
    to.elsewhere("config", "its settings are read")


def _loggers(to: Carried) -> None:
    wanted = to.old.said.get("report_to")
    to.seen.add("report_to")
    known, names = group_choices("loggers"), [n.strip().lower() for n in str(wanted or "").split(",") if n.strip()]
    there = sorted({n for n in names if n in known})
    if there:
        to.accept("report_to", ",".join(there), {}, {"loggers": there})
    for name in (n for n in names if n not in known):
        to.leave("report_to", f"not yet a logger (loggers={', '.join(known)}); metrics.jsonl has every number", name)
    if "project_name" in to.old.said:
        to.leave("project_name", "it names a project of report_to; a run has its directory: hydra.run.dir=FOLDER")


def _examples(to: Carried) -> None:
    """What lora.py fixes in its code."""
    if not to.our_defaults:
        note = "fixed there; of a mixture of experts the gate too"
        to.accept("layers", "q_proj, v_proj", {}, {"lora": "query_value"}, note)
        values = {"data.chat_template": False, "data.keys.completion": "text"}
        to.accept("rows", "text, or prompt and text", values, note="without a chat template")
    if to.old.said.get("add_eos_token", 1) != 1:
        to.leave("add_eos_token", "here every row ends with the end-of-sequence token")
    else:
        to.elsewhere("add_eos_token", "every row ends with it")
    for key in ("prompt", "max_tokens", "temp"):
        to.elsewhere(key, "after training: python -m runner generate RUN")


def _rest(to: Carried) -> None:
    known = {*to.old.program.flags, *to.old.program.yaml_only, "num_layers"}
    for key in to.old.said:
        if key not in to.seen:
            hint = did_you_mean(key, known)
            to.leave(key, f"{to.old.program.name} has no such setting and ignores it.{hint}")
    for word in to.old.unknown:
        to.leave(word, f"{to.old.program.name} has no such flag", "")
    if any(Path(word).name in ("mlx.launch", "mpirun") for word in to.old.before):
        to.leave(
            to.old.before[0], "several machines or processes: one process trains here", " ".join(to.old.before[1:])
        )


def _of_the_hub(data: Any) -> str:
    if not isinstance(data, str) or not HUB_ID.fullmatch(data) or Path(data).exists():
        return ""
    return "no folder here, so a hub id: of those train, valid and test have to be .jsonl files"


def _try(to: Carried, key: str, value: Any, kind: Any, name: str, note: str = "") -> None:
    try:
        to.accept(key, value, {name: kind(value)}, note=note)
    except Cannot as reason:
        to.leave(key, f"{reason}", value)
