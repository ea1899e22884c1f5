"""Records the numbers of six small runs, and compares them with those of another version of the code.

    python tests/support/recording.py record FILE               run all cases, write their digests
    python tests/support/recording.py compare FILE [NAME ...]   run them again, say which digests differ

    --root DIR    run the code of another checkout
    --cache DIR   prepare the embedded default once, and take it from there afterwards
    --jobs N      run N cases side by side, 2 if left out; each computes on one thread
    --keep DIR    leave what the cases have written in DIR, for a look

Everything goes through the command line, so that the same script serves any layout of the code. A case runs both
stages on the CPU, on one thread, in a temporary folder. Its digests are of what must not move: the shards, the
trained weights, the logged numbers. Versions, times and paths are left out of them. Numbers are the same on one kind
of processor with one version of torch; FILE names both, and `compare` warns where they have changed.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, and by the commands, which inherit it.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parents[2]
HH = Path("shared", "data", "hh-rlhf-harmless.jsonl.gz")
"""The HH-RLHF pairs, from the folder that holds the checkout"""

CORPUS = [
    "Human: how do I bake bread? Assistant: mix flour, water, salt and yeast; wait; bake it hot.",
    "The quick brown fox jumps over the lazy dog. What is two plus two? Four! Or, if you insist, 5.",
    "I'm sorry, but I can't help with that. Sure, here is what you asked for: one, two, three.",
    "Review the film called The Silent River. The acting felt dull. I would happily recommend it.",
]


class SkippedError(Exception):
    """A case that can't run here; the message says why."""


