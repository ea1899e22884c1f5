"""Prepare the embedded default, and summarize what training on it did.

`prepare` makes what a first run needs, from fixed seeds and without a network: a small reference model that writes
reviews, and preference pairs of its own reviews. A noisy judge who knows the true reward labels them (`reviews`).
`summary` reads the finished run and prints each figure beside the best one that is possible.

The model has 0.7 M parameters. It needs steps more than size: 625 steps of 16 reviews take about 20 seconds on two
cores and make about 95% of its reviews grammatical.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.base.errors import ConfigError, UnfinishedError
from pipeline.base.files import replace_file, write_json
from pipeline.base.progress import say, without_other_bars
from pipeline.base.schemas import Schema
from pipeline.base.signals import StopFlag
from pipeline.base.tables import aligned
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger, kept_pairs
from pipeline.data.sources import open_source, read_rows
from pipeline.models.files import load_tokenizer
from pipeline.replies import sampling
from pipeline.replies.drawing import draw_both
from pipeline.replies.means import estimate_kl
from pipeline.replies.records import Generation, write_generations
from pipeline.run.checkpoints import is_recorded
from pipeline.run.reading import read_run
from stages.demo import reviews

__all__ = ["prepare", "summary"]

_PREPARED = Schema(__package__, "prepared", "Delete it, and run the same command again")

_REVIEWS = 10_000
"""Number of generated reviews; the reference is trained on each once"""
_BATCH_REVIEWS = 16
_PAIRS, _HELDOUT_PAIRS = 4000, 400
_HELDOUT_PROMPTS = 400
"""Held-out prompts of the 1,600. Training pairs use the others; the reference has seen prompts of both"""


def _sampling(seed: int) -> sampling.Sampling:
    # The grammar's longest replies have about 50 tokens.
    return sampling.Sampling(max_tokens=72, temperature=1.0, seed=seed, batch_replies=400)


def prepare(folder: Path, *, seed: int = 0) -> None:
    """Make the reference model and the pairs in `folder`, unless they are there.

    Writes `model/`, `train.jsonl`, `heldout.jsonl` and, last, `prepared.json`. A folder whose `prepared.json` is of
    another seed, of other code, or from before the end, is made again. On one machine a seed gives the same bytes.

    Raises:
        ConfigError: The folder holds files of these names that another program wrote.
    """
    marker = folder / "prepared.json"
    digest = _digest(seed)
    files = ("model/model.safetensors", "model/tokenizer.json", "train.jsonl", "heldout.jsonl", marker.name)
    if all((folder / name).exists() for name in files) and _PREPARED.read(marker)["digest"] == digest:
        say(f"{folder} is prepared already.")
        return
    if not marker.exists() and (
        there := [folder / name for name in ("model", *files[2:4]) if (folder / name).exists()]
    ):
        raise ConfigError(f"FOLDER: must hold nothing of another program, got {there[0]}. Name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, {"digest": None})
    _use_two_threads()
    rng = random.Random(seed)
    corpus = [reviews.sample_review(rng) for _ in range(_REVIEWS)]
    tokenizer = _train_tokenizer(corpus)
    model = _train_reference(corpus, tokenizer, seed, rng)
    with without_other_bars():
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    prompts = reviews.all_prompts()
    rng.shuffle(prompts)
    rewards: Counter[int] = Counter()
    for name, asked, num_pairs in (
        ("train.jsonl", prompts[_HELDOUT_PROMPTS:], _PAIRS),
        ("heldout.jsonl", prompts[:_HELDOUT_PROMPTS], _HELDOUT_PAIRS),
    ):
        pairs, drawn = _draw_pairs(model, tokenizer, asked, num_pairs, rng)
        rewards.update(drawn)
        replace_file(folder / name, "".join(json.dumps(pair) + "\n" for pair in pairs).encode())
        say(f"{num_pairs} pairs of the reference's own reviews, labelled by a noisy judge: {folder / name}")
    # The optimum follows from the rewards of all replies, ties included.
    counts = {str(reward): count for reward, count in sorted(rewards.items())}
    write_json(marker, {"digest": digest, "reference_rewards": counts})


def summary(folder: Path, config: Config) -> None:
    """Print what training did, and save the figures with the run.

    Held-out accuracy comes from the margins of the run's last evaluation. True reward, grammar and KL come from replies
    of both models to the held-out prompts, which become the run's generations.

    Raises:
        UnfinishedError: The run has not finished.
    """
    run_folder, name = config.train.folder, next(iter(config.data.eval))
    margins = read_run(run_folder).margins.get(name) if is_recorded(run_folder) else None
    if margins is None:
        raise UnfinishedError(f"{run_folder}: must hold a finished run. Run: refshard train with the same settings")
    tokenizer: Any = load_tokenizer(config)
    kept = kept_pairs(read_rows(open_source(config.data, name)), tokenizer, config.data, Ledger())
    prompts = [one.pair.prompt_ids for one in kept]
    how = _sampling(seed=1)
    _use_two_threads()
    replies = draw_both(config, run_folder, prompts, how, tokenizer, StopFlag())
    generations = [
        Generation(
            set_name=name,
            row=row,
            prompt=tokenizer.decode(ids),
            step=margins.step,
            temperature=how.temperature,
            max_tokens=how.max_tokens,
            seed=how.seed,
            num_prompts=len(prompts),
            reward_by="true reward of the demo",
            reference=replace(before, reward=float(reviews.true_reward(before.text))),
            policy=replace(after, reward=float(reviews.true_reward(after.text))),
        )
        for row, (ids, (before, after)) in enumerate(zip(prompts, replies, strict=True))
    ]
    figures = _figures(folder, margins.columns["reward_margin"].tolist(), generations)
    write_generations(run_folder, generations)
    write_json(run_folder / "demo.json", figures)
    say(_as_text(figures, generations, config))


def _figures(folder: Path, margins: Sequence[float], generations: Sequence[Generation]) -> dict[str, float]:
    held_out = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = [row["chosen_reward"] - row["rejected_reward"] for row in held_out]
    counts = _PREPARED.read(folder / "prepared.json").get("reference_rewards", {})
    rewards = [int(reward) for reward, count in counts.items() for _ in range(count)]
    before, after = [g.reference for g in generations], [g.policy for g in generations]
    kl = estimate_kl(generations).mean
    return {
        "accuracy": fmean(margin > 0 for margin in margins),
        # The labels are noisy on purpose: ranking by true reward contradicts some of them.
        "accuracy_ceiling": fmean(label > 0 for label in labels),
        "true_ranking": fmean(margin * label > 0 for margin, label in zip(margins, labels, strict=True)),
        "margin": fmean(margins),
        "kl": kl,
        "reward_before": fmean(reply.reward or 0.0 for reply in before),
        "reward_after": fmean(reply.reward or 0.0 for reply in after),
        "reward_optimum": reviews.optimum_at_kl(rewards, max(kl, 0.0)).reward,
        "grammatical_before": fmean(reviews.is_grammatical(reply.text) for reply in before),
        "grammatical_after": fmean(reviews.is_grammatical(reply.text) for reply in after),
    }


# Prompts whose replies are printed. They are fixed beforehand, so broken replies are shown too.
_PRINTED = (0, 37)


def _as_text(f: dict[str, float], generations: Sequence[Generation], config: Config) -> str:
    possible_reward = f"{f['reward_optimum']:.2f} at this KL"
    rows = [
        ["What DPO did, on held-out prompts", "before", "after", "possible"],
        ["  accuracy on the judge's noisy labels", "0.500", f"{f['accuracy']:.3f}", f"{f['accuracy_ceiling']:.3f}"],
        ["  agreement with the true ranking", "0.500", f"{f['true_ranking']:.3f}", "1.000"],
        [f"  reward margin, beta {config.loss.beta:g}", "0.00", f"{f['margin']:.2f}", ""],
        ["  true reward of a sampled review", f"{f['reward_before']:.2f}", f"{f['reward_after']:.2f}", possible_reward],
        ["  grammatical reviews", f"{f['grammatical_before']:.1%}", f"{f['grammatical_after']:.1%}", ""],
        ["  KL from the reference, nats per review", "0.00", f"{f['kl']:.2f}", ""],
    ]
    lines = ["", *aligned(rows, left=(0, 3)), ""]
    for i in _PRINTED:
        lines.append(generations[i].prompt.removeprefix("<s>"))
        for label, reply in (("before", generations[i].reference), ("after ", generations[i].policy)):
            lines.append(f"  {label} ({reply.reward:+.0f}) {' '.join(reply.text.split())}")
    lines += [
        "",
        f"Shards     {config.precompute.output}    refshard inspect {config.precompute.output}",
        f"Policy     {config.train.folder}    with its model card in README.md, the settings in refshard.yaml",
        "",
        "Next: the same shards serve any beta, learning rate, or LoRA rank:",
        "  make train ARGS='-o loss.beta=0.1 -o train.output_dir=runs/default/beta-0.1'",
        "Then your own data and model:",
        "  make train CONFIG=run.yaml",
    ]
    return "\n".join(lines)


def _digest(seed: int) -> str:
    """Hash the seed and the code that makes the files, so that an edit is noticed."""
    sources = [Path(__file__), Path(reviews.__file__), Path(sampling.__file__)]
    parts = [str(seed), *(path.read_text() for path in sources)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _use_two_threads() -> None:
    """Compute on two threads at most: the matrices are small, so more threads are slower and round differently."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


