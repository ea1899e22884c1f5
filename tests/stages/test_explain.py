"""`refshard explain`: one pair's tokens and log-probs against the tokenizer and transformers themselves."""

import html
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.base.errors import ConfigError, DataError, RefshardError, UnfinishedError
from pipeline.base.folders import open_folder
from pipeline.base.tables import width_of
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.data.rows import Row
from pipeline.models.precision import Precision, reference_precision
from pipeline.report.heatmap import Cell, of_differences, of_logps, on_terminal
from pipeline.run.checkpoints import commit_checkpoint
from pipeline.scoring import scorer
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store.finishing import finish_store
from pipeline.store.store import open_store, read_checked_part, read_manifest, read_parts
from stages.explain import command
from stages.explain import shown as views
from stages.explain import stored as stored_module
from stages.explain.pieces import shown, token_bytes
from stages.explain.row import Completion, Explanation, Token, explain_row, with_logps
from stages.explain.stored import StoredPair, compare, find_stored, with_stored
from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.stores import forge_part

STRANGE = {
    "prompt": "Say: \x1b[31mred\x1b]0;title\x07 \u202e <b>\n",
    "chosen": ' <script src="//x"></script>\x1b[2J "quoted" &amp; \x9b0m 日本 €',
    "rejected": " no\ttabs\r\n",
}
LONG = {"prompt": "Tell me.", "chosen": " and so on" * 60, "rejected": " no."}
FILLED = {"prompt": "word " * 200, "chosen": " yes", "rejected": " no"}
EMPTY = {"prompt": "A?", "chosen": " ", "rejected": " no \x1b[31m"}
ROWS = [*simple_rows(6), STRANGE, LONG, FILLED, EMPTY, *simple_rows(2)]
STRANGE_ROW, LONG_ROW, FILLED_ROW, EMPTY_ROW = 6, 7, 8, 9


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with settings, `run.yaml`, whose pairs stage one has scored."""
    folder = tmp_path_factory.mktemp("explain")
    data = write_jsonl(folder / "pairs.jsonl", ROWS)
    write_config(
        folder / "run.yaml",
        data={
            "path": str(data),
            "max_length": 128,
            "on_bad_row": "skip",
            "eval": {"test": {"split": "train[2:4]"}},
        },
        policy={"model": str(model_folder)},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 4, "tokens_per_batch": 512},
        loss={"beta": 0.5},
    )
    refshard("precompute", "--config", folder / "run.yaml")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Another model of the same tokenizer."""
    return make_model(tmp_path_factory.mktemp("other"), tokenizer, seed=1)


def explained(folder: Path, row: int, *arguments: Any) -> dict[str, Any]:
    said = refshard("explain", "--config", folder / "run.yaml", "--row", row, "--json", *arguments)
    described: dict[str, Any] = json.loads(said.stdout)
    return described