# --- Models, pairs, settings --------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer of 400 tokens that puts a BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(folder: Path, family: str, **changes: Any) -> Path:
    """Save a random model of about 0.1 million parameters, sharp enough that its log-probs differ by nats."""
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        **changes,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    transformers.set_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ATTENTION = {
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def write_pairs(file: Path, count: int, start: int = 0) -> Path:
    """Write pairs with an explicit prompt, all different, of varying length."""
    rows = [
        {
            "prompt": f"What is {i} plus {i + 1}?" + " Please answer." * (i % 4),
            "chosen": f" It is {2 * i + 1}." + " I am sure." * (i % 3),
            "rejected": f" Nobody knows {i}" + " or cares" * (i % 5) + ".",
        }
        for i in range(start, start + count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_settings(folder: Path, model: Path, **changes: Mapping[str, Any]) -> Path:
    """Write the settings of a small run; keyword arguments are merged into its sections."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"path": str(write_pairs(folder / "pairs.jsonl", 24)), "max_length": 128},
        "policy": {"model": str(model)},
        "precompute": {"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
        "loss": {"beta": 0.1},
        "train": {
            "output_dir": str(folder / "policy"),
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": "1e-3",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    for name, values in changes.items():
        sections.setdefault(name, {}).update(values)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return file


# --- Cases --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A run in a folder of its own, by the code of one checkout, and what it has written so far."""

    folder: Path
    root: Path
    cache: Path | None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def command(self, *words: Any) -> None:
        """Run a command of refshard, and take the digests of what is there when it is done."""
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        line = [sys.executable, "-m", "stages.cli", *map(str, words)]
        done = subprocess.run(line, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"refshard {' '.join(map(str, words))}: exit {done.returncode}\n{done.stderr[-4000:]}")
        # Some of it is gone when the next one is done: references that have moved on, with their shards.
        self.look()

    def both_stages(self, *words: Any) -> None:
        """Score the reference, then train the policy."""
        self.command("precompute", *words)
        self.command("train", *words)

    def recipe(self, name: str) -> Path:
        """Find a ready recipe of the checkout."""
        return next(iter(sorted(self.root.glob(f"*/recipes/{name}.yaml"))))

    def look(self) -> None:
        """Take the digests of all that must not move."""
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = file.relative_to(self.folder).as_posix()
            if "checkpoint-" not in name:
                self.digests.update(digests_of(file, name))

    def logged(self) -> list[dict[str, float]]:
        """Read what training has logged, but for times."""
        state = json.loads((self.folder / "policy" / "trainer_state.json").read_text(encoding="utf-8"))
        return [without_times(entry) for entry in state["log_history"]]


def run_default(case: Case) -> None:
    """Run the embedded default as `make train` does."""
    demo = case.folder / "demo"
    kept = None if case.cache is None else case.cache / "default"
    if kept is not None and (kept / "prepared.json").exists():
        shutil.copytree(kept, demo)
    else:
        case.command("demo", "prepare", demo)
        if kept is not None:
            # By another name at first: a copy that is cut short must not be taken for a whole one.
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(demo, beside := kept.with_name(f"{kept.name}-{os.getpid()}"))
            beside.rename(kept)
    case.both_stages(
        *("--config", case.recipe("default")),
        *overrides(
            {
                "data.path": demo / "train.jsonl",
                "data.eval": f"{{heldout: {{path: {demo / 'heldout.jsonl'}}}}}",
                "policy.model": demo / "model",
                "precompute.output": case.folder / "shards",
                "train.output_dir": case.folder / "policy",
                "train.use_cpu": "true",
            }
        ),
    )


def run_hh_rlhf(case: Case) -> None:
    """Run the HH-RLHF recipe on a few real transcripts, in float32, with a tiny model in place of the hub's."""
    data = case.root.parent / HH
    if not data.exists():
        raise SkippedError(f"the HH-RLHF pairs are not at {data}")
    # By another path the rows would have other names; copied, they have the same in each run.
    with gzip.open(data, "rt", encoding="utf-8") as lines, (case.folder / "hh.jsonl").open("w", encoding="utf-8") as to:
        to.writelines(line for line, _ in zip(lines, range(300), strict=False))
    case.both_stages(
        *("--config", case.recipe("hh_rlhf")),
        *overrides(
            {
                "data.path": case.folder / "hh.jsonl",
                "data.split": "train[:240]",
                "data.eval": "{test: {split: 'train[240:]'}}",
                "data.max_length": 512,
                "policy.model": make_model(case.folder / "model", "Llama", **ATTENTION),
                "reference.dtype": "float32",
                "precompute.output": case.folder / "shards",
                "precompute.rows_per_shard": 64,
                "train.output_dir": case.folder / "policy",
                "train.bf16": "false",
                "train.learning_rate": "1e-3",
                "train.max_steps": 8,
                "train.gradient_accumulation_steps": 2,
                "train.eval_strategy": "no",
                "train.logging_steps": 1,
                "train.warmup_steps": 2,
                "train.use_cpu": "true",
            }
        ),
    )


def run_lora(case: Case) -> None:
    """Train an adapter whose reference is the model without it, and evaluate on the way."""
    settings = write_settings(
        case.folder,
        make_model(case.folder / "model", "Llama", **ATTENTION),
        data={"eval": {"heldout": {"path": str(write_pairs(case.folder / "heldout.jsonl", 8, start=100))}}},
        policy={"lora": {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}},
        train={"max_steps": 10, "learning_rate": "1e-2", "eval_strategy": "steps", "eval_steps": 5},
    )
    case.both_stages("--config", settings)


def run_trdpo(case: Case) -> None:
    """Train three windows of two steps, between which the reference moves; each window's shards count."""
    settings = write_settings(
        case.folder,
        make_model(case.folder / "model", "Llama", **ATTENTION),
        reference={"sync": {"steps": 2, "mixup_alpha": 0.6}},
    )
    for _ in range(3):
        case.command("precompute", "--config", settings)
        case.command("train", "--config", settings, "--one-window")


def run_padded(case: Case) -> None:
    """Train a state-space model, which reads no packed rows."""
    case.both_stages("--config", write_settings(case.folder, make_model(case.folder / "model", "Mamba", state_size=8)))


def run_moe(case: Case) -> None:
    """Train a mixture of experts, whose router's balance is part of its loss."""
    model = make_model(case.folder / "model", "Mixtral", **ATTENTION, **EXPERTS)
    case.both_stages("--config", write_settings(case.folder, model))


CASES: dict[str, Callable[[Case], None]] = {
    "default": run_default,
    "hh_rlhf": run_hh_rlhf,
    "lora": run_lora,
    "trdpo": run_trdpo,
    "padded": run_padded,
    "moe": run_moe,
}


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Spell settings out as options of the command line."""
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


# --- Digests ------------------------------------------------------------------------------------------------------

RAW = "#bytes"
"""Ends the name of a part's digest that counts everything in it, the versions too"""

WHOLE_FILES = {"model.safetensors", "adapter_model.safetensors", "tokenizer.json"}
TIMES = ("runtime", "per_second", "preparation_time")


def digests_of(file: Path, name: str) -> dict[str, str]:
    """Give the digests of a file by its name; none for a file that nothing is recorded of."""
    if file.name in WHOLE_FILES or (file.name.endswith(".jsonl") and name.startswith("demo/")):
        return {name: sha256(file.read_bytes())}
    if file.suffix == ".parquet":
        content = file.read_bytes()
        table = pq.ParquetFile(io.BytesIO(content)).read()
        # A part that tells of skipped rows names the folder that they are in.
        has_raw = (table.schema.metadata or {}).get(b"refshard.skipped") == b"[]"
        return {name: digest_of_table(table), **({f"{name}{RAW}": sha256(content)} if has_raw else {})}
    if file.name == "trainer_state.json":
        state = json.loads(file.read_text(encoding="utf-8"))
        return {name: digest_of_json([without_times(entry) for entry in state["log_history"]])}
    if file.name in ("manifest.json", "index.json") and "shards" in file.parts:
        content = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in ("declared", "plan_digest", "sha256")}
        for part in kept.get("parts", []):
            # The parts' own digests are beside this one.
            del part["bytes"], part["sha256"]
        return {name: digest_of_json(kept)}
    if file.name == "skipped.jsonl":
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {name: digest_of_json(without_folders(lines))}
    return {}


def digest_of_table(table: pa.Table) -> str:
    """Hash columns, values and footer; of the footer neither versions nor paths."""
    footer = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    said = {key: value for key, value in footer.items() if key.startswith("refshard.")}
    # The plan is in the manifest.
    for key in ("refshard.plan", "refshard.provenance", "refshard.digest"):
        said.pop(key, None)
    if "refshard.skipped" in said:
        said["refshard.skipped"] = json.dumps(without_folders(json.loads(said["refshard.skipped"])))
    plain = table.replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    return sha256(json.dumps(said, sort_keys=True).encode() + sink.getvalue().to_pybytes())


def without_folders(skipped: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Leave of the place of each skipped row the file's name and the line."""
    return [
        {
            key: value.replace(entry["place"], Path(entry["place"]).name) if isinstance(value, str) else value
            for key, value in entry.items()
        }
        for entry in skipped
    ]


def without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a line of the log what the clock has measured."""
    return {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}


def digest_of_json(value: Any) -> str:
    """Hash a value as canonical JSON."""
    return sha256(json.dumps(value, sort_keys=True).encode())


def sha256(content: bytes) -> str:
    """Give the SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


# --- Recording and comparing --------------------------------------------------------------------------------------


def run_case(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a case in a folder that is new; give its digests and its losses."""
    with working_folder(name, arguments.keep) as folder:
        case = Case(folder, arguments.root, arguments.cache)
        CASES[name](case)
        case.look()
        log = case.logged()
        return {
            "digests": dict(sorted(case.digests.items())),
            "losses": [entry["loss"] for entry in log if "loss" in entry],
            "eval_losses": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        }


@contextlib.contextmanager
def working_folder(name: str, keep: Path | None) -> Iterator[Path]:
    """Make the folder of a case, and delete it afterwards unless it is to be kept."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=f"recording-{name}-") as folder:
            yield Path(folder)
        return
    shutil.rmtree(keep / name, ignore_errors=True)
    (keep / name).mkdir(parents=True)
    yield keep / name


def run_cases(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Run cases, and give each with what it came to when it is done; None for one that can't run here."""

    def timed(name: str) -> tuple[dict[str, Any] | None, str]:
        began = time.monotonic()
        try:
            found = run_case(name, arguments)
        except SkippedError as reason:
            return None, f"skipped: {reason}"
        return found, f"{time.monotonic() - began:.0f} s"

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for name, (found, remark) in zip(names, pool.map(timed, names), strict=True):
            print(f"{name}: {remark}", file=sys.stderr, flush=True)
            yield name, found


def made_with() -> dict[str, str]:
    """Name what the numbers depend on beside the code."""
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": ".".join(map(str, sys.version_info[:2])),
        **{module.__name__: module.__version__ for module in (torch, transformers, pa)},
    }


def record(arguments: argparse.Namespace) -> int:
    """Run the cases and write what they came to; cases that are not named stay in the file as they are."""
    file: Path = arguments.file
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"] if arguments.names and file.exists() else {}
    for name, found in run_cases(arguments.names or list(CASES), arguments):
        if found is not None:
            cases[name] = found
    content = {"made_with": made_with(), "cases": {name: cases[name] for name in CASES if name in cases}}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Run the cases again and print what differs; gives 1 where something does."""
    recorded = json.loads(arguments.file.read_text(encoding="utf-8"))
    now = made_with()
    changed = [f"{key} {old} then, {now.get(key)} now" for key, old in recorded["made_with"].items() if old != now[key]]
    if changed:
        print(f"warning: numbers may differ by more than the code: {'; '.join(changed)}")
    names = arguments.names or [name for name in CASES if name in recorded["cases"]]
    if unknown := [name for name in names if name not in recorded["cases"]]:
        print(f"{', '.join(unknown)}: not recorded in {arguments.file}")
        return 1
    different = False
    for name, found in run_cases(names, arguments):
        if found is None:
            print(f"{name}: skipped")
            continue
        problems, remark = differences(recorded["cases"][name], found)
        different = different or bool(problems)
        print(f"{name}: {'DIFFERENT' if problems else 'same'}{remark}", *problems, sep="\n  ", flush=True)
    return int(different)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], str]:
    """Name the digests that differ, and say how far the losses are apart.

    Returns:
        The differences, and a remark on parts whose bytes alone differ: another version is in their footers.
    """
    old, new = then["digests"], now["digests"]
    moved = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    problems = [
        f"{name}: {'not there any more' if name not in new else 'new' if name not in old else 'another content'}"
        for name in moved
        if not name.endswith(RAW)
    ]
    for kind in ("losses", "eval_losses"):
        a, b = then[kind], now[kind]
        if len(a) != len(b):
            problems.append(f"{kind}: {len(a)} then, {len(b)} now")
        elif a != b:
            gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
            problems.append(f"{kind}: {gap:.3g} apart at most, first at number {first_difference(a, b)}")
    raw = [name for name in moved if name.endswith(RAW) and name in old and name in new]
    remark = f" (bytes of {len(raw)} parts differ: versions, paths or encoding, not numbers)" if raw else ""
    return problems, remark


def first_difference(a: Sequence[float], b: Sequence[float]) -> int:
    """Give the number, from 1, of the first of two equally many values that differs."""
    return next(number for number, (x, y) in enumerate(zip(a, b, strict=True), 1) if x != y)


def main() -> int:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases, all if left out: {', '.join(CASES)}")
    parser.add_argument("--root", type=Path, default=HERE, help="checkout whose code is run")
    parser.add_argument("--cache", type=Path, help="folder of the prepared default")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side")
    parser.add_argument("--keep", type=Path, help="folder that the cases' files stay in")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}")
    for option in ("root", "cache", "keep"):
        # The commands run in another folder.
        if (path := getattr(arguments, option)) is not None:
            setattr(arguments, option, path.resolve())
    torch.set_num_threads(1)
    return record(arguments) if arguments.action == "record" else compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
