"""Find the folder of a model that `model.path` names: a local folder or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import json
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path

import mlx_lm.models

from runner.common.errors import ModelError, did_you_mean

_UNREACHABLE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError")
_NO_ACCESS = ("RepositoryNotFoundError", "GatedRepoError")

_UNKNOWN_TYPE = re.compile(r"^Model type .* not supported|^module 'mlx_lm\.models\.\w+' has no attribute 'Model'")
_MISSING_ARGUMENTS = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)")


def find_model_folder(path: str, revision: str | None) -> Path:
    """Return the folder that `path` names, downloading a hub snapshot into the hub's cache if needed.

    Raises:
        ModelError: `path` is neither a model folder nor the form of a hub id.
        Exception: whatever the hub's library raises for an unknown model or a failed download; see `load_error`.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path={path} is not a model folder: it has no config.json.")
        if not list(folder.glob("model*.safetensors")):
            raise ModelError(f"model.path={path} has no model*.safetensors.")
        return folder
    if folder.is_file():
        raise ModelError(f"model.path={path} is a file: a model is a folder, a .gguf file or a hub id.")
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelError(f"model.path={path}: no such folder or file (a hub id has the form ORGANISATION/NAME).")
    # mlx-lm chooses between Hugging Face and ModelScope here, and knows which files its loaders read.
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS))


def load_error(path: str, error: Exception | SystemExit, part: str) -> ModelError:
    """Return the ModelError for what mlx-lm, transformers or the hub's library raised while loading a model.

    Args:
        path: `model.path`.
        error: what was raised.
        part: what was being loaded: the model or its tokenizer.
    """
    return ModelError(f"model.path={path} cannot be loaded: {_reason(path, error, part)}")


def _reason(path: str, error: Exception | SystemExit, part: str) -> str:
    if type(error).__name__ in _UNREACHABLE:
        return (
            "it is neither a local folder nor in the hub's cache, and the hub cannot be reached. "
            "Check the name and the network."
        )
    if type(error).__name__ in _NO_ACCESS:
        return "the hub has no such model, or it requires a login (hf auth login). Check the name."
    text = " ".join(str(error).split())[:400].rstrip(".")
    if "trust_remote_code=True" in text:
        return text.replace("Pass trust_remote_code=True", "Type model.trust_remote_code=true") + "."
    if part == "tokenizer":
        return f"its tokenizer: {text or type(error).__name__}."
    model_type = _model_type(path)
    if (model_type is None and error.args == ("model_type",)) or text.startswith("Model type None "):
        return "its config.json has no model_type, which names the architecture."
    if _UNKNOWN_TYPE.search(text):
        known = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
        return (
            f"model_type '{model_type}' is not supported: mlx-lm {version('mlx-lm')} has no such architecture."
            f"{did_you_mean(str(model_type), known)} Use a model of another architecture, or an mlx-lm that has it."
        )
    if isinstance(error, SystemExit):
        return f"mlx-lm's code of model_type '{model_type}' needs a package that is not installed; it is named above."
    if missing := _MISSING_ARGUMENTS.search(text):
        return f"its config.json lacks what mlx-lm needs for model_type '{model_type}': {missing[1]}."
    described = f"{text} ({type(error).__name__})" if text else type(error).__name__
    return f"mlx-lm {version('mlx-lm')} fails on its files (model_type '{model_type}'): {described}."


def _model_type(path: str) -> str | None:
    """Return the architecture that the model's config.json names, if the model is a folder with one."""
    try:
        name = json.loads((Path(path) / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return None if name is None else str(name)
