"""Memory: stage two holds one model, stage one and the join do not grow with the data, and go on where it ran out."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.data.intake import KeptPair, Ledger
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import NamedModel
from pipeline.scoring import memory
from pipeline.scoring import scorer as scoring_scorer
from pipeline.scoring.forward import prepare, score
from pipeline.scoring.packing import Batch, Reading
from pipeline.scoring.selfcheck import check_scoring
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair
from pipeline.store.store import create_store, write_part
from stages.check.estimate import MEMORY_BAND, Lengths, estimate
from stages.check.hardware import Hardware
from stages.check.shapes import shapes_of
from support.models import make_model, make_tokenizer
from support.processes import ROOT
from support.runs import simple_rows, write_config, write_jsonl
from support.tally import tally
from support.units import score_unit

pytestmark = pytest.mark.slow

MIB = 2**20

# Peak resident memory of a process in each of its works, and what it held before, both in bytes. The kernel's
# high-water mark is reset after the imports, whose own peak would hide small models, and before each work.
_MEASURE = """
import gc, json, re, sys
from pathlib import Path
def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
{imports}
for work in {works!r}:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start = memory("VmRSS")
    exec(work)
    print("MEASURED", json.dumps([start, memory("VmHWM")]))
"""

_OURS = """
from stages.cli import main
main.main({arguments!r}, standalone_mode=False)
"""

_IMPORTS = "import stages.precompute.command, stages.train; from transformers import AutoTokenizer, LlamaForCausalLM"
_TRL_IMPORTS = "import datasets, torch, transformers, trl; from trl import DPOTrainer"

_TRL = """
rows = [json.loads(line) for line in Path({data!r}).read_text().splitlines()]
load = transformers.AutoModelForCausalLM.from_pretrained
trainer = trl.DPOTrainer(
    model=load({model!r}, dtype=torch.float32),
    ref_model=load({model!r}, dtype=torch.float32),
    args=trl.DPOConfig(output_dir={output!r}, bf16=False, gradient_checkpointing=False, report_to="none",
        max_length=64, **{train!r}),
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=transformers.AutoTokenizer.from_pretrained({model!r}),
)
trainer.train()
trainer.save_model()
"""


def _measure(imports: str, *works: str) -> list[int]:
    """Bytes that each work took on top of the imported program and of what those before it left behind."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(imports=imports, works=works)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # glibc keeps freed blocks for reuse; given back at once, the high-water mark is what was really held.
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = re.findall(r"^MEASURED \[(\d+), (\d+)\]$", done.stdout, re.MULTILINE)
    assert len(measured) == len(works)
    return [int(peak) - int(start) for start, peak in measured]


def test_stage_two_holds_one_model_where_trl_with_a_live_reference_holds_two(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    # Nearly all weights in the layers: a model of about 190 MiB, whose activations on short pairs weigh little.
    model = make_model(
        tmp_path / "model",
        tokenizer,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.02,
    )
    weights = (model / "model.safetensors").stat().st_size
    data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(8))
    train: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    config = write_config(
        tmp_path / "run.yaml",
        data={"path": str(data), "max_length": 64},
        policy={"model": str(model)},
        precompute={"output": str(tmp_path / "shards")},
        train={"output_dir": str(tmp_path / "ours"), **train},
    )
    scoring, training, trl = _measure(
        f"{_IMPORTS}; {_TRL_IMPORTS}",
        *(_OURS.format(arguments=[stage, "--config", str(config)]) for stage in ("precompute", "train")),
        _TRL.format(data=str(data), model=str(model), output=str(tmp_path / "trl"), train=train),
    )
    sizes = {"weights": weights, "stage one": scoring, "stage two": training, "TRL": trl}
    print({name: f"{size / MIB:.0f} MiB" for name, size in sizes.items()})
    # One copy of the weights and one of their gradients, and no third: the reference's.
    assert training < 2.6 * weights
    # What `refshard check` would have said of both.
    settings = load_config(config, ())
    estimated = estimate(
        dataclasses.replace(settings, reference=dataclasses.replace(settings.reference, dtype="float32")),
        shapes_of(NamedModel.policy(settings).text_config()),
        Lengths(pairs=8, prompt_tokens=120, chosen_tokens=120, rejected_tokens=160, longest_pair=80, usual_pair=60),
        Hardware(name="cpu", memory=0, is_gpu=False),
    )
    assert estimated.train is not None
    for measured, stage in ((scoring, estimated.precompute), (training, estimated.train)):
        # What was there after the imports is not in what is measured.
        about = stage.total_memory - stage.memory["Python and torch"]
        low, high = (share * about for share in MEMORY_BAND)
        print(f"estimated {low / MIB:.0f} to {high / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")
        assert low < measured < high
    assert trl - training > 0.8 * weights
    assert scoring < 1.8 * weights


