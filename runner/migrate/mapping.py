"""The settings of mlx-lm and of mlx-examples' lora.py as ours, key by key; docs/migrating.md shows them as a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runner.common.errors import did_you_mean
from runner.config import schema
from runner.config.groups import group_choices
from runner.data.source import HUB_ID
from runner.migrate.convert import CannotImport, to_bool, to_float, to_int, to_text, to_texts
from runner.migrate.result import ImportResult
from runner.migrate.schedules import optimizer, schedule
from runner.migrate.source import EXAMPLES, MLX_LM, SourceConfig

_REMOTE_CODE = "not switched on by an import: once you have read the model's code, add model.trust_remote_code=true"
_RETAINED = {MLX_LM.name: "every save stays", EXAMPLES.name: "one file is overwritten"}
_HF_DATASET = (
    "data come from a folder here, or from a hub id that holds such files: write the rows to data/train.jsonl, "
    "data/valid.jsonl and data/test.jsonl, or give another folder with data.path"
)


_BLOCK = re.compile(r"(?:[\w.]+\.)?(layers\.\d+\.)")
"""The beginning of a layer's full name, by which mlx-lm adapts that layer alone."""


def import_config(source: SourceConfig, our_defaults: bool = False) -> ImportResult:
    """Return our settings for everything that `source` sets, and for its program's defaults unless `our_defaults`."""
    result = ImportResult(source, our_defaults)
    _model_and_data(result)
    _lora(result)
    optimizer(result)
    _lengths(result)
    schedule(result)
    _evaluation_and_saves(result)
    _run_and_results(result)
    if source.program is EXAMPLES:
        _fixed_by_lora_py(result)
    _unknown_settings(result)
    result.validate()
    return result


def _model_and_data(result: ImportResult) -> None:
    result.import_key("model", to_text, "model.path")
    if result.source.settings.get("hf_dataset"):
        result.skip("hf_dataset", _HF_DATASET)
        result.add("hf_dataset", "its rows", {}, {"data": "folder"}, "the folder data/, once it is written")
        result.explain("data", "overridden by hf_dataset there")
    else:
        result.explain("hf_dataset", "empty: not used")
        # With the group, because our default data set brings a metric of its own.
        result.import_key("data", to_text, "data.path", note=_hub_note(result.value("data")), groups={"data": "folder"})
    note = "" if result.source.settings.get("mask_prompt") else "there the loss includes the prompt"
    result.import_key("mask_prompt", to_bool, "data.mask_prompt", note=note)
    result.import_key("max_seq_length", to_int, "data.max_length")
    source = result.source.settings.get("hf_dataset")
    single = source if isinstance(source, dict) else {}
    for feature, name in (
        ("prompt_feature", "prompt"),
        ("completion_feature", "completion"),
        ("text_feature", "text"),
        ("chat_feature", "messages"),
    ):
        if feature in single and feature not in result.source.settings:
            result.import_value(f"hf_dataset.{feature}", single[feature], to_text, f"data.keys.{name}")
        result.import_key(feature, to_text, f"data.keys.{name}")


def _lora(result: ImportResult) -> None:
    kind = result.value("fine_tune_type") or "lora"
    known = schema.metadata()["lora.type"].choices
    if result.applies("fine_tune_type") and kind not in known:
        result.skip("fine_tune_type", f"not there yet ({', '.join(map(str, known))}): the command below trains lora")
    else:
        result.import_key("fine_tune_type", to_text, "lora.type")
    if "lora_layers" in result.source.settings:
        result.handled.add("lora_layers")
        if "num_layers" in result.source.settings:
            result.explain("lora_layers", "num_layers is given as well and counts")
        else:
            ignored = "an older name of num_layers; mlx-lm 0.32 ignores it without a word"
            _layers(result, "lora_layers", ignored if result.source.program is MLX_LM else "")
    if "lora_layers" not in result.source.settings or "num_layers" in result.source.settings:
        _layers(result, "num_layers", "")
    if kind == "full":
        result.explain("lora_parameters", "full fine-tuning reads none of them, there and here")
    else:
        _lora_parameters(result)


def _layers(result: ImportResult, key: str, note: str) -> None:
    layers = result.read(key, to_int) if result.applies(key) else None
    if layers is None:
        return
    if result.source.program is EXAMPLES and layers < 1:
        result.skip(key, "there it adapts no layer at all; -1 means all of them here: add lora.num_layers=-1")
    elif layers < 1:
        note = note or ("" if layers == -1 else f"{layers} means all blocks there")
        result.import_key(key, lambda _: -1, "lora.num_layers", note=note)
    else:
        result.import_key(key, to_int, "lora.num_layers", note=note)


