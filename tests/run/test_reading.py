"""Reading a run's folder: steps done twice count once, and remarks name what is missing or damaged."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import ConfigError, DataError
from pipeline.run.reading import read_run
from pipeline.run.records import write_margins
from support.runs import write_log, write_settings


def losses(folder: Path) -> dict[int, float | None]:
    curve = read_run(folder).curve("loss")
    return dict(zip(curve.steps, curve.values, strict=True))


def test_of_steps_that_were_done_twice_the_later_attempt_counts(tmp_path: Path) -> None:
    write_log(
        tmp_path,
        [
            {"kind": "start", "step": 0, "max_steps": 60},
            {"step": 10, "loss": 1.0},
            {"step": 20, "loss": 2.0},
            {"step": 25, "eval_loss": 2.5},
            {"step": 30, "loss": 3.0, "seconds": 7.0},
            {"kind": "start", "attempt": 2, "step": 20},
            # An attempt that its scheduler lost keeps writing.
            {"step": 40, "loss": 4.0},
            {"attempt": 2, "step": 30, "loss": -3.0, "seconds": 2.5},
            {"attempt": 2, "step": 50, "loss": -5.0, "seconds": 4.0},
            {"kind": "start", "attempt": 3, "step": 40},
            {"attempt": 3, "step": 50, "loss": 55.0},
        ],
    )
    run = read_run(tmp_path)
    assert losses(tmp_path) == {10: 1.0, 20: 2.0, 30: -3.0, 50: 55.0}
    # The attempt that counts for its step did not repeat it.
    assert run.curve("eval_loss").steps == []
    assert [(attempt.step, attempt.last_step, attempt.seconds) for attempt in run.attempts] == [
        (0, 40, 7.0),
        (20, 50, 4.0),
        (40, 50, 1.0),
    ]
    assert (run.step, run.max_steps, run.finished) == (50, 60, False)


def test_of_an_evaluation_that_was_done_twice_the_later_attempt_counts(tmp_path: Path) -> None:
    lines = [{"step": 10, "eval_loss": 1.0}, {"kind": "start", "attempt": 2, "step": 10}]
    write_log(tmp_path, [*lines, {"attempt": 2, "step": 10, "eval_loss": 2.0}])
    assert read_run(tmp_path).curve("eval_loss").values == [2.0]


def test_an_attempt_without_its_first_line_resumes_before_its_first_step(tmp_path: Path) -> None:
    write_log(
        tmp_path, [{"step": s, "loss": float(s)} for s in (1, 2, 3, 4)] + [{"attempt": 2, "step": 3, "loss": 0.5}]
    )
    assert losses(tmp_path) == {1: 1.0, 2: 2.0, 3: 0.5}


def test_a_line_that_is_cut_is_left_out_with_a_remark(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": 1, "loss": 1.0}, '{"kind": "log", "step": 3, "lo', {"step": 2, "loss": 2.0}])
    assert losses(tmp_path) == {1: 1.0, 2: 2.0}
    assert any("log.jsonl: 1 of 3 lines can't be read" in remark for remark in read_run(tmp_path).remarks)


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": 1, "loss": None}, {"step": 10, "loss": 0.5}])
    assert losses(tmp_path) == {1: None, 10: 0.5}
    assert any("1 values are not finite" in remark for remark in read_run(tmp_path).remarks)


def test_the_rejected_completions_shift_follows_from_what_is_logged(tmp_path: Path) -> None:
    policy, reference = (-10.0, -30.0), (-12.0, -25.0)
    record = {
        "logps/chosen": policy[0],
        "logps/rejected": policy[1],
        "logps/chosen_shift": policy[0] - reference[0],
        "ref/margins": reference[0] - reference[1],
    }
    write_log(tmp_path, [{"step": 1, **record, **{f"eval_test_{key}": 2 * value for key, value in record.items()}}])
    run = read_run(tmp_path)
    assert run.curve("logps/rejected_shift").values == [policy[1] - reference[1]]
    assert run.curve("eval_test_logps/rejected_shift").values == [2 * (policy[1] - reference[1])]


def test_held_out_sets_have_the_names_that_the_settings_give_them(tmp_path: Path) -> None:
    write_log(tmp_path / "one", [{"step": 1, "eval_loss": 1.0, "eval_aux_loss": 2.0}])
    assert read_run(tmp_path / "one").held_out() == {"held-out": "eval_"}
    write_settings(tmp_path / "one", data={"path": "p", "eval": {"test": {"split": "test"}}})
    assert read_run(tmp_path / "one").held_out() == {"test": "eval_"}
    several = [{"step": 1, f"eval_{name}_loss": 1.0, f"eval_{name}_aux_loss": 2.0} for name in ("in_domain", "far")]
    write_log(tmp_path / "two", [*several])
    assert read_run(tmp_path / "two").held_out() == {"in_domain": "eval_in_domain_", "far": "eval_far_"}


def test_any_file_may_be_missing_or_damaged_and_gives_a_remark(tmp_path: Path) -> None:
    write_settings(tmp_path)
    run = read_run(tmp_path)
    assert run.settings["loss"]["beta"] == 0.1
    assert (run.step, run.curve("loss").steps, run.margins, run.generations, run.attempts) == (0, [], {}, [], [])
    assert any("log.jsonl is missing" in remark for remark in run.remarks)
    assert any("inputs.json is missing" in remark for remark in run.remarks)

    rows = np.arange(10, dtype=np.float32).reshape(2, 5)
    write_margins(tmp_path, "test", 7, np.zeros((2, 3), np.int64), rows)
    (tmp_path / "margins" / "cut.parquet").write_bytes((tmp_path / "margins" / "test.parquet").read_bytes()[:-9])
    (tmp_path / "refshard.yaml").write_text("loss: {beta: [}")
    (tmp_path / "inputs.json").write_text('{"sets": ')
    (tmp_path / "run.json").write_text("[]")
    (tmp_path / "generations.jsonl").write_text("null")
    run = read_run(tmp_path)
    assert run.settings == run.inputs == {}
    assert run.generations == []
    assert list(run.margins) == ["test"]
    assert run.margins["test"].step == 7
    assert run.margins["test"].columns["policy_margin"].tolist() == [1.0, 6.0]
    for part in ("refshard.yaml", "inputs.json", "run.json", "cut.parquet", "generations.jsonl"):
        assert any(part in remark for remark in run.remarks), part


def test_a_folder_that_is_not_a_run_is_refused_and_the_runs_in_it_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"log\.jsonl.*train\.output_dir"):
        read_run(tmp_path)
    write_log(tmp_path / "beta-1", [{"step": 1, "loss": 1.0}])
    with pytest.raises(ConfigError, match="beta-1"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"step": "2"}, 'step: must be integer, got "2"'),
        ({"step": None}, "step: must be integer, got null"),
        ({"step": 2, "time": 1e300}, "time: must be smaller than or equal to 253402300799, got 1e+300"),
        ({"step": 2, "loss": "low"}, 'loss: must be number or null, got "low"'),
        ({"step": 2, "kind": 1}, "kind: must be string, got 1"),
        ({"kind": "start", "step": 2, "versions": 3}, "versions: must be object, got 3"),
    ],
)
def test_a_whole_line_that_was_edited_is_refused_by_its_number_and_field(
    tmp_path: Path, line: dict[str, Any], field: str
) -> None:
    write_log(tmp_path, [{"step": 1, "loss": 1.0}, line])
    with pytest.raises(DataError, match=rf"log\.jsonl, line 2: {re.escape(field)}\. Restore the line, or delete it"):
        read_run(tmp_path)


def test_records_that_were_edited_are_remarks_that_name_the_field(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": 1, "loss": 1.0}])
    sets = {"train": {"noise": {"tokens": 4}, "ledger": {"dropped": [1]}}}
    for content, field in (
        ({"sets": []}, "sets: must be object, got a list"),
        ({"sets": {"train": 3}}, "sets.train: must be object, got 3"),
        ({"sets": sets}, "sets.train"),
        ({"stage_one": [{"seconds": "long"}]}, 'stage_one[0].seconds: must be number or null, got "long"'),
        ({"policy": {"parameters": "many"}}, 'policy.parameters: must be integer, got "many"'),
    ):
        (tmp_path / "inputs.json").write_text(json.dumps(content))
        assert any(f"inputs.json: {field}" in remark for remark in read_run(tmp_path).remarks), field
    (tmp_path / "run.json").write_text('{"finished": true, "step": "x"}')
    run = read_run(tmp_path)
    assert any('run.json: step: must be integer, got "x"' in remark for remark in run.remarks)
    assert (run.finished, run.policy_step) == (False, None)


def test_margins_of_other_columns_or_without_a_step_are_a_remark(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": 1, "loss": 1.0}])
    rows = np.arange(10, dtype=np.float32).reshape(2, 5)
    write_margins(tmp_path, "test", 7, np.zeros((2, 3), np.int64), rows)
    table = pq.read_table(tmp_path / "margins" / "test.parquet")
    texts = table.set_column(table.column_names.index("ref_margin"), "ref_margin", pa.array(["a", "b"]))
    for name, odd in (
        ("bare", table.replace_schema_metadata(None)),
        ("texts", texts),
        ("less", table.drop(["ref_margin"])),
    ):
        pq.write_table(odd, tmp_path / "margins" / f"{name}.parquet")
    run = read_run(tmp_path)
    assert list(run.margins) == ["test"]
    assert [name for name in ("bare", "texts", "less") if not any(name in remark for remark in run.remarks)] == []
