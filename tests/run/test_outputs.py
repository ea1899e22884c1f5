"""An output that is, holds or lies in a model, a dataset, a store or another run is refused; nothing is touched."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.report.pages import page, write_page
from pipeline.run.outputs import guard_output, guard_run, guard_shards
from support.runs import refshard
from support.tally import tally

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Give settings with all kinds of inputs in tmp_path, each of them there."""
    for folder in ("model", "other", "adapter", "dataset", "old/train", "sft/checkpoint-2", "run/attempts"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("model", "other", "sft/checkpoint-2"):
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"")
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "dataset/dataset_dict.json").write_text("{}")
    (tmp_path / "old/train/manifest.json").write_text(json.dumps({"format": "refshard"}))
    (tmp_path / "run/attempts/0001.json").write_text(json.dumps({"host": "h", "process": 1, "identity": {}}))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/train.jsonl").write_text("{}\n")
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {path: pairs/train.jsonl, eval: {test: {path: dataset}}}\npolicy: {model: model}\n"
        "reference: {model: other, adapter: adapter}\nprecompute: {output: shards}\ntrain: {output_dir: policy}\n"
    )

    def load_with(*overrides: str) -> Config:
        return load_config(file, overrides)

    return load_with


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "folder",
    [
        "model", "model/dpo", "model/a/b", "other", "other/x", "adapter", "adapter/x", "dataset", "dataset/x",
        "pairs", ".", "old", "old/train", "old/train/x", "sft", "sft/checkpoint-2", "run/x", "shards", "shards/train",
        "shards/train/policy", "shards/costs", "link", "link/x",
    ],
)  # fmt: skip
def test_a_run_that_would_touch_another_folder_is_refused_and_makes_nothing(load: Load, folder: str) -> None:
    Path("link").symlink_to("model", target_is_directory=True)
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError, match=r"^train\.output_dir: must "):
        guard_run(load(f"train.output_dir={folder}"))
    assert sorted(Path().rglob("*")) == before
    tally("a run's output that is, holds or lies in a folder of the user's", 1, outcome="2, nothing made")


@pytest.mark.parametrize("folder", ["model", "model/shards", "dataset", "run", "run/shards", "pairs/train.jsonl"])
def test_shards_that_would_touch_another_folder_are_refused(load: Load, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"^precompute\.output: must "):
        guard_shards(load(f"precompute.output={folder}"))
    tally("shards that are, hold or lie in a folder of the user's", 1, outcome="2, nothing made")


@pytest.mark.parametrize("folder", ["policy", "shards/policy", "old/policy", "pairs/policy", "new/a/b", "run", "sft2"])
def test_a_new_folder_beside_them_and_a_run_of_its_own_are_taken(load: Load, folder: str) -> None:
    guard_run(load(f"train.output_dir={folder}"))


@pytest.mark.parametrize("output", ["shards", "old", "s3://bucket/shards", "pairs"])
def test_a_store_of_its_own_and_a_bucket_are_taken(load: Load, output: str) -> None:
    guard_shards(load(f"precompute.output={output}"))


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint-4", "references", "joined", "margins", "run.json", "README.md", "tokenizer.json"),
        *("chat_template.jinja", "generation_config.json", "model.safetensors", "trainer_state.json"),
    ],
)
def test_a_folder_with_files_that_a_run_replaces_but_without_a_runs_mark_is_refused(load: Load, name: str) -> None:
    (Path("policy") / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"^train\.output_dir: .* holds {name} of another program"):
        guard_run(load())
    tally("a file of another program under a name that a run writes", 1, outcome="2, nothing made")


def test_a_folder_of_which_only_a_committed_checkpoint_was_kept_is_a_run(load: Load) -> None:
    checkpoint = Path("policy/checkpoint-4")
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="must not hold an adapter"):
        guard_run(load())
    (checkpoint / "refshard-commit.json").write_text("{}")
    guard_run(load())


def test_a_run_that_was_killed_before_its_first_attempt_was_written_begins_again(load: Load) -> None:
    Path("policy/attempts").mkdir(parents=True)
    guard_run(load())
    Path(f"policy/attempts/.tmp-{'0' * 32}").write_text("half")
    guard_run(load())