def _lora_parameters(result: ImportResult) -> None:
    if "lora_parameters" not in result.source.settings:
        return
    given = result.value("lora_parameters")
    if not isinstance(given, dict):
        result.skip("lora_parameters", "it is not a mapping with rank, scale and dropout")
        return
    given = {str(k): v for k, v in given.items()}
    for name in ("rank", "scale", "dropout"):
        if given.get(name) is None and not (name == "scale" and given.get("alpha") is not None):
            reason = "it is missing, where mlx-lm stops; here its default counts"
            result.skip(f"lora_parameters.{name}", reason, "(none)")
    for name, kind in (("rank", to_int), ("scale", to_float), ("dropout", to_float)):
        if given.get(name) is not None:
            result.import_value(f"lora_parameters.{name}", given[name], kind, f"lora.{name}")
    if given.get("alpha") is not None:
        if given.get("scale") is not None:
            result.skip("lora_parameters.alpha", "mlx-lm reads scale alone, and scale is carried over", given["alpha"])
        else:
            note = "mlx-lm refuses alpha without scale; here scale = alpha / rank"
            result.import_value("lora_parameters.alpha", given["alpha"], to_float, "lora.alpha", note)
    if given.get("keys") is not None:
        _keys(result, given["keys"])
    for name in sorted(set(given) - {"rank", "scale", "dropout", "alpha", "keys"}):
        result.skip(f"lora_parameters.{name}", "mlx-lm does not read it", given[name])


def _keys(result: ImportResult, value: Any) -> None:
    key = "lora_parameters.keys"
    try:
        names = to_texts(value)
    except CannotImport as reason:
        result.skip(key, f"{reason}", value)
        return
    result.add(key, value, {"lora.keys": [_BLOCK.sub(r"\1", name) for name in names]})


def _lengths(result: ImportResult) -> None:
    """Convert intervals: the other programs count micro-batches, we count optimizer updates."""
    accumulation = result.read("grad_accumulation_steps", to_int, 1)
    if accumulation < 1:
        result.skip("grad_accumulation_steps", "must be 1 or more")
        accumulation = 1
    elif result.source.program is MLX_LM:
        note = "weighted by tokens here; a mean of means there" if accumulation > 1 else ""
        result.import_key("grad_accumulation_steps", to_int, "train.grad_accumulation", note=note)
    result.import_key("batch_size", to_int, "train.batch_size")
    _length(result, "iters", "train.iters", accumulation)
    _length(result, "steps_per_report", "train.report_every", accumulation)
    _length(result, "steps_per_eval", "train.eval_every", accumulation)
    _length(result, "save_every", "checkpoint.every", accumulation)