def _train_tokenizer(corpus: Sequence[reviews.Review]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of the grammar is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # merging ends before, at about 760, when every word is one token
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_row_text(review) for review in corpus], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def _row_text(review: reviews.Review) -> str:
    return f"{review.prompt}\n{review.reply}"


def _train_reference(corpus: Sequence[reviews.Review], tokenizer: Any, seed: int, rng: random.Random) -> Any:
    """Train the reference on the replies of the corpus: one pass, float32, no loss on prompts."""
    with torch.random.fork_rng(devices=[]):  # initial weights come from torch's global generator
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([_row_text(r) for r in corpus])["input_ids"]]
    prompt_lengths = [len(ids) for ids in tokenizer([r.prompt for r in corpus])["input_ids"]]
    order = rng.sample(range(len(rows)), len(rows))
    num_steps = len(rows) // _BATCH_REVIEWS
    num_millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    say(f"Training the reference: {num_millions:.2f} M parameters, {num_steps} steps on generated reviews")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
    )
    model.train()
    for step in range(num_steps):
        picked = order[step * _BATCH_REVIEWS : (step + 1) * _BATCH_REVIEWS]
        loss = _reply_loss(model, [rows[i] for i in picked], [prompt_lengths[i] for i in picked])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 125 == 0 or step == num_steps - 1:
            say(f"  step {step:4d}  loss {loss.item():.3f}")
    return model.eval()


