"""Measure how far refshard's training is from TRL's, loss by loss and option by option, and print it as a table.

Each case trains twice for ten steps in float32, from the same tiny model, on the same pairs in the same order, with
dropout off: TRL's DPOTrainer with its reference in memory, and ours on shards. The reference is the policy a few steps
of fine-tuning earlier, so that no ratio starts at 0. The ten steps are two passes over 40 pairs, and a case counts only
if training moved the mean loss from the first pass to the second (`Gaps.moved`).

What a gap is:

- Loss, gradient norm and most other metrics that TRL logs: the difference divided by TRL's value.
- Rewards and margins are beta times differences of logps that are far larger, so they carry the logps' rounding:
  divided by beta times the larger of TRL's two logps. Relative to a reward that happens to be near 0 it could be
  anything.
- `logits/*` are averages over positive and negative logits that nearly cancel: divided by the root mean square of the
  logits, measured once on the untrained policy.

The largest is over the ten steps; the mean is over the ten steps of one metric. For "other metrics" it is the largest
of any of them, and the mean of the one whose mean is worst.

    python tests/support/parity_table.py            print the table
    python tests/support/parity_table.py --write    and put it into docs/losses.md, between its two markers
"""

import argparse
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import datasets
import torch
import transformers
import trl
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.config.loss import WITHOUT_REFERENCE, LossName
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger, kept_pairs
from pipeline.data.sources import open_source, read_rows
from pipeline.models.loading import load_policy
from pipeline.scoring.forward import prepare
from pipeline.scoring.selfcheck import check_scoring
from pipeline.store.join import join
from pipeline.store.reference_table import load_reference_table
from pipeline.store.store import open_store
from pipeline.training.batches import Collator
from pipeline.training.losses import balance_weight
from pipeline.training.trainer import PairTrainer
from support.models import CORPUS, make_model, make_tokenizer
from support.processes import ROOT
from support.runs import refshard, write_config, write_jsonl
from support.trl_peer import load, trl_trainer

PAGE = ROOT / "docs" / "losses.md"
OPENING, CLOSING = "<!-- parity table -->", "<!-- end of parity table -->"

STEPS, BATCH_PAIRS, SEED, MAX_LENGTH = 10, 8, 42, 128
NUM_PAIRS = STEPS * BATCH_PAIRS // 2
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAMW_RATE = 1e-4

LARGEST_BAR = 1e-5
# A hundred times the largest gap allowed, so that a loss that training did not reach could not pass.
MOVED_BAR = 1e-3

History = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: what both trainers are set to."""

    name: str
    loss: Mapping[str, Any]
    """Fields of our `loss` section, from which TRL's follow"""
    model: str = "llama"
    lora: bool = False
    learning_rate: float = 2e-2
    """Of SGD: large enough to move the loss, small enough not to multiply the rounding"""
    mean_bar: float = 1e-6
    """What the mean gaps must stay below"""
    why: str = ""
    """Why the two differ on purpose, or can't be compared; empty where they must agree"""
    peer_fails: bool = False
    """TRL stops with an error"""


@dataclass(frozen=True)
class Gaps:
    """Relative differences between the two over the ten steps."""

    loss: tuple[float, float]
    """Largest and mean"""
    grad_norm: tuple[float, float]
    """Largest and mean"""
    metrics: tuple[float, float]
    """Largest and mean, of the worst of the other metrics"""
    worst: str
    """The metric with the largest gap"""
    moved: float
    """Change of TRL's mean loss from the first pass over the pairs to the second, relative to the first"""

    def within(self, largest: float, mean: float) -> bool:
        """Whether all gaps are below the two bars."""
        each = (self.loss, self.grad_norm, self.metrics)
        return all(gap < largest and average < mean for gap, average in each)


def _case(types: str, *, model: str = "llama", lora: bool = False, **options: Any) -> Case:
    """Name a case by its losses, joined with a plus, and by what else is set; the rest are fields of the case."""
    own = {key: options.pop(key) for key in ("learning_rate", "mean_bar", "why", "peer_fails") if key in options}
    names = types.split("+")
    kind = [*(["Mixtral"] if model == "mixtral" else []), *(["LoRA"] if lora else [])]
    settings = [f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]
    return Case(
        name=", ".join([" + ".join(f"`{name}`" for name in names), *kind, *settings]),
        loss={"type": names if len(names) > 1 else names[0], **options},
        model=model,
        lora=lora,
        **own,
    )