def _length(result: ImportResult, key: str, name: str, accumulation: int) -> None:
    count = result.read(key, to_int) if result.applies(key) else None
    if count is None:
        return
    if count < 1:
        result.skip(key, "must be 1 or more")
        return
    exact = key == "iters"
    updates = max(1, count // accumulation if exact else (2 * count + accumulation) // (2 * accumulation))
    note = f"{count} micro-batches there, updates here: {count} / {accumulation}" if accumulation > 1 else ""
    if exact and count < accumulation:
        note += "; there no update would be made at all"
    elif exact and count % accumulation:
        note += f"; the last {count % accumulation} made no update there"
    elif count % accumulation:
        note += ", rounded"
    if key == "save_every":
        there = _RETAINED[result.source.program.name]
        retained = f"there {there}; here the last 3 and the best, all with checkpoint.keep_every={updates}"
        note = f"{note}; {retained}" if note else retained
    result.import_key(key, lambda _: updates, name, note=note)


def _evaluation_and_saves(result: ImportResult) -> None:
    drawn = "the first batches" if result.source.program is EXAMPLES else "other random batches each time"
    fixed = f"there {drawn}, here the same ones each time, short and long rows among them"
    result.import_key(
        "val_batches", to_int, "train.eval_batches", note="" if result.value("val_batches") == -1 else fixed
    )
    tests = result.source.settings.get("test") is True
    if tests and result.source.settings.get("train") is not True:
        result.skip("test", "testing alone trains nothing: python -m runner test RUN does that for a run directory")
    elif "test" in result.source.settings:
        result.import_key(
            "test", to_bool, "train.test", note="of the best weights" if tests and result.our_defaults else ""
        )
    reason = "train.test goes over train.eval_batches batches; python -m runner test RUN over the whole test split"
    result.skip_given("test_batches", reason)
    if not result.our_defaults:
        result.add("result", "the last weights", {"checkpoint.result": "last"}, note="here the best by validation loss")


def _run_and_results(result: ImportResult) -> None:
    train = result.source.settings.get("train")
    if train is True:
        result.explain("train", "a run always trains")
    elif not result.source.settings.get("test"):
        reason = f"{result.source.program.name} trains nothing without it (--train); the command below trains"
        result.skip("train", reason, train)
    else:
        result.explain("train", "off there, where it tests alone; the command below trains")
    result.import_key("seed", to_int, "seed")
    if result.source.program is MLX_LM:
        result.import_key("grad_checkpoint", to_bool, "train.grad_checkpoint")
    result.import_key(
        "resume_adapter_file", to_text, "adapter", note="weights only, as there; here they have to fit this run exactly"
    )
    for key in ("adapter_path", "adapter_file"):
        result.explain(key, "the result is RUN/adapters; hydra.run.dir=FOLDER sets RUN, a new or empty folder")
    if "trust_remote_code" in result.source.settings:
        if not result.source.settings["trust_remote_code"]:
            result.explain("trust_remote_code", "off here too")
        else:
            is_flag = "trust_remote_code" in result.source.from_flags
            ignored = "" if is_flag else "mlx-lm reads the flag only, not the YAML; "
            result.skip("trust_remote_code", ignored + _REMOTE_CODE)
    reason = "it has no effect in mlx-lm 0.32, where it does not reach the trainer; here: train.cache_limit_gb=1"
    result.skip_given("clear_cache_threshold", reason)
    _loggers(result)
    result.explain("config", "its settings are read")


def _loggers(result: ImportResult) -> None:
    wanted = result.source.settings.get("report_to")
    result.handled.add("report_to")
    known, names = group_choices("loggers"), [n.strip().lower() for n in str(wanted or "").split(",") if n.strip()]
    there = sorted({n for n in names if n in known})
    if there:
        note = "offline; loggers.wandb.mode=online sends rows at once" if "wandb" in there else ""
        result.add("report_to", ",".join(there), {}, {"loggers": there}, note)
    for name in (n for n in names if n not in known):
        result.skip("report_to", f"not yet a logger (loggers={', '.join(known)}); metrics.jsonl has every value", name)
    reason = "it names a project of report_to; a run has its directory: hydra.run.dir=FOLDER"
    if "wandb" in there:
        reason = "it names a project of report_to: add loggers.wandb.project=NAME to the command"
    result.skip_given("project_name", reason)


def _fixed_by_lora_py(result: ImportResult) -> None:
    """Import what lora.py fixes in its code."""
    if not result.our_defaults:
        note = "fixed there; of a mixture of experts the gate too"
        result.add("layers", "q_proj, v_proj", {}, {"lora": "query_value"}, note)
        values = {"data.chat_template": False, "data.keys.completion": "text"}
        result.add("rows", "to_text, or prompt and text", values, note="without a chat template")
    if result.source.settings.get("add_eos_token", 1) != 1:
        result.skip("add_eos_token", "here every row ends with the end-of-sequence token")
    else:
        result.explain("add_eos_token", "every row ends with it")
    for key in ("prompt", "max_tokens", "temp"):
        result.explain(key, "after training: python -m runner generate RUN")


def _unknown_settings(result: ImportResult) -> None:
    known = {*result.source.program.flags, *result.source.program.yaml_only, "num_layers"}
    for key in result.source.settings:
        if key not in result.handled:
            hint = did_you_mean(key, known)
            result.skip(key, f"{result.source.program.name} has no such setting and ignores it.{hint}")
    for word in result.source.unknown_flags:
        result.skip(word, f"{result.source.program.name} has no such flag", "")
    prefix = result.source.command_prefix
    if any(Path(word).name in ("mlx.launch", "mpirun") for word in prefix):
        result.skip(prefix[0], "several machines or processes: one process trains here", " ".join(prefix[1:]))


def _hub_note(data: Any) -> str:
    if not isinstance(data, str) or not HUB_ID.fullmatch(data) or Path(data).exists():
        return ""
    return "not a folder here, so taken for a hub id; its train, valid and test files must be .jsonl"
