"""Find the folder of a model that `model.path` names: a local folder or a snapshot from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from runner.common.errors import ModelError

_UNREACHABLE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError")
_NO_ACCESS = ("RepositoryNotFoundError", "GatedRepoError")


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


def load_error(path: str, error: Exception) -> ModelError:
    """Convert what mlx-lm, transformers or the hub's library raised while loading `path` into a ModelError."""
    return ModelError(f"model.path={path} cannot be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    if type(error).__name__ in _UNREACHABLE:
        return (
            "it is neither a local folder nor in the hub's cache, and the hub cannot be reached. "
            "Check the name and the network."
        )
    if type(error).__name__ in _NO_ACCESS:
        return "the hub has no such model, or it requires a login (hf auth login). Check the name."
    text = " ".join(str(error).split())
    text = text.replace("Pass trust_remote_code=True", "Type model.trust_remote_code=true")
    return (text[:400] or type(error).__name__).rstrip(".") + "."