def _reply_loss(model: Any, rows: Sequence[list[int]], prompt_lengths: Sequence[int]) -> torch.Tensor:
    """Average the negative log-likelihood over the reply tokens of a batch."""
    pad = model.config.pad_token_id
    # Under causal attention no real token attends to padding on its right, so no mask is needed.
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    is_reply = ((torch.arange(ids.shape[1]) >= torch.tensor(prompt_lengths)[:, None]) & (ids != pad))[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[is_reply]), ids[:, 1:][is_reply])


def _draw_pairs(
    model: Any, tokenizer: Any, prompts: Sequence[str], num_pairs: int, rng: random.Random
) -> tuple[list[dict[str, str | int]], list[int]]:
    """Draw pairs, prompt by prompt, and again from the first prompt when they run out.

    Two replies with equal rewards make no pair. Of two others the judge chooses by Bradley-Terry: sometimes the worse
    one, more often if they are close. Also return the true rewards of all replies, ties included.
    """
    pairs: list[dict[str, str | int]] = []
    rewards: list[int] = []
    prompts_left = cycle(prompts)
    while len(pairs) < num_pairs:
        # About one in six is a tie.
        asked = list(islice(prompts_left, min(400, math.ceil(1.25 * (num_pairs - len(pairs))))))
        replies = sampling.draw_replies(
            model,
            tokenizer(asked * 2)["input_ids"],
            _sampling(rng.getrandbits(32)),
            stops=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id,
            flag=StopFlag(),
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
        scored = [(reviews.true_reward(text), text) for text in texts]
        rewards += [reward for reward, _ in scored]
        for prompt, one, other in zip(asked, scored[: len(asked)], scored[len(asked) :], strict=True):
            if one[0] == other[0]:
                continue
            prefers_one = rng.random() < reviews.preference_probability(one[0], other[0])
            chosen, rejected = (one, other) if prefers_one else (other, one)
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": chosen[1],
                    "rejected": rejected[1],
                    "chosen_reward": chosen[0],
                    "rejected_reward": rejected[0],
                }
            )
    return pairs[:num_pairs], rewards
