"""A resolved config does not depend on the working directory."""

from __future__ import annotations

from runner.config import schema, serialize
from runner.config.setting import PathKind
from runner.config.validation import make_paths_absolute


def test_output_folders_become_absolute_and_inputs_only_where_they_exist(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    config = tiny(
        **{
            "model.path": "org/model",
            "data.path": "data",
            "adapter": "~/missing.npz",
            "data.cache_folder": "~/tokens",
            "checkpoint.backup": "second/disk",
            "train.hidden_cache.folder": "../hidden",
        }
    )
    make_paths_absolute(config)
    assert (config.model.path, config.data.path, config.adapter) == ("org/model", f"{tmp_path}/data", "~/missing.npz")
    assert config.data.cache_folder == f"{tmp_path}/home/tokens"
    assert config.checkpoint.backup == f"{tmp_path}/second/disk"
    assert config.train.hidden_cache.folder == f"{tmp_path.parent}/hidden"
    assert config.checkpoint.dir == "checkpoints"
    before = serialize.to_dict(config)
    monkeypatch.chdir("/")
    make_paths_absolute(config)
    assert serialize.to_dict(config) == before


def test_every_path_of_the_schema_has_its_kind():
    assert schema.path_settings() == {
        "model.path": PathKind.INPUT,
        "data.path": PathKind.INPUT,
        "data.template": PathKind.INPUT,
        "adapter": PathKind.INPUT,
        "data.cache_folder": PathKind.OUTPUT,
        "checkpoint.backup": PathKind.OUTPUT,
        "train.hidden_cache.folder": PathKind.OUTPUT,
    }


def test_a_resume_from_another_directory_uses_the_same_folders(cli, make_cli, tmp_path):
    (cli.folder / "backup").mkdir()
    folders = ("checkpoint.backup=backup", "data.cache_folder=tokens", "train.hidden_cache.folder=hidden")
    small = ("model=tiny", "data=tiny", "lora.num_layers=2", "train.iters=6", "checkpoint.every=2")
    cli(*small, *folders, "train.hidden_cache.memory_gb=0", "train.stop_at=2", "hydra.run.dir=run")
    elsewhere = make_cli(tmp_path / "elsewhere")
    out = elsewhere(f"resume={cli.folder}/run")
    assert "changed on resume" not in out
    assert not list(elsewhere.folder.iterdir())
    assert list((cli.folder / "backup").glob("*/checkpoints/step-0000006"))
    assert list((cli.folder / "hidden").iterdir())
