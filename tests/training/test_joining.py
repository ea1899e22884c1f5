"""The joined sets and their inputs: what changes on the disk while it is in use is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.base.digests import sha256_of_files
from pipeline.base.errors import DataError, IdentityError
from pipeline.config.reader import load_config
from pipeline.models.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.training.joined_cache import write_joined
from pipeline.training.joining import check_joined, join_sets, watch_inputs
from stages import train
from stages.precompute import command as precompute
from support.runs import simple_rows, write_jsonl
from support.tally import tally

MakeRun = Callable[..., Path]


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "config.json", "pairs.jsonl", "heldout.jsonl"])
def test_the_policys_files_its_adapters_and_the_data_are_watched(
    make_run: MakeRun, model_folder: Path, tmp_path: Path, name: str
) -> None:
    for folder in (model := tmp_path / "model", adapter := tmp_path / "adapter"):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    for place in (model / "model.safetensors", adapter / ADAPTER_WEIGHTS):
        place.write_bytes(b"weights")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    held_out = write_jsonl(tmp_path / "heldout.jsonl", simple_rows(4))
    config = make_run(
        policy={"model": str(model), "adapter": str(adapter)}, data={"eval": {"heldout": {"path": str(held_out)}}}
    )
    watched = watch_inputs(load_config(config))
    (changed,) = tmp_path.rglob(name)
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(IdentityError, match=f"{name}: changed while it was in use"):
        for files in watched:
            files.check()


def test_data_that_changes_while_it_is_joined_is_not_trained_on(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's identity is of the rows before, in their order."""
    config = load_config(make_run(rows=simple_rows(16)))
    precompute.run(config)

    def reorder_and_join(*given: object, **more: object) -> object:
        write_jsonl(tmp_path / "pairs.jsonl", simple_rows(16)[::-1])
        return join_sets(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "join_sets", reorder_and_join)
    with pytest.raises(IdentityError, match=r"pairs\.jsonl: changed while it was in use"):
        train.run(config)
    assert not (tmp_path / "policy" / "run.json").exists()
    tally("data reordered while stage two joins it", 1, outcome="78, nothing trained")


def test_a_joined_file_that_does_not_hold_its_digest_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.arrow"
    file.write_bytes(b"rows")
    write_joined(tmp_path, {"made_from": None, "files": sha256_of_files([file]), "sets": {}})
    check_joined(tmp_path)
    file.write_bytes(b"sows")
    with pytest.raises(DataError, match=f"{file}: must hold what was joined"):
        check_joined(tmp_path)


def test_a_loss_without_a_reference_needs_no_store(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_jsonl(tmp_path / "heldout.jsonl", simple_rows(4, start=50))
    file = make_run(
        rows=simple_rows(8),
        data={"eval": {"test": {"path": str(held_out)}}},
        loss={"type": ["simpo", "sft"]},
        train={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/margins"},
    )
    config = load_config(file)
    precompute.run(config)
    assert "simpo, sft: has no reference, so there is nothing to do" in capsys.readouterr().out
    train.run(config)
    output = config.train.folder
    assert list(tmp_path.rglob("manifest.json")) == []
    assert json.loads((output / "inputs.json").read_text())["reference"] is None
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = {name for entry in history for name in entry}
    assert {"rewards/margins", "eval_rewards/margins"} <= logged
    assert not any(word in name for name in logged for word in ("ref/", "kl/", "shift"))
    card = (output / "README.md").read_text()
    assert "2405.14734" in card and "reference log-probs" not in card
    capsys.readouterr()
    train.run(config)
    assert "finished already" in capsys.readouterr().out
    # A reference would be asked for by the same settings with DPO.
    with pytest.raises(DataError, match="no shards there"):
        train.run(load_config(file, ["loss.type=sigmoid", f"train.output_dir={tmp_path / 'dpo'}"]))


def test_new_weights_need_no_scoring_and_a_pair_of_weight_0_is_not_there(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = simple_rows(9)
    weighted = [{**row, "w": 0 if number == 4 else 1.5, "m": 0.25} for number, row in enumerate(rows)]
    file = make_run(rows=rows, train={"max_steps": 3})
    precompute.run(load_config(file))
    shards = sha256_of_files(sorted((tmp_path / "shards").rglob("*.parquet")))

    def weights_of(name: str, data: list[dict[str, object]], columns: str) -> dict[str, torch.Tensor]:
        path, output = write_jsonl(tmp_path / f"{name}.jsonl", data), tmp_path / name
        train.run(load_config(file, [f"data.path={path}", f"data.columns={columns}", f"train.output_dir={output}"]))
        return load_file(output / "model.safetensors")

    found = weights_of("weighted", weighted, "{weight: w}")
    assert "1 of weight 0; 8 matched, 0 missing" in capsys.readouterr().out
    left_out = weights_of("left-out", [row for number, row in enumerate(rows) if number != 4], "{}")
    # All others weigh the same, which is rounding away from weighing nothing in particular.
    assert all(torch.allclose(value, left_out[name], rtol=0, atol=1e-6) for name, value in found.items())
    # Stage one takes its store for that of the same settings.
    precompute.run(load_config(file, ["data.columns={weight: w, margin: m}"]))
    moved = weights_of("with-margins", weighted, "{weight: w, margin: m}")
    assert not all(torch.allclose(value, found[name], rtol=0, atol=1e-6) for name, value in moved.items())
    assert sha256_of_files(sorted((tmp_path / "shards").rglob("*.parquet"))) == shards
