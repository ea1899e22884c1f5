"""No code in a template, a dataset or a checkpoint is run: each has a payload that would leave a file.

Models and adapters with payloads are in the table of damage (`support/damage.py`).
"""

import ast
import inspect
import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import BadRow, ConfigError, one_line
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.config.schema import Config, PolicyConfig, PrecomputeConfig
from pipeline.config.training import TrainSection
from pipeline.data import layouts, pairs, tokens
from pipeline.data.intake import Ledger, kept_pairs
from pipeline.data.sources import open_source, read_rows
from pipeline.run.card import model_card
from pipeline.run.checkpoints import MARKER, commit_checkpoint
from pipeline.run.inputs import PolicyInputs, ReferenceInputs, RunInputs, SetInputs
from support.damage import CHAT, EVIL, MARK, Payload
from support.models import make_tokenizer
from support.processes import ROOT
from support.runs import refshard, simple_rows, write_jsonl
from support.tally import tally

MakeRun = Callable[..., Path]


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload leaves."""
    yield tmp_path / MARK
    if not (tmp_path / MARK).exists():
        tally("a payload that leaves a file when it is run", 1, outcome="never run")


def test_the_payload_is_live(mark: Path, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()
    mark.unlink()
    torch.save(Payload(mark), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert mark.exists()


# Chat templates

BREAKOUTS = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "{{ ('{0.__class__.__mro__}').format(messages) }}{{ self.__init__.__globals__ }}",
    "{{ messages | attr('__class__') }}{{ (messages | attr('__class__')).mro() }}",
    "{{ messages.append({}) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
    "{{ 'a' * 10 ** 15 }}",
    "{{ range(10 ** 9) | list }}",
    "{% if %}",
]


def tokenize_chat(template: str) -> tokens.TokenizedPair:
    return tokens.tokenize(layouts.to_pair(CHAT, {}, "row 1"), make_tokenizer(template=template), "row 1")


@pytest.mark.parametrize("template", BREAKOUTS)
def test_a_template_that_breaks_out_is_refused_and_nothing_runs(template: str, mark: Path) -> None:
    with pytest.raises(BadRow, match=r"row 1: the chat template refuses it: \S"):
        tokenize_chat(template.replace("MARK", str(mark)))
    assert not mark.exists()


def test_a_template_works_in_a_thread_too() -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(tokenize_chat(template)))
    thread.start()
    thread.join()
    assert found == [tokenize_chat(template)]


def test_a_row_can_not_say_how_its_template_is_applied() -> None:
    """Every argument of the library's own is refused, those of later versions too."""
    own = set(inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert own - {"self", "kwargs", "tools", "documents"} <= pairs._NO_TEMPLATE_KWARGS
    with pytest.raises(BadRow, match="chat_template_kwargs must not hold chat_template"):
        layouts.to_pair({**CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, {}, "row 1")
    allowed = {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    assert layouts.to_pair(allowed, {}, "row 1").chat_template_kwargs


# Data


class _EvilType(pa.ExtensionType):  # type: ignore[misc]
    """An extension type of another program in this process, whose reading would run code."""

    read: list[bytes] = []

    def __init__(self) -> None:
        super().__init__(pa.string(), "evil.type")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> "_EvilType":
        cls.read.append(serialized)
        return cls()


@pytest.fixture
def registered() -> Iterator[list[bytes]]:
    pa.register_extension_type(_EvilType())
    _EvilType.read.clear()
    yield _EvilType.read
    pa.unregister_extension_type("evil.type")


def test_columns_of_parquet_are_what_they_are_stored_as(tmp_path: Path, registered: list[bytes]) -> None:
    text = pa.array([" a", " b"])
    table = pa.table(
        {"prompt": text, "chosen": text.cast(pa.json_()), "rejected": pa.ExtensionArray.from_storage(_EvilType(), text)}
    )
    hints = {"huggingface": json.dumps({"info": {"features": {"chosen": {"_type": "Image"}}}}), "pandas": "{"}
    pq.write_table(table.replace_schema_metadata(hints), tmp_path / "p.parquet")
    registered.clear()
    row = next(read_rows(open_source(DataConfig(path=str(tmp_path / "p.parquet"))))).load()
    assert registered == []
    pq.read_schema(tmp_path / "p.parquet")
    assert registered, "the payload is not live"
    assert row == {"prompt": " a", "chosen": " a", "rejected": " a"}


@pytest.mark.parametrize("kind", ["saved", "streamed", "loaded"])
def test_no_file_is_opened_because_a_row_names_it(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.new("RGB", (1, 1)).save(tmp_path / "private.png")
    features = datasets.Features(
        {"image": datasets.Image(), **{n: datasets.Value("string") for n in ("chosen", "rejected")}}
    )
    rows = {"image": [{"path": str(tmp_path / "private.png"), "bytes": None}], "chosen": ["a b"], "rejected": ["a c"]}
    made = datasets.Dataset.from_dict(rows, features=features)
    assert made[0]["image"].size == (1, 1)
    if kind == "saved":
        made.save_to_disk(str(tmp_path / "saved"))
        source = open_source(DataConfig(path=str(tmp_path / "saved")))
    else:
        given = made.to_iterable_dataset() if kind == "streamed" else made
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: given)
        source = open_source(DataConfig(path="org/pairs", streaming=kind == "streamed"))
    opened: list[Any] = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: opened.append(a))
    (row,) = read_rows(source)
    assert row.load() == {"chosen": "a b", "rejected": "a c"}
    assert opened == []


def test_a_script_or_pickle_is_no_dataset(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(EVIL.format(mark=str(mark)))
    for name in ("train.pkl", "train.pickle", "train.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises(ConfigError, match="can't tell its format"):
            open_source(DataConfig(path=str(folder / name)))
    with pytest.raises(ConfigError, match="no file of split 'train'"):
        open_source(DataConfig(path=str(folder)))
    assert not mark.exists()


# The terminal, the card


@given(text=st.text(st.characters(categories=["L", "N", "C", "Z", "P", "S"]), max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_shown_line_is_one_line_that_no_terminal_obeys(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert "\n" not in line
    line.encode("utf-8")
    assert one_line(line) == line


def test_a_long_message_keeps_its_place_and_its_way_on() -> None:
    line = one_line("file.jsonl:3: " + "x" * 100_000 + ". Set data.on_bad_row: skip")
    assert len(line) < 2100
    assert line.startswith("file.jsonl:3: ")
    assert line.endswith("Set data.on_bad_row: skip")


ESCAPES = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egnp\ud83d"


@pytest.mark.slow
def test_what_a_dataset_holds_never_reaches_the_terminal_raw(make_run: MakeRun, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a", ESCAPES: "b"})
    # Columns are quoted as Python does it; the name of a file is shown as it is.
    data = tmp_path / "pairs\x1b[31m\x07\x9b2J.jsonl"
    data.write_text(row + "\n")
    config = make_run(data={"path": str(data)})
    shown = command("precompute", "--config", config, check=65)
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert r"\x1b]0;title\x07" in shown
    assert r"pairs\x1b[31m\x07\x9b2J.jsonl:1" in shown


def test_the_card_holds_no_escapes_and_no_header_of_a_stranger() -> None:
    hostile = f"{ESCAPES}\n---\nlicense: evil\n---\n<img src=x onerror=alert(1)> | `code` [a](javascript:b)"
    train = SetInputs(dataset=hostile, ledger={}, matched=1, missing=0, tokens={}, store=hostile, noise=None)
    inputs = RunInputs(
        reference=ReferenceInputs(name=hostile, identity={}, fingerprint="f" * 64),
        policy=PolicyInputs(model=hostile, adapter=hostile, dtype=None, parameters=2, trained_parameters=1),
        sets={"train": train},
        stage_one=[],
    )
    config = Config(
        data=DataConfig(path="pairs", format="hub"),
        policy=PolicyConfig(model=hostile),
        precompute=PrecomputeConfig(output="shards"),
        train=TrainSection(output_dir="policy"),
    )
    card = model_card(config, inputs, name=hostile, pairs=1, metrics={hostile: 1.0}, steps=(1, 1))
    assert all(line.isprintable() for line in card.split("\n"))
    assert card.count("\n---\n") == 1
    assert "license" not in yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    text = re.sub("`[^`]*`", "", card.split("\n---\n", 1)[1])
    assert "<img" not in text.replace("\\<", "")
    assert "[a](" not in text


# A whole run

SECRETS = {name: f"canary-{name}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")}


def command(*words: Any, check: int = 0) -> str:
    """Run the command; gives all that it showed."""
    done = refshard(*words, check=check)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_no_secret_is_written_or_shown_and_no_checkpoint_is_unpickled(
    make_run: MakeRun, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    config = make_run(train={"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3})
    words = ["--config", config]
    shown = command("precompute", *words)
    shown += command("train", *words)
    assert "canary" not in shown
    written = [f for name in ("shards", "policy") for f in (tmp_path / name).rglob("*") if f.is_file()]
    assert len(written) > 20
    assert [file for file in written if b"canary" in file.read_bytes()] == []
    assert not list(tmp_path.rglob("training_args.bin"))

    # What the checkpoint of a stranger holds, its marker right for it, is not run either.
    run = tmp_path / "policy"
    marker = json.loads((run / "checkpoint-2" / MARKER).read_text())
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    saved = shutil.copytree(run / "checkpoint-2", tmp_path / "saved")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree(run / "checkpoint-2")
        folder = shutil.copytree(saved, run / "checkpoint-2")
        torch.save(Payload(mark), folder / name)
        commit_checkpoint(folder, 2, marker["identity"])
        shown = command("train", *words, check=65)
        assert "checkpoint-2: holds objects other than tensors and numbers" in shown
        assert not mark.exists()
    # As it was saved, it is gone on from: the random numbers' files load without a pickle's help.
    shutil.rmtree(run / "checkpoint-2")
    shutil.copytree(saved, run / "checkpoint-2")
    assert "Resuming" in command("train", *words)


@pytest.mark.parametrize("url", ["https://me:secret@host/x", "s3://key:secret@bucket/x", "hf://secret@datasets/x"])
@pytest.mark.parametrize(
    "key", ["data.path", "policy.model", "precompute.output", "train.output_dir", "data.eval.a.path"]
)
def test_a_password_in_the_settings_is_refused_and_not_repeated(make_run: MakeRun, key: str, url: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: holds a user name or password") as caught:
        load_config(make_run(), [f"{key}={url}"])
    assert "secret" not in str(caught.value)


# The code itself

FORBIDDEN = {"eval", "exec", "compile", "__import__", "system", "popen"}
UNPICKLES_ITS_OWN = {"pipeline/data/loading.py"}
"""An error on its way from a loader to the process that started it"""


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_nothing_in_the_package_unpickles_evaluates_or_trusts_code() -> None:
    files = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")]
    loads = 0
    for file in files:
        where = file.relative_to(ROOT).as_posix()
        for name, call in calls(file):
            last = name.rsplit(".", 1)[-1]
            assert name not in FORBIDDEN and name not in {f"os.{word}" for word in FORBIDDEN}, (where, name)
            assert not (name.startswith("pickle.load") and where not in UNPICKLES_ITS_OWN), where
            assert name not in ("np.load", "numpy.load", "joblib.load"), where
            # Tensors and numbers alone.
            assert name != "torch.load" or keywords(call).get("weights_only") == "True", where
            assert name != "yaml.load" or keywords(call).get("Loader") == "_Loader", where
            assert keywords(call).get("shell") != "True", where
            assert keywords(call).get("trust_remote_code", "False") == "False", where
            if last == "from_pretrained" and name.split(".")[-2] not in ("GenerationConfig", "PeftConfig"):
                # Those two are read from JSON alone.
                loads += 1
                wanted = (
                    "trust_remote_code" if name.split(".")[-2] in ("AutoTokenizer", "AutoConfig") else "use_safetensors"
                )
                assert wanted in keywords(call), (where, ast.unparse(call))
    assert loads >= 6
    # No setting has that name: `names` only says why.
    settings = [file for file in ROOT.glob("pipeline/config/*.py") if file.name != "names.py"]
    assert not any("trust_remote_code" in file.read_text() for file in settings)


def test_rows_of_a_source_are_only_read(tmp_path: Path) -> None:
    data = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", simple_rows(3))))
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    assert len(list(kept_pairs(read_rows(open_source(data)), make_tokenizer(), data, Ledger()))) == 3
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