def plain_logps(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """What transformers gives each token of a completion, in a forward of this one sequence."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [float(logps[len(prompt) + i - 1, id]) for i, id in enumerate(completion)]


def ids_of(tokens: list[Mapping[str, Any]]) -> list[int]:
    return [token["id"] for token in tokens]


def column(tokens: list[Mapping[str, Any]], name: str) -> list[float]:
    return [token[name] for token in tokens if token["scored"]]


def test_tokens_and_log_probs_are_those_of_the_tokenizer_and_of_a_plain_forward(
    scored: Path, model_folder: Path, other: Path, tokenizer: Any, tmp_path: Path
) -> None:
    found = explained(scored, 1, "--policy", other, "--html", tmp_path / "row.html")
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, other)]
    prompt = ids_of(found["prompt"])
    assert prompt == tokenizer(ROWS[1]["prompt"])["input_ids"]
    for side in ("chosen", "rejected"):
        completion = found["completions"][side]
        ids = ids_of(completion["tokens"])
        assert prompt + ids == tokenizer(ROWS[1]["prompt"] + ROWS[1][side] + "</s>")["input_ids"]
        assert completion["ending"] == "EOS '</s>' added"
        reference, policy = (plain_logps(model, prompt, ids) for model in models)
        assert column(completion["tokens"], "stored") == pytest.approx(reference, abs=1e-4)
        assert column(completion["tokens"], "recomputed") == pytest.approx(reference, abs=1e-4)
        assert column(completion["tokens"], "policy") == pytest.approx(policy, abs=1e-4)
        sums = completion["sums"]
        assert sums["stored"] == pytest.approx(sum(reference), abs=1e-3)
        assert sums["policy - reference"] == pytest.approx(sum(policy) - sum(reference), abs=1e-3)
    assert found["compared"]["agrees"]
    assert found["compared"]["largest"] < 1e-4
    assert found["store"]["place"].endswith("part-00000.parquet")
    # The last tokens on the page are those of the rejected completion, by how far the policy has moved them.
    last = found["completions"]["rejected"]["tokens"][-1]
    hint = re.findall(r'title="(id [^"]*)"', (tmp_path / "row.html").read_text(encoding="utf-8"))[-1]
    assert hint.endswith(f"policy {last['policy']:.4f}, policy - reference {last['policy'] - last['recomputed']:.4f}")


def test_a_set_of_its_own_is_counted_by_its_source_and_read_from_its_own_store(scored: Path) -> None:
    found = explained(scored, 3, "--set", "test", "--no-model")
    assert found["place"].endswith("pairs.jsonl:4")
    assert found["store"]["place"].endswith("test/part-00000.parquet")
    config = scored / "run.yaml"
    said = refshard("explain", "--config", config, "--row", 4, "--set", "test", "--no-model", check=2)
    assert "has rows 2 to 3, counted from 0" in said.stderr
    assert "there are train, test" in refshard("explain", "--config", config, "--row", 0, "--set", "x", check=2).stderr


def explain_here(config: Any, **options: Any) -> None:
    """Run the stage in this process."""
    given = {"row": 1, "set_name": "train", "recompute": True, "policy": None}
    command.run(config, **{**given, **options}, view=command.View(as_json=True))


def test_a_policy_is_looked_for_before_a_model_is_loaded(
    scored: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def load(config: Any, device: Any) -> Any:
        loaded.append(config)
        raise DataError("loaded")

    monkeypatch.setattr(scorer, "load_reference", load)
    run, empty = tmp_path / "run", tmp_path / "empty"
    for folder in (run, empty):
        folder.mkdir()
    (run / "refshard.yaml").touch()
    config = load_config(scored / "run.yaml", ("train.bf16=true", f"train.output_dir={run}"))
    refused: list[tuple[Path, tuple[str, ...], type[RefshardError], str]] = [
        (empty, (), ConfigError, "--policy: .*empty: no config.json in it.*train.output_dir"),
        (other, ("policy.lora.r=4",), ConfigError, "--policy: .*: no adapter_config.json in it"),
        (run, (), UnfinishedError, "run: neither finished nor a whole checkpoint in it"),
    ]
    for folder, overrides, kind, message in refused:
        with pytest.raises(kind, match=message):
            explain_here(load_config(scored / "run.yaml", overrides), policy=folder)
    assert loaded == []

    # Of a run that goes on it is the newest whole checkpoint, which computes as in training.
    for step in (2, 4):
        shutil.copytree(other, run / f"checkpoint-{step}")
    commit_checkpoint(run / "checkpoint-2", 2, {})
    with pytest.raises(DataError, match="loaded"):
        explain_here(config, policy=run, recompute=False)
    assert [config.reference.model for config in loaded] == [str(run / "checkpoint-2")]
    assert reference_precision(loaded[0]) == Precision(weights="float32", autocast="bfloat16")


def test_of_parts_without_the_pair_only_keys_are_read(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(scored / "shards" / "train")
    key = next(read_parts(open_store(folder), ["pair_key"]))["pair_key"][1].as_py()
    identity = read_manifest(folder)["identity"]
    read: list[tuple[int, bool]] = []

    def watched(store: Any, number: int, columns: Any = None) -> Any:
        read.append((number, columns is None))
        return read_checked_part(store, number, columns)

    monkeypatch.setattr(stored_module, "read_checked_part", watched)
    stored, _ = find_stored(folder, key.hex(), 1, identity, None)
    assert stored is not None
    assert len(stored.token_logps["chosen"]) == stored.lengths["chosen"]
    assert read == [(0, False), (0, True)]
    read.clear()
    stored, remarks = find_stored(folder, "00" * 16, 9, identity, None)
    assert stored is None
    assert "no pair in it has this key" in remarks[-1]
    assert read == [(2, False), (0, False), (1, False)]


def test_a_store_beyond_the_references_exact_length_is_remarked_on(scored: Path, tmp_path: Path) -> None:
    """Stores of earlier versions may hold pairs that a longer neighbour has changed."""
    folder = open_folder(scored / "shards" / "train")
    identity = read_manifest(folder)["identity"]
    shorter = {**identity, "tokenization": {**identity["tokenization"], "max_length": 64}}
    _, (remark, *_) = find_stored(folder, "00" * 16, 9, shorter, 64)
    assert "with pairs of more than 64 tokens, this reference's log-probs depend on the batch" in remark
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    longrope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    model = make_model(tmp_path / "longrope", make_tokenizer(), rope_parameters=longrope)
    config = load_config(scored / "run.yaml", [f"policy.model={model}"])
    (remark,) = command._remarks(config, recompute=False, has_policy=False)
    assert remark.startswith("data.max_length: must be at most 32 for policy.model")


def test_what_is_no_number_is_null_in_json(tokenizer: Any) -> None:
    pair = with_logps(one_row({"prompt": "A", "chosen": " b", "rejected": " c"}, tokenizer), "stored", [math.nan], [-1])
    described = json.loads(views.as_json(views.Findings(pair=pair, reference="m", beta=1)), parse_constant=pytest.fail)
    assert [side["sums"]["stored"] for side in described["completions"].values()] == [None, -1]
    assert described["completions"]["chosen"]["tokens"][0]["stored"] is None


def test_what_max_length_cuts_is_told_from_what_is_scored(scored: Path) -> None:
    found = explained(scored, LONG_ROW, "--no-model")
    tokens = found["completions"]["chosen"]["tokens"]
    room = 128 - len(found["prompt"])
    assert [token["scored"] for token in tokens] == [i < room for i in range(len(tokens))]
    assert [token["cut"] for token in tokens] == [i >= room for i in range(len(tokens))]
    assert found["completions"]["chosen"]["ending"] == "EOS '</s>' added, and cut off"
    assert len(column(tokens, "stored")) == room
    assert not any(token["cut"] for token in found["completions"]["rejected"]["tokens"])


def test_a_dropped_row_says_why_with_its_tokens_or_its_text(scored: Path, tokenizer: Any) -> None:
    config = scored / "run.yaml"
    found = explained(scored, FILLED_ROW)
    assert found["dropped"]["reason"] == "prompt_too_long"
    count = len(tokenizer(FILLED["prompt"])["input_ids"])
    assert f"its prompt alone has {count} tokens" in found["dropped"]["why"]
    assert len(found["prompt"]) == count
    assert not any(token["scored"] for side in found["completions"].values() for token in side["tokens"])
    assert {value for side in found["completions"].values() for value in side["sums"].values()} == {None}

    said = refshard("explain", "--config", config, "--row", EMPTY_ROW).stdout
    assert "empty completion: " in said
    assert "pairs.jsonl:10: chosen is empty after the prompt. It is skipped" in said
    assert '"A?"' in said
    assert "\x1b" not in said


def test_of_a_long_prompt_head_and_end_are_printed_and_all_of_it_when_asked_for(scored: Path) -> None:
    words = ("explain", "--config", scored / "run.yaml", "--row", FILLED_ROW)
    short, full = refshard(*words).stdout, refshard(*words, "--full").stdout
    left_out = re.search(r"^\.\.\. ([\d,]+) tokens, shown with --full \.\.\.$", short, re.MULTILINE)
    assert left_out is not None
    count = int(left_out[1].replace(",", ""))
    assert len(full.splitlines()) == len(short.splitlines()) - 1 + count
    assert "shown with" not in full
    prompt = full.partition("\nprompt\n")[2].partition("\nchosen\n")[0].splitlines()[1:]
    kept = [line for line in short.partition("\nprompt\n")[2].splitlines() if "not scored" in line]
    assert [line.split() for line in kept[:24]] == [line.split() for line in prompt[:24]]
    assert [line.split() for line in kept[24:72]] == [line.split() for line in prompt[-48:]]


def test_another_reference_disagrees_and_is_named(scored: Path, other: Path) -> None:
    said = refshard("explain", "--config", scored / "run.yaml", "--row", 1, "-o", f"reference.model={other}").stdout
    assert re.search(
        r"^remark .* of another reference or tokenization .* reference.weights: shards", said, re.MULTILINE
    )
    assert "stored and recomputed DISAGREE" in said


def test_a_value_that_was_changed_in_the_store_is_shown_at_its_token(scored: Path, tmp_path: Path) -> None:
    """With all digests made anew, as one does who means it: only the model can tell."""
    shards = tmp_path / "shards" / "train"
    shards.mkdir(parents=True)
    for file in (scored / "shards" / "train").iterdir():
        (shards / file.name).write_bytes(file.read_bytes())
    part = shards / "part-00000.parquet"
    table = pq.read_table(part)
    lists = table["chosen_token_logps"].to_pylist()
    lists[2][1] -= 1
    sums = table["ref_chosen_logps"].to_numpy() - np.array([0, 0, 1, 0], np.float32)
    for name, values in (("chosen_token_logps", lists), ("ref_chosen_logps", sums)):
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, type=table.schema.types[at]))
    forge_part(part, table)
    override = ("-o", f"precompute.output={tmp_path / 'shards'}")

    found = explained(scored, 2, "--no-model", *override)
    assert found["store"] is None
    assert "its SHA-256 is not the one in index.json" in found["remarks"][-1]
    (shards / "index.json").unlink()
    found = explained(scored, 2, "--no-model", *override)
    assert "unfinished, 3 parts so far" in found["remarks"][0]
    assert column(found["completions"]["chosen"]["tokens"], "stored") == pytest.approx(lists[2])
    finish_store(shards, 3)
    found = explained(scored, 2, *override)
    tokens = found["completions"]["chosen"]["tokens"]
    gaps = [token["recomputed"] - token["stored"] for token in tokens]
    assert gaps == pytest.approx([float(i == 1) for i in range(len(tokens))], abs=1e-4)
    assert not found["compared"]["agrees"]


def test_without_a_store_tokens_are_shown_all_the_same(scored: Path, tmp_path: Path) -> None:
    said = refshard(
        "explain", "--config", scored / "run.yaml", "--row", 0, "--no-model", "-o", f"precompute.output={tmp_path}"
    ).stdout
    assert "no shards there. Run: refshard precompute" in said
    assert re.search(r"^  </s> +1  scored, special$", said, flags=re.MULTILINE)
    assert "logp" not in said


def test_nothing_in_the_data_reaches_a_terminal_or_a_page_as_a_command(scored: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "row.html"
    said = refshard(
        *("explain", "--config", scored / "run.yaml", "--row", STRANGE_ROW, "--no-model", "--html", page, "--color")
    ).stdout
    # What is left once colours are taken away.
    bare = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert len(bare) < len(said)
    assert all(c.isprintable() or c == "\n" for c in bare)
    assert r"\x1b [ 2 J" in bare
    assert "\x1b[31m" not in said

    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    body = text.partition("<body>")[2]
    assert "<script" not in body
    assert "<b>" not in body
    assert all(c.isprintable() or c == "\n" for c in body)
    assert re.findall(r"(?:src|href)=.(?!#)", body.replace("src=&#34;", "")) == []
    found = explained(scored, STRANGE_ROW, "--no-model")
    tokens = [*found["prompt"], *found["completions"]["chosen"]["tokens"]]
    spans = re.findall(r'<span class="token[^"]*"[^>]* title="(id [^"]*)">([^<]*)</span>', body)[: len(tokens)]
    assert [html.unescape(shown_text) for _, shown_text in spans] == [token["text"] for token in tokens]
    for (hint, _), token in zip(spans, tokens, strict=True):
        assert f"id {token['id']}, " in hint
        assert ("stored" in hint) == token["scored"]
        if token["scored"]:
            assert hint.endswith(f"stored {token['stored']:.4f}")


def test_colours_are_for_terminals_and_not_where_they_are_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert command._is_colorful()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not command._is_colorful()
    monkeypatch.setenv("NO_COLOR", "")
    assert command._is_colorful()
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert not command._is_colorful()


def test_tokens_are_coloured_by_their_number_and_wrapped_with_a_blank_between() -> None:
    cells = [Cell(text="ab", value=math.log(0.95)), Cell(text="日本", value=math.log(0.0005)), Cell(text="c")]
    lines = on_terminal(cells, of_logps(), 6)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines] == ["ab", "日本 c"]
    assert lines[0].startswith("\x1b[38;5;16m\x1b[48;5;230m")
    assert "48;5;124" in lines[1]
    assert "\x1b[2m" in lines[1]
    (line,) = on_terminal([Cell(text="x", value=math.nan)], of_logps(), 6)
    assert "48;5;91" in line
    assert list(map(width_of, ("日本", "e\u0301", "ab"))) == [4, 1, 2]
    assert [len(line) for line in on_terminal([Cell(text="x" * 25, struck=True)], of_logps(), 10)] == [22, 22, 17]


def test_a_scale_of_differences_has_its_ends_at_the_largest() -> None:
    scale = of_differences([0.1, -2.0, math.nan])
    assert [scale.step(value) for value in (-2.0, -0.7, -0.3, 0.0, 0.3, 0.7, 2.0)] == list(range(7))
    assert of_differences([0.0]).step(0.0) == 3


def test_every_byte_of_a_text_is_shown_whatever_the_tokenizer_spells_it_as() -> None:
    text = "Hé 日本\n\t€ \x00 Ġ▁ café"
    bytelevel = make_tokenizer(bos=True)
    ids = bytelevel(text)["input_ids"]
    assert b"".join(token_bytes(bytelevel, ids)) == b"<s>" + text.encode()

    letters = [*"HcafĠéé", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    sentencepiece = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(dict.fromkeys(letters))}, [], byte_fallback=True)
    )
    sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    sentencepiece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=sentencepiece, unk_token="<unk>")
    plain = "Hé 日本\n€ café"
    assert b"".join(token_bytes(fast, fast(plain)["input_ids"])) == plain.encode()

    halves = [shown(piece) for piece in token_bytes(bytelevel, bytelevel("€")["input_ids"][1:])]
    assert halves == [r"\xe2", r"\x82", r"\xac"]
    assert shown("a b\n\x1b\u202e日".encode()) == r"a·b↵\x1b\u202e日"
    assert token_bytes(bytelevel, [10_000]) == [b""]


def one_row(values: Mapping[str, Any], tokenizer: Any, **data: Any) -> Explanation:
    return explain_row(
        Row(0, "here:1", lambda: values), tokenizer, DataConfig(path="x", on_bad_row="skip", **data), "train"
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


def test_eos_bos_and_merges_are_said_as_they_are() -> None:
    tokenizer = make_tokenizer(template=CHATML)
    talk = one_row(
        {
            "prompt": [{"role": "user", "content": "Hi?"}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
        tokenizer,
    )
    assert talk.completions["chosen"].ending == "EOS '</s>' by the template"
    assert talk.completions["chosen"].tokens[-2].special
    # The generation prompt opens a thought that the completions do not have.
    assert "tokens merge across the prompt's end" in talk.remarks[0]

    with_bos = make_tokenizer(bos=True)
    own = one_row({"prompt": "<s><s>A", "chosen": " b</s>", "rejected": " b</s>"}, with_bos)
    assert own.completions["chosen"].ending == "EOS '</s>' of its own"
    assert own.remarks == (
        "the prompt begins with 2 BOS, '<s>'",
        "chosen and rejected are the same tokens: the loss of this pair is a constant",
    )
    # A tokenizer whose BOS marks turns writes none before a text.
    tokenizer.bos_token = "<|im_start|>"
    assert one_row({"prompt": "A", "chosen": " b", "rejected": " c"}, tokenizer).remarks == ()
    dropped = one_row({"prompt": "A", "chosen": " b", "rejected": " b"}, with_bos, on_identical="drop")
    assert dropped.dropped == "identical"
    assert "data.on_identical is drop" in dropped.why


def test_stored_sums_are_compared_where_nothing_else_is_and_longer_cuts_are_cut(tokenizer: Any) -> None:
    pair = one_row({"prompt": "A", "chosen": " b c d e", "rejected": " x"}, tokenizer)
    lengths = {side: len(completion.scored) for side, completion in pair.completions.items()}
    stored = StoredPair(
        place="part",
        row=0,
        sums={"chosen": -4.0, "rejected": -2.0},
        lengths=lengths,
        token_logps={},
        noise=NoiseFloor(),
    )
    logps = [np.full(count, -1.0, np.float32) for count in lengths.values()]
    gap = compare(with_logps(with_stored(pair, stored), "recomputed", *logps), (1e-3, 1e-2))
    assert gap is not None
    sums = [-float(count) for count in lengths.values()]
    wanted = [abs(sums[0] + 4) / lengths["chosen"], abs(sums[1] + 2) / lengths["rejected"]]
    assert (gap.mean, gap.largest) == (pytest.approx(np.mean(wanted)), pytest.approx(max(wanted)))
    assert gap.agrees == (max(wanted) == 0)

    longer = StoredPair(
        place="part",
        row=0,
        sums={"chosen": -99.0, "rejected": -99.0},
        lengths={side: count + 1 for side, count in lengths.items()},
        token_logps={side: [*[-1.0] * count, -90.0] for side, count in lengths.items()},
        noise=NoiseFloor(),
    )
    pair = with_stored(pair, longer)
    assert [completion.sums.stored for completion in pair.completions.values()] == sums
    logps[0][-1] = math.nan
    gap = compare(with_logps(pair, "recomputed", *logps), (1e-3, 1e-2))
    assert gap is not None
    assert not gap.agrees


def test_one_token_is_called_a_token() -> None:
    one = Completion(tokens=(Token(id=1, text="a", special=False, scored=True),), ending="EOS added")
    assert views._counts(one, None) == "1 token scored; EOS added"