@pytest.mark.parametrize("name", ["0001.json", "quiz.json", "notes.txt", ".tmp-mine"])
def test_a_folder_with_another_programs_attempts_is_no_run(load: Load, name: str) -> None:
    Path("policy/attempts").mkdir(parents=True)
    Path("policy/attempts", name).write_text('{"score": 3}')
    with pytest.raises(ConfigError, match=r"^train\.output_dir: .* holds attempts of another program"):
        guard_run(load())


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.gguf", "tf_model.h5", "flax_model.msgpack"])
def test_a_model_in_another_format_is_a_model(load: Load, weights: str) -> None:
    Path("old-model").mkdir()
    Path("old-model/config.json").write_text("{}")
    Path("old-model", weights).write_bytes(b"")
    for folder in ("old-model", "old-model/dpo"):
        with pytest.raises(ConfigError, match=r"^train\.output_dir: must .* a model"):
            guard_run(load(f"train.output_dir={folder}"))


def test_a_saved_dataset_is_known_by_both_of_its_files(load: Load) -> None:
    """A file state.json alone may be any program's."""
    Path("project").mkdir()
    Path("project/state.json").write_text("{}")
    guard_run(load("train.output_dir=project/policy"))
    guard_shards(load("precompute.output=project"))
    Path("project/dataset_info.json").write_text("{}")
    with pytest.raises(ConfigError, match="must not lie in a dataset"):
        guard_run(load("train.output_dir=project/policy"))


def test_a_link_in_a_runs_folder_is_not_written_through(load: Load) -> None:
    Path("run/margins").symlink_to("../model", target_is_directory=True)
    with pytest.raises(ConfigError, match="must hold no links"):
        guard_run(load("train.output_dir=run"))


@pytest.mark.parametrize(
    ("output", "reused"),
    [
        *(("old", reused) for reused in ("old", "old/train", "link/train", "file://{here}/old/train")),
        *(("s3://bucket/shards", reused) for reused in ("s3://bucket/shards/train", "s3://bucket/shards/train/")),
    ],
)
def test_shards_to_reuse_are_not_deleted_by_overwrite(load: Load, output: str, reused: str) -> None:
    Path("link").symlink_to("old", target_is_directory=True)
    config = load(f"precompute.output={output}", f"precompute.reuse=[{reused.format(here=Path.cwd())}]")
    guard_shards(config)
    with pytest.raises(ConfigError, match=r"^precompute\.reuse: must not be what --overwrite deletes, got "):
        guard_shards(config, overwrite=True)
    tally("shards to reuse that --overwrite would delete", 1, outcome="2, nothing deleted")


@pytest.mark.parametrize("reused", ["old2/train", "s3://bucket/shards2/train", "s3://bucket/shards/train2"])
def test_shards_beside_those_that_overwrite_deletes_are_reused(load: Load, reused: str) -> None:
    for output in ("old", "s3://bucket/shards"):
        guard_shards(load(f"precompute.output={output}", f"precompute.reuse=[{reused}]"), overwrite=True)


def test_costs_are_not_written_into_a_model(load: Load) -> None:
    Path("shards").mkdir()
    Path("shards/costs").symlink_to("../model", target_is_directory=True)
    with pytest.raises(ConfigError, match=r"^precompute\.output: must not be, hold or lie in policy\.model"):
        guard_shards(load())


@pytest.mark.parametrize(
    ("manifest", "refused"),
    [('{"format": "refshard"', True), ('{"format": "other", "by": "refshard"}', False), ('{"forma', False)],
)
def test_a_damaged_manifest_is_still_a_stores_if_the_program_is_named(load: Load, manifest: str, refused: bool) -> None:
    Path("old/train/manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match="must not lie in a store") if refused else contextlib.nullcontext():
        guard_run(load("train.output_dir=old/train/x"))


def test_an_export_does_not_lie_in_a_run(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^OUTPUT: must not lie in a run"):
        guard_output("OUTPUT", Path("run/sets"), load())


def test_a_page_replaces_our_pages_only(tmp_path: Path) -> None:
    file, other = tmp_path / "page.html", tmp_path / "model.safetensors"
    one, two = (page(title, []) for title in ("one", "two"))
    write_page(file, one)
    write_page(file, two)
    for theirs in (b"weights", b"<!doctype html><title>theirs</title>"):
        other.write_bytes(theirs)
        with pytest.raises(ConfigError, match="must be a new file or a page of refshard"):
            write_page(other, one)
        assert other.read_bytes() == theirs
    assert file.read_text() == two


def test_both_stages_refuse_with_2_before_anything_is_made(make_run: Any, model_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    config = make_run(policy={"model": str(model)}, train={"output_dir": str(model)})
    before = {file: file.read_bytes() for file in model.iterdir()}
    for command in ("precompute", "train"):
        done = refshard(command, "--config", config, check=2)
        assert "train.output_dir: must not be, hold or lie in policy.model" in done.stderr
    assert {file: file.read_bytes() for file in model.iterdir()} == before
    assert not (tmp_path / "shards").exists()