IN_TRL: list[LossName] = [
    name
    for name in get_args(LossName)
    if name not in ("dpop", "beta_dpo", "cal_dpo", "r_dpo", *WITHOUT_REFERENCE)  # not in its DPOTrainer
]
_SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
# Divided by lengths and times beta, its slope is small.
_FLAT = {"learning_rate": 0.2}
# Where the slope itself changes with the ratio, the weights' rounding, no longer the same in the two after the first
# step, comes back a few times larger in the gradient's norm. It does so as well between two runs of TRL, one of them
# from weights moved by one unit in their last place: up to 6e-6, on average 2e-6.
_CURVED = {"mean_bar": 3e-6}
# It changes by a factor of e per nat (forward_kl), or its sign within tau / beta, half a nat (discopop). Short steps,
# or single pairs drift so far that their slope is in the hundreds.
_STEEP = {**_CURVED, "learning_rate": 1e-3}
_CONSERVATIVE = "differs on purpose: ours smooths the labels (conservative DPO), TRL ignores label_smoothing"
_IN_PLACE = "TRL stops with an error: it multiplies the weights into the output of relu, which the gradient needs"

CASES: list[Case] = [
    *(
        _case(
            name,
            **({"label_smoothing": 0.1} if name in _SMOOTHED else {}),
            **({"sigmoid_norm": _FLAT, "discopop": _STEEP}.get(name, {})),
        )
        for name in IN_TRL
    ),
    _case("sigmoid+sft"),
    _case("sigmoid+hinge+ipo", weights=[1.0, 0.5, 0.25]),
    _case("sigmoid", beta=0.5),
    _case("ipo", beta=0.5),
    _case("exo_pair", label_smoothing=0.001),
    _case("robust", label_smoothing=0.3),
    _case("aot"),
    _case("discopop", discopop_tau=0.5),
    *(
        _case(name, f_divergence_type=divergence, **(_CURVED if divergence == "js_divergence" else _STEEP))
        for name in ("sigmoid", "ipo")
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    _case("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.5, **_CURVED),
    _case("hinge", f_divergence_type="js_divergence", **_CURVED),
    _case("robust", f_divergence_type="js_divergence", label_smoothing=0.1, **_CURVED),
    _case("sigmoid", ld_alpha=0.0),
    _case("sigmoid", ld_alpha=0.5),
    _case("ipo", ld_alpha=0.5),
    _case("aot", ld_alpha=0.5),
    _case("sft", ld_alpha=0.5),
    _case("sigmoid", use_weighting=True),
    _case("ipo", use_weighting=True),
    _case("hinge", use_weighting=True, why=_IN_PLACE, peer_fails=True),
    _case("sigmoid", model="mixtral"),
    _case("sigmoid", model="mixtral", router_aux_loss_coef=0.1),
    _case("sigmoid", model="mixtral", router_aux_loss_coef=0.0),
    _case("sigmoid", lora=True),
    _case("ipo", lora=True),
    _case("sigmoid", label_smoothing=0.1, why=_CONSERVATIVE),
    _case("sigmoid_norm", label_smoothing=0.1, why=_CONSERVATIVE),
]


class Bench:
    """What all cases share: models, pairs and shards, made once in a folder; trains either side on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = make_tokenizer(bos=True)
        self.rows = _rows()
        write_jsonl(folder / "pairs.jsonl", self.rows)
        self.logit_size: dict[str, float] = {}
        self._theirs: dict[str, History] = {}
        for kind in ("llama", "mixtral"):
            self.logit_size[kind] = _make_models(folder, kind, self.tokenizer, self.rows)
            refshard("precompute", "--config", self._write_config(kind, f"{kind}.yaml"))

    def train_ours(self, case: Case, optimizer: Mapping[str, Any]) -> History:
        """Train on the shards."""
        config = load_config(self._write_config(case.model, "case.yaml", lora=case.lora, loss=case.loss))
        # The adapter's factors are the first random numbers, as in TRL.
        transformers.set_seed(SEED)
        policy = load_policy(config)
        prepare(policy)
        packed = check_scoring(policy, "policy.model") == "packed" and not balance_weight(policy, config.loss)
        trainer = PairTrainer(
            loss=config.loss,
            model=policy,
            args=transformers.TrainingArguments(
                remove_unused_columns=False, label_names=[], **self._arguments(optimizer)
            ),
            data_collator=Collator(self.tokenizer.pad_token_id, MAX_LENGTH, packed=packed),
            train_dataset=self._joined(config, case.model),
        )
        return _history(trainer)

    def train_trl(self, case: Case, optimizer: Mapping[str, Any]) -> History:
        """Train TRL's DPOTrainer with the reference in memory; once for a case, however often it is asked for."""
        key = f"{case.name} {optimizer}"
        if key in self._theirs:
            return self._theirs[key]
        renamed = {"type": "loss_type", "weights": "loss_weights"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer = trl_trainer(
                self.folder / case.model,
                self.rows,
                self.tokenizer,
                reference=load(self.folder / f"{case.model}-ref"),
                lora=LORA if case.lora else None,
                max_length=MAX_LENGTH,
                **{renamed.get(key, key): value for key, value in case.loss.items()},
                **self._arguments(optimizer),
            )
            self._theirs[key] = _history(trainer)
        return self._theirs[key]

    def _write_config(
        self, model: str, name: str, *, lora: bool = False, loss: Mapping[str, Any] | None = None
    ) -> Path:
        return write_config(
            self.folder / name,
            data={"path": str(self.folder / "pairs.jsonl"), "max_length": MAX_LENGTH},
            policy={"model": str(self.folder / model), **({"lora": LORA} if lora else {})},
            reference={"model": str(self.folder / f"{model}-ref")},
            precompute={"output": str(self.folder / f"{model}-shards"), "rows_per_shard": 16},
            loss=dict(loss or {}),
        )

    def _arguments(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "output"),
            "per_device_train_batch_size": BATCH_PAIRS,
            "max_steps": STEPS,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "seed": SEED,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            **optimizer,
        }

    def _joined(self, config: Config, model: str) -> datasets.Dataset:
        file = self.folder / f"{model}-{config.loss.ld_alpha}.arrow"
        if not file.exists():
            store = open_store(self.folder / f"{model}-shards" / "train")
            table = load_reference_table([store], MAX_LENGTH, ld_alpha=config.loss.ld_alpha)
            pairs = kept_pairs(read_rows(open_source(config.data)), self.tokenizer, config.data, Ledger())
            assert join(pairs, table, file).matched == NUM_PAIRS
        return datasets.Dataset.from_file(str(file))


def _rows() -> list[dict[str, str]]:
    """Pairs of words in any order, XXX tokens a completion, so that lengths differ within a pair."""
    words = " ".join(CORPUS).split()
    pick = random.Random(SEED)

    def text(least: int, most: int) -> str:
        return " ".join(pick.choice(words) for _ in range(pick.randint(least, most)))

    return [
        {"prompt": text(3, 6), "chosen": " " + text(3, 12), "rejected": " " + text(3, 12)} for _ in range(NUM_PAIRS)
    ]


def _make_models(folder: Path, kind: str, tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> float:
    """Save a reference that has seen all texts, and a policy that has seen the chosen ones five times more.

    Returns:
        Root mean square of the policy's logits on the chosen texts.
    """
    model = _random_model(folder / kind, kind, tokenizer)
    texts = {
        side: tokenizer([row["prompt"] + row[side] for row in rows], return_tensors="pt", padding=True)
        for side in ("chosen", "rejected")
    }

    def fine_tune(sides: Sequence[str], learning_rate: float) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        for side in sides:
            batch = texts[side]
            ids, mask = batch["input_ids"], batch["attention_mask"]
            optimizer.zero_grad()
            model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
            optimizer.step()

    # Far enough to write most of the texts, not so far that nothing is left to chance.
    fine_tune(["chosen", "rejected"] * 18, 1e-2)
    model.save_pretrained(folder / f"{kind}-ref")
    tokenizer.save_pretrained(folder / f"{kind}-ref")
    fine_tune(["chosen"] * 5, 3e-4)
    model.save_pretrained(folder / kind)
    ids, mask = texts["chosen"]["input_ids"], texts["chosen"]["attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return float(logits[mask.bool()].pow(2).mean().sqrt())


def _random_model(folder: Path, kind: str, tokenizer: Any) -> Any:
    make_model(folder, tokenizer)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if kind == "llama":
        return llama
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: getattr(llama.config, name) for name in shared}
    transformers.set_seed(SEED)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=2)
    )


def _history(trainer: transformers.Trainer) -> History:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    return entries


def measure(bench: Bench, case: Case, *, adamw: bool = False, ours: Case | None = None) -> Gaps:
    """Train both sides and compare them.

    Args:
        bench: Models and pairs.
        case: What to set.
        adamw: With AdamW instead of SGD.
        ours: What to set on our side, where that is to be another case.
    """
    optimizer = {"optim": "sgd", "learning_rate": case.learning_rate}
    if adamw:
        optimizer = {"optim": "adamw_torch", "learning_rate": ADAMW_RATE}
    return compare(
        bench.train_ours(ours or case, optimizer),
        bench.train_trl(case, optimizer),
        beta=case.loss.get("beta", 0.1),
        logit_size=bench.logit_size[case.model],
    )


def compare(ours: History, theirs: History, *, beta: float, logit_size: float) -> Gaps:
    """Compare every metric that TRL logs, step by step."""
    gaps = {name: _gaps(ours, theirs, name, beta, logit_size) for name in theirs[0] if name != "step"}
    both = {name: (max(values), sum(values) / len(values)) for name, values in gaps.items()}
    loss, grad_norm = both.pop("loss"), both.pop("grad_norm")
    worst = max(both, key=lambda name: both[name][0])
    first, second = (sum(entry["loss"] for entry in half) for half in (theirs[: STEPS // 2], theirs[STEPS // 2 :]))
    return Gaps(
        loss=loss,
        grad_norm=grad_norm,
        metrics=(both[worst][0], max(mean for _, mean in both.values())),
        worst=worst,
        moved=abs(second - first) / abs(first),
    )


def _gaps(ours: History, theirs: History, name: str, beta: float, logit_size: float) -> list[float]:
    gaps = []
    for a, b in zip(ours, theirs, strict=True):
        scale = abs(b[name])
        if name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            scale = beta * max(abs(b["logps/chosen"]), abs(b["logps/rejected"]))
        elif name.startswith("logits/"):
            scale = logit_size
        difference = abs(a[name] - b[name])
        gaps.append(0.0 if difference == 0 else difference / scale if scale else float("inf"))
    return gaps


def _short(gap: float) -> str:
    return f"{gap:.0e}".replace("e-0", "e-") if gap else "0"


def table(results: Sequence[tuple[Case, Gaps | None, float]]) -> str:
    """Write the table in Markdown, and under it what the numbers are.

    Args:
        results: Each case with its gaps under SGD, and with its largest gap of loss and gradient norm under AdamW; the
            gaps of a case that differs are not looked at.
    """
    lines = [
        "| loss and options | loss | gradient norm | other metrics | with AdamW |",
        "|---|---|---|---|---|",
    ]
    for case, gaps, adamw in results:
        if gaps is None:
            lines.append(f"| {case.name} | {case.why} | | | |")
            continue
        cells = [f"{_short(largest)}, {_short(mean)}" for largest, mean in (gaps.loss, gaps.grad_norm, gaps.metrics)]
        lines.append(f"| {case.name} | {' | '.join(cells)} | {_short(adamw)} |")
    return "\n".join([*lines, "", NOTE])


NOTE = f"""\
The cells give relative differences, largest and mean, between refshard on shards and TRL {trl.__version__} with its
reference in memory, over {STEPS} steps of SGD in float32 from the same weights on the same pairs. The last
column gives the largest difference of loss and gradient norm with AdamW. AdamW divides by the roots of
small second moments, which multiplies rounding. Differences are relative to TRL's value, with two
exceptions. Rewards and margins are differences of far larger logps; their differences are relative to beta
times those logps. `logits/*` are averages of logits that cancel; their differences are relative to the root
mean square of the logits. "Other metrics" are all others that TRL logs; the numbers are those of the worst.
No pair ties in these runs. For a tie, `rewards/accuracies` counts one half here, and 0 in TRL.
`tests/support/parity_table.py` makes this table. `tests/parity/test_loss_parity.py` checks, with SGD, that
all differences are below {_short(LARGEST_BAR)}."""


_BLOCK = re.compile(f"({re.escape(OPENING)}\n)(.*?)({re.escape(CLOSING)})", re.DOTALL)


def names_in(text: str) -> list[str]:
    """Names of the cases in the table of the page, in order."""
    [(_, found, _)] = _BLOCK.findall(text)
    return [line.split(" | ")[0].removeprefix("| ") for line in found.splitlines() if line[:3] == "| `"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare refshard's training with TRL's, loss by loss.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/losses.md, between its markers")
    write = parser.parse_args().write
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results: list[tuple[Case, Gaps | None, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for case in CASES:
            if case.why:
                results.append((case, None, 0.0))
                continue
            gaps = measure(bench, case)
            with_adamw = measure(bench, case, adamw=True)
            results.append((case, gaps, max(with_adamw.loss[0], with_adamw.grad_norm[0])))
            print(
                f"{case.name}: loss moved by {gaps.moved:.0e}, worst other metric {gaps.worst}"
                f"{'' if gaps.within(LARGEST_BAR, case.mean_bar) else ', ABOVE THE BAR'}",
                file=sys.stderr,
            )
    made = table(results)
    print(made)
    if write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_BLOCK.sub(lambda found: f"{found[1]}{made}\n{found[3]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