def test_stage_one_takes_no_more_memory_for_ten_times_the_pairs(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    model = make_model(tmp_path / "model", tokenizer)
    works = []
    # The first one alone loads what is loaded at its first use, and is not counted.
    for name, count in (("first", 400), ("few", 400), ("many", 4000)):
        data = write_jsonl(tmp_path / f"pairs-{count}.jsonl", simple_rows(count))
        config = write_config(
            tmp_path / f"{name}.yaml",
            data={"path": str(data), "max_length": 128},
            policy={"model": str(model)},
            precompute={"output": str(tmp_path / name), "rows_per_shard": 200, "tokens_per_batch": 4096},
        )
        works.append(_OURS.format(arguments=["precompute", "--config", str(config)]))
    _, few, many = _measure(_IMPORTS, *works)
    print(f"{few / MIB:.1f} MiB, {many / MIB:.1f} MiB")
    # 3,600 more pairs held in memory as tokens and token logps alone would be over 10 MiB.
    assert many - few < 8 * MIB


_JOIN = """
# Both sizes fill several of these.
module._BATCH_BYTES = 2**20
store = open_store(Path({store!r}))
table = load_reference_table([store], None, folder=Path({work!r}), token_file=Path({work!r}, "tokens"))
ids = TokenizedPair(prompt_ids=[1], chosen_ids=[1] * {tokens}, rejected_ids=[1] * {tokens})
pairs = (KeptPair(row=i, place="", key=i.to_bytes(16, "big"), pair=ids) for i in range({count}))
assert join(pairs, table, Path({work!r}, "joined.arrow")).matched == {count}
reader = TokenLogps(Path({work!r}, "tokens"))
assert all(reader.read(2 * {tokens} * i, 2 * {tokens})[0] == i for i in range({count}))
"""


def test_a_join_takes_no_more_memory_for_ten_times_the_token_logps(tmp_path: Path) -> None:
    """Written, joined and read one by one, as the collator does."""
    tokens, rows_per_part, works = 1000, 128, []
    noise = np.random.default_rng(0).standard_normal((2, rows_per_part, tokens), np.float32)
    for count in (1024, 10240):
        folder = tmp_path / f"store-{count}"
        header = create_store(
            folder, {"reference": {"declared": "a"}, "tokenization": {"max_length": 2048, "token_logps": True}}, {}, {}
        )
        for unit in range(count // rows_per_part):
            numbers = range(unit * rows_per_part, (unit + 1) * rows_per_part)
            noise[0, :, 0] = numbers
            pairs = [
                ScoredPair(
                    key=n.to_bytes(16, "big"),
                    row=n,
                    prompt_tokens=1,
                    chosen_token_logps=noise[0, n % rows_per_part],
                    rejected_token_logps=noise[1, n % rows_per_part],
                )
                for n in numbers
            ]
            ledger = Ledger(rows=len(pairs), kept=len(pairs))
            write_part(folder, unit, pairs, ledger, header=header)
        assert finish_store(folder, count // rows_per_part) == []
        work = tmp_path / f"work-{count}"
        works.append(_JOIN.format(store=str(folder), work=str(work), tokens=tokens, count=count))
    # The first one alone loads what is loaded at its first use, and is not counted.
    _, few, many = _measure(
        "from pipeline.store import join as module; from pipeline.store.join import join; "
        "from pipeline.store.reference_table import TokenLogps, load_reference_table; "
        "from pipeline.data.intake import KeptPair; "
        "from pipeline.store.store import open_store; from pipeline.data.tokens import TokenizedPair",
        works[0],
        *works,
    )
    print(f"{few / MIB:.1f} MiB, {many / MIB:.1f} MiB")
    # The token logps of 9,216 more pairs are 70 MiB, and their ids as many.
    assert many - few < 16 * MIB


_PIECES = """
def pieces():
    for seed in range({pieces}):
        rows = np.zeros(10000, table.INDEX_ROW)
        rows["key"] = np.frombuffer(np.random.default_rng(seed).bytes(160000), "S16")
        rows["part"] = seed
        yield rows
"""
_BUILD = """
index = table.ReferenceTable(pieces(), folder=Path({work!r}))
assert len(index) == 10000 * {pieces}
"""
_LOOK_UP = """
for rows in pieces():
    for start in range(0, 10000, 1000):
        found = index.look_up(rows["key"][start : start + 1000].tolist())[1]
        assert (found["part"] == rows["part"][0]).all()
"""


def test_an_index_of_ten_million_pairs_takes_2_gib_to_build_and_few_to_ask(tmp_path: Path) -> None:
    imports = "import numpy as np; from pipeline.store import reference_table as table; np.random.default_rng(0)"
    works = (_PIECES, _BUILD, _LOOK_UP)
    peaks = {n: _measure(imports, *(w.format(pieces=n, work=str(tmp_path)) for w in works))[1:] for n in (20, 200)}
    print({10000 * n: [f"{peak / MIB:.1f} MiB" for peak in both] for n, both in peaks.items()})
    build, look_up = (many - few for few, many in zip(peaks[20], peaks[200], strict=True))
    assert build / 1_800_000 < 2**31 / 10_000_000
    # 1.8 million rows more are 76 MiB, which are mapped, not held.
    assert look_up < 24 * MIB


# Out of memory in stage one: on with less at a time, and with the same numbers.


@pytest.fixture(scope="module")
def scorer() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prepare(model)
    assert check_scoring(model, "reference.model") == "packed"
    return model


def unit(count: int = 40) -> list[KeptPair]:
    pairs = []
    for i in range(count):
        prompt, chosen, rejected = ([3 + (7 * i + j) % 90 for j in range(1 + (i * k) % 9)] for k in (2, 5, 7))
        pair = TokenizedPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
        pairs.append(KeptPair(row=i, place=f"row {i}", key=bytes([i]), pair=pair))
    return pairs


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def tokens_of(batch: Batch) -> int:
    return sum(ids.numel() for ids in (batch.input_ids, *(part.ids for part in batch.continuations or ())))


def refuse_above(monkeypatch: pytest.MonkeyPatch, tokens: int, error: BaseException) -> list[int]:
    """Have the scorer run out of memory above so many tokens; gives the sizes that were tried."""
    tried: list[int] = []

    def limited(model: Any, batch: Batch, **keywords: Any) -> Any:
        tried.append(tokens_of(batch))
        if tried[-1] > tokens:
            raise error
        return score(model, batch, **keywords)

    monkeypatch.setattr(scoring_scorer, "score", limited)
    return tried


@pytest.mark.parametrize("reading", ["packed", "cached", "padded"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_unit_that_ran_out_of_memory_is_finished_with_half_the_budget(
    scorer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, reading: Reading
) -> None:
    pairs = unit()
    undisturbed, budget = score_unit(scorer, pairs, 400, reading)
    assert budget == 400 and not capsys.readouterr().err
    tried = refuse_above(monkeypatch, 130, error)
    scored, budget = score_unit(scorer, pairs, 400, reading)
    assert budget == 100
    assert 130 < max(tried) <= 400
    printed = capsys.readouterr().err
    assert printed.count("Out of memory") == 2 and "resuming with 100 tokens" in printed
    assert [pair.key for pair in scored] == [pair.key for pair in pairs]
    for a, b in zip(scored, undisturbed, strict=True):
        assert (a.row, a.prompt_tokens) == (b.row, b.prompt_tokens)
        np.testing.assert_allclose(a.chosen_token_logps, b.chosen_token_logps, rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.rejected_token_logps, b.rejected_token_logps, rtol=0, atol=1e-5)


def test_what_does_not_fit_alone_is_a_settings_error_with_the_ways_on(
    scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = refuse_above(monkeypatch, 3, OUT_OF_MEMORY[0])
    with pytest.raises(ConfigError, match=r"not even the longest pair alone, \d+ tokens.*data\.max_length"):
        score_unit(scorer, unit(), 400)
    assert len(tried) < 10


def test_another_error_is_not_taken_for_it(scorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = refuse_above(monkeypatch, 130, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        score_unit(scorer, unit(), 400)
    assert len(tried) == 1


_REAL = """
import json, resource, sys
import torch, transformers
sys.path.insert(0, "tests")
from support.units import score_unit
from pipeline.data.intake import KeptPair
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import prepare
from pipeline.scoring.selfcheck import check_scoring
torch.manual_seed(0)
torch.set_num_threads(1)
# A wide layer: 2,000 tokens take 2,000 * 16,384 * 4 bytes, 125 MiB, of each of its three tensors.
config = transformers.LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16384, num_hidden_layers=1,
    num_attention_heads=2, initializer_range=0.3)
model = transformers.LlamaForCausalLM(config).eval()
prepare(model)
check_scoring(model, "reference.model")
ids = lambda i, n: [3 + (i * 31 + j * 7) % 90 for j in range(n)]
pairs = [KeptPair(row=i, place="", key=bytes([i]), pair=TokenizedPair(prompt_ids=ids(i, 40 + i),
    chosen_ids=ids(i + 1, 80), rejected_ids=ids(i + 2, 60))) for i in range(60)]
undisturbed, _ = score_unit(model, pairs, 500)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
scored, budget = score_unit(model, pairs, 8000)
gap = max(abs(x - y) for a, b in zip(scored, undisturbed) for x, y in
    zip([*a.chosen_token_logps, *a.rejected_token_logps], [*b.chosen_token_logps, *b.rejected_token_logps]))
print("RESULT", json.dumps([budget, float(gap), len(scored)]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's size is read from /proc")
def test_a_cpu_that_really_ran_out_of_memory_goes_on_with_less() -> None:
    done = subprocess.run([sys.executable, "-c", _REAL], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    budget, gap, count = json.loads(done.stdout.split("RESULT")[1])
    assert "Out of memory: resuming with" in done.stderr
    assert budget < 8000 and count == 60
    assert gap < 1e-4
    tally("memory that ran out in the middle of a unit", 1, outcome="the rest of the unit scored in smaller batches")


@pytest.mark.parametrize("reading", ["packed", "cached", "padded"])
@pytest.mark.parametrize(
    ("free_gib", "kib_per_token", "expected"),
    [(40, 512, 32768), (40, 1024, 16384), (2, 512, 2048), (0.01, 512, 2048), (500, 16, 65536), (40, 0, 65536)],
)
def test_the_tokens_that_fit_a_gpu_are_a_power_of_two_below_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, kib_per_token: int, expected: int, reading: Reading
) -> None:
    """A pretended GPU, whose peak is the weights' and so much a token of what the batch really holds."""
    tokens = 0

    def probe(model: Any, batch: Batch, **keywords: Any) -> None:
        nonlocal tokens
        tokens = tokens_of(batch)

    weight = types.SimpleNamespace(device=torch.device("cuda"))
    model = types.SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr(Batch, "to", lambda self, device: self)
    monkeypatch.setattr(memory, "score", probe)
    monkeypatch.setattr(memory, "positions_of", lambda model: None)
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30 + tokens * kib_per_token * 1024)
    found = memory.tokens_that_fit(model, reading)
    assert found == expected
    assert found & (found - 1) == 0


def test_of_several_gpus_the_one_with_the_least_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pretended GPUs: the second takes twice as much a token, and has half as much room."""
    tokens = 0

    def probe(model: Any, batch: Batch, **keywords: Any) -> None:
        nonlocal tokens
        tokens = tokens_of(batch)

    weights = [types.SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 0, 1)]
    model = types.SimpleNamespace(parameters=lambda: iter(weights))
    free, per_token = {0: 40 * 2**30, 1: 20 * 2**30}, {0: 2**20, 1: 2**21}
    monkeypatch.setattr(Batch, "to", lambda self, device: self)
    monkeypatch.setattr(memory, "score", probe)
    monkeypatch.setattr(memory, "positions_of", lambda model: None)
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: tokens * per_token[device.index])
    assert memory.tokens_that_fit(model, "packed") == 4096
    free[1] = 200 * 2**30
    assert memory.tokens_that_fit(model, "packed") == 16384


def test_on_a_cpu_the_tokens_that_fit_are_a_constant(scorer: Any) -> None:
    assert memory.tokens_that_fit(scorer, "packed") == memory.tokens_that_fit(scorer, "cached") == 2048
