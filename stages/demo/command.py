"""Prepare the embedded default and say what training on it did.

`prepare` makes, from fixed seeds and without a network, what a first run needs: a small reference model that writes
reviews, and preference pairs of its own reviews, labelled by a noisy judge who knows the true reward
(`stages.demo.reviews`). `summary` reads the finished run and sets every figure beside what was possible: accuracy
beside its ceiling, reward beside the best reward at the same KL.

The model is small (0.7 M parameters) because what it lacks at first is steps, not size: 625 steps of 16 reviews take
about 20 seconds on two cores and leave about 95% of its reviews grammatical.
"""

import hashlib
import json
import math
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.base.errors import UnfinishedError
from pipeline.base.files import read_json, replace_file
from pipeline.base.folders import open_folder
from pipeline.base.progress import without_other_bars
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger, kept_pairs
from pipeline.data.sources import open_set, read_rows
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import load_tokenizer
from pipeline.replies import records
from pipeline.replies.records import write_generations
from pipeline.replies.sampling import score_replies
from pipeline.run import reading
from pipeline.run.checkpoints import is_recorded
from pipeline.scoring.scorer import Scorer
from pipeline.store.reference_table import load_reference_table
from pipeline.store.store import open_store
from stages.demo import reviews

__all__ = [
    "Reply",
    "Samples",
    "Settings",
    "draw_replies",
    "prepare",
    "summary",
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the prepared folder depends on, beside the code."""

    seed: int = 0
    num_reviews: int = 10_000
    """Generated reviews that the reference is trained on, once each."""
    batch_reviews: int = 16
    hidden_size: int = 128
    num_layers: int = 3
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    num_pairs: int = 4000
    num_heldout_pairs: int = 400
    num_heldout_prompts: int = 400
    """Of the 1,600 prompts; the training pairs use the others. The reference has seen prompts of both."""
    max_tokens: int = 72
    """Longest reply that is drawn. The grammar's own longest are about 50."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply that a model drew at temperature 1."""

    prompt: str
    text: str
    """Without the end-of-text token. Starts with the newline that parts it from the prompt."""
    prompt_ids: list[int]
    ids: list[int]
    """As drawn, end-of-text token included unless the reply was cut off."""
    logps: float
    """Natural log, summed over `ids`, under the model that drew it."""

    @property
    def reward(self) -> int:
        return reviews.true_reward(self.text)


def prepare(folder: Path, *, seed: int = 0) -> None:
    """Build the reference model and the pairs in `folder`, unless they are there.

    Writes `model/` (what `from_pretrained` loads), `train.jsonl`, `heldout.jsonl` and, last, `prepared.json`, which
    vouches for the others: a folder without it, or with that of other settings or other code, is done again.
    On one machine the same seed gives the same bytes.
    """
    settings = Settings(seed=seed)
    marker = folder / "prepared.json"
    digest = _digest(settings)
    if _is_prepared(folder, digest):
        click.echo(f"{folder} is prepared already.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    with _two_threads():
        rng = random.Random(seed)
        corpus = [reviews.sample_review(rng) for _ in range(settings.num_reviews)]
        tokenizer = _train_tokenizer(corpus)
        model = _train_reference(corpus, tokenizer, settings, rng)
        _save_model(model, tokenizer, folder / "model")

        prompts = reviews.all_prompts()
        rng.shuffle(prompts)
        heldout_prompts, train_prompts = (
            prompts[: settings.num_heldout_prompts],
            prompts[settings.num_heldout_prompts :],
        )
        rewards: Counter[int] = Counter()
        for name, asked, num_pairs in (
            ("train.jsonl", train_prompts, settings.num_pairs),
            ("heldout.jsonl", heldout_prompts, settings.num_heldout_pairs),
        ):
            pairs, drawn = _draw_pairs(model, tokenizer, asked, num_pairs, settings, rng)
            rewards.update(drawn)
            replace_file(folder / name, ("".join(json.dumps(pair) + "\n" for pair in pairs)).encode())
            click.echo(f"{num_pairs} pairs of the reference's own reviews, labelled by a noisy judge: {folder / name}")
    prepared = {
        "digest": digest,
        "settings": asdict(settings),
        # Of every reply drawn, ties included: what the best possible policy is computed from.
        "reference_rewards": {str(reward): count for reward, count in sorted(rewards.items())},
    }
    replace_file(marker, (json.dumps(prepared, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Samples:
    """Replies of the policy and of the reference to the same held-out prompts, with the same random numbers."""

    before: list[Reply]
    """Drawn from the reference"""
    after: list[Reply]
    """Drawn from the policy"""
    before_policy_logps: list[float]
    """What the policy gives the reference's replies, nats"""
    after_ref_logps: list[float]
    """What the reference gives the policy's replies, nats"""


def summary(folder: Path, config: Config, *, seed: int = 1) -> dict[str, float]:
    """Print what training did, each figure beside what was possible, and save the figures with the run.

    Held-out accuracy comes from the policy's log-probs and the shards; true reward, grammar and KL from replies that
    both models draw to the held-out prompts, which become the run's generations.

    Args:
        folder: The prepared folder.
        config: The settings of the finished run.
        seed: Of the replies.

    Raises:
        UnfinishedError: The run has not finished.
    """
    run_folder = config.train.folder
    if not is_recorded(run_folder):
        raise UnfinishedError(f"{run_folder}: no finished run there. Run: refshard train with the same settings")
    tokenizer: Any = load_tokenizer(config)
    held_out = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    with _two_threads(), without_other_bars():
        margins = _held_out_margins(config, tokenizer, run_folder)
        samples = _draw_samples(config, tokenizer, run_folder, [row["prompt"] for row in held_out], seed)
    counts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["reference_rewards"]
    figures = _figures(held_out, margins, samples, [int(r) for r, count in counts.items() for _ in range(count)])
    write_generations(run_folder, _generations(config, tokenizer, run_folder, samples, seed))
    replace_file(run_folder / "demo.json", (json.dumps(figures, indent=1) + "\n").encode())
    click.echo(_as_text(figures, samples, config, run_folder))
    return figures


def _held_out_margins(config: Config, tokenizer: Any, run_folder: Path) -> list[float]:
    """Reward margin of each held-out pair, in order: the policy's log-probs against those in the shards."""
    name = next(iter(config.data.eval))
    pairs = list(kept_pairs(read_rows(open_set(config.data, name)), tokenizer, config.data, Ledger()))
    table = load_reference_table(
        [open_store(open_folder(config.precompute.output).child(name))], config.data.max_length
    )
    at, found = table.look_up([pair.key for pair in pairs])
    if (at < 0).any():
        raise AssertionError("held-out pairs that were scored by this run are not in its shards")
    ref_margins = (found["chosen_logps"].astype(float) - found["rejected_logps"]).tolist()
    policy = LlamaForCausalLM.from_pretrained(run_folder, use_safetensors=True)
    sums = _sums(policy, tokenizer, [pair.pair for pair in pairs])
    return [
        config.loss.beta * (chosen - rejected - ref) for ref, (chosen, rejected) in zip(ref_margins, sums, strict=True)
    ]


def _sums(model: Any, tokenizer: Any, pairs: Sequence[TokenizedPair]) -> list[tuple[float, float]]:
    """Logps of each pair's chosen and rejected completion."""
    prompts, chosen, rejected = (
        [getattr(p, f"{side}_ids") for p in pairs] for side in ("prompt", "chosen", "rejected")
    )
    scorer = Scorer.check(model, tokenizer, "policy.model")
    return list(zip(*score_replies(scorer, prompts, chosen, rejected), strict=True))


def _logps(model: Any, tokenizer: Any, replies: Sequence[Reply]) -> list[float]:
    """Logps of replies."""
    twins = [
        TokenizedPair(prompt_ids=reply.prompt_ids, chosen_ids=reply.ids, rejected_ids=reply.ids) for reply in replies
    ]
    return [logps for logps, _ in _sums(model, tokenizer, twins)]


def _draw_samples(config: Config, tokenizer: Any, run_folder: Path, prompts: list[str], seed: int) -> Samples:
    """Draw from both models, one of them in memory at a time."""
    max_tokens = Settings().max_tokens

    def load_reference() -> Any:
        return LlamaForCausalLM.from_pretrained(config.reference.model or config.policy.model, use_safetensors=True)

    before = draw_replies(load_reference(), tokenizer, prompts, seed=seed, max_tokens=max_tokens)
    policy = LlamaForCausalLM.from_pretrained(run_folder, use_safetensors=True)
    after = draw_replies(policy, tokenizer, prompts, seed=seed, max_tokens=max_tokens)
    before_policy_logps = _logps(policy, tokenizer, before)
    del policy
    return Samples(before, after, before_policy_logps, _logps(load_reference(), tokenizer, after))


def _generations(
    config: Config, tokenizer: Any, run_folder: Path, samples: Samples, seed: int
) -> list[records.Generation]:
    """The replies as `refshard generate` has them, with their true rewards."""
    step = int(read_json(run_folder / reading.RECORD)["step"])

    def reply(drawn: Reply, ref_logps: float, policy_logps: float) -> records.Reply:
        return records.Reply(
            text=drawn.text,
            num_tokens=len(drawn.ids),
            ref_logps=ref_logps,
            policy_logps=policy_logps,
            reward=float(drawn.reward),
        )

    return [
        records.Generation(
            set_name=next(iter(config.data.eval)),
            row=row,
            prompt=tokenizer.decode(before.prompt_ids),
            step=step,
            temperature=1.0,
            max_tokens=Settings().max_tokens,
            seed=seed,
            num_prompts=len(samples.before),
            reward_by="true reward of the demo",
            reference=reply(before, before.logps, samples.before_policy_logps[row]),
            policy=reply(after, samples.after_ref_logps[row], after.logps),
        )
        for row, (before, after) in enumerate(zip(samples.before, samples.after, strict=True))
    ]


def _figures(
    held_out: Sequence[dict[str, Any]], margins: Sequence[float], samples: Samples, reference_rewards: list[int]
) -> dict[str, float]:
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in held_out]
    count = len(samples.after)
    kl = math.fsum(reply.logps for reply in samples.after) - math.fsum(samples.after_ref_logps)
    kl /= count
    return {
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "accuracy_ceiling": reviews.accuracy_ceiling((r["chosen_reward"], r["rejected_reward"]) for r in held_out),
        "true_ranking": sum(margin * gap > 0 for margin, gap in zip(margins, gaps, strict=True)) / len(margins),
        "margin": math.fsum(margins) / len(margins),
        "kl": kl,
        "reward_before": sum(reply.reward for reply in samples.before) / count,
        "reward_after": sum(reply.reward for reply in samples.after) / count,
        "reward_optimum": reviews.optimal_at_kl(reference_rewards, max(kl, 0.0)).reward,
        "grammatical_before": sum(reviews.is_grammatical(reply.text) for reply in samples.before) / count,
        "grammatical_after": sum(reviews.is_grammatical(reply.text) for reply in samples.after) / count,
    }


# Which replies are shown: fixed beforehand, so broken ones are shown as they come.
_SHOWN = (0, 37)


def _as_text(figures: dict[str, float], samples: Samples, config: Config, run_folder: Path) -> str:
    f = figures
    lines = [
        "",
        "What DPO did, on prompts it never trained on                 before     after    possible",
        f"  accuracy on the judge's noisy labels                       {0.5:6.3f}    {f['accuracy']:6.3f}"
        f"      {f['accuracy_ceiling']:6.3f}",
        f"  agreement with the true ranking                            {0.5:6.3f}    {f['true_ranking']:6.3f}"
        f"      {1.0:6.3f}",
        f"  reward margin, beta {config.loss.beta:<39g}{0.0:6.2f}    {f['margin']:6.2f}",
        f"  true reward of a sampled review                            {f['reward_before']:6.2f}"
        f"    {f['reward_after']:6.2f}      {f['reward_optimum']:6.2f}  at this KL",
        f"  grammatical reviews                                        {f['grammatical_before']:6.1%}"
        f"    {f['grammatical_after']:6.1%}",
        f"  KL from the reference, nats a review                       {0.0:6.2f}    {f['kl']:6.2f}",
        "",
    ]
    for i in _SHOWN:
        lines.append(samples.before[i].prompt)
        for label, reply in (("before", samples.before[i]), ("after ", samples.after[i])):
            lines.append(f"  {label} ({reply.reward:+d}) {' '.join(reply.text.split())}")
    lines += [
        "",
        f"Shards     {config.precompute.output}    refshard inspect {config.precompute.output}",
        f"Policy     {run_folder}    with its model card in README.md, the settings in refshard.yaml",
        "",
        "Next: the same shards serve any beta, learning rate, or LoRA rank:",
        "  make train ARGS='-o loss.beta=0.1 -o train.output_dir=runs/default/beta-0.1'",
        "Then your own data and model:",
        "  make train CONFIG=run.yaml",
    ]
    return "\n".join(lines)


def _digest(settings: Settings) -> str:
    """Hash the settings and the code that turns them into files, so that an edit of either is noticed."""
    sources = [Path(__file__), Path(reviews.__file__)]
    parts = [json.dumps(asdict(settings), sort_keys=True), *(path.read_text() for path in sources)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _is_prepared(folder: Path, digest: str) -> bool:
    needed = [
        "model/model.safetensors",
        "model/tokenizer.json",
        "train.jsonl",
        "heldout.jsonl",
        "prepared.json",
    ]
    if not all((folder / name).exists() for name in needed):
        return False
    return bool(json.loads((folder / "prepared.json").read_text())["digest"] == digest)


@contextmanager
def _two_threads() -> Iterator[None]:
    """Compute on two threads at most: matrices this small get slower on more, and their rounding would differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_tokenizer(corpus: Sequence[reviews.Review]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of the grammar ends up as one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging ends when every word is one token, at about 760
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


def _train_reference(
    corpus: Sequence[reviews.Review],
    tokenizer: Any,
    settings: Settings,
    rng: random.Random,
) -> Any:
    """Train the reference on the replies of the corpus, one pass, in float32; prompts carry no loss."""
    with torch.random.fork_rng(devices=[]):  # the initial weights come from torch's global generator
        torch.manual_seed(settings.seed)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.hidden_size,
                intermediate_size=3 * settings.hidden_size,
                num_hidden_layers=settings.num_layers,
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
    num_steps = len(rows) // settings.batch_reviews
    num_millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    click.echo(f"Training the reference: {num_millions:.2f} M parameters, {num_steps} steps on generated reviews")

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / settings.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
    )
    model.train()
    for step in range(num_steps):
        picked = order[step * settings.batch_reviews : (step + 1) * settings.batch_reviews]
        loss = _reply_loss(model, [rows[i] for i in picked], [prompt_lengths[i] for i in picked])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 125 == 0 or step == num_steps - 1:
            click.echo(f"  step {step:4d}  loss {loss.item():.3f}")
    return model.eval()


def _reply_loss(model: Any, rows: Sequence[list[int]], prompt_lengths: Sequence[int]) -> Tensor:
    """Average the negative log-likelihood over the reply tokens of a batch."""
    # Rows are padded on the right: under causal attention no real token sees the padding, so no mask is needed.
    width = max(map(len, rows))
    ids = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in rows])
    places = torch.arange(width)
    starts, ends = torch.tensor(prompt_lengths)[:, None], torch.tensor([len(row) for row in rows])[:, None]
    is_reply = ((places >= starts) & (places < ends))[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[is_reply]), ids[:, 1:][is_reply])


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    with without_other_bars():
        model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.chmod(0o755)  # mkdtemp's 0700 would keep a group's other members out
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _draw_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    num_pairs: int,
    settings: Settings,
    rng: random.Random,
) -> tuple[list[dict[str, str | int]], list[int]]:
    """Draw pairs, prompt by prompt and from the first again where they run out.

    Two replies with equal rewards are no pair. Of two others the judge chooses by Bradley-Terry, so the worse one is
    chosen now and then: more often, the closer they are.

    Returns:
        The pairs, and the true rewards of all replies drawn, equal ones included.
    """
    pairs: list[dict[str, str | int]] = []
    rewards: list[int] = []
    prompts_left = cycle(prompts)
    while len(pairs) < num_pairs:
        # About one in six is a tie.
        asked = list(islice(prompts_left, min(400, math.ceil(1.25 * (num_pairs - len(pairs))))))
        replies = draw_replies(model, tokenizer, asked * 2, seed=rng.getrandbits(32), max_tokens=settings.max_tokens)
        rewards += [reply.reward for reply in replies]
        for one, other in zip(replies[: len(asked)], replies[len(asked) :], strict=True):
            if one.reward == other.reward:
                continue
            prefers_one = rng.random() < reviews.preference_probability(one.reward, other.reward)
            chosen, rejected = (one, other) if prefers_one else (other, one)
            pairs.append(
                {
                    "prompt": one.prompt,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "chosen_reward": chosen.reward,
                    "rejected_reward": rejected.reward,
                }
            )
    return pairs[:num_pairs], rewards


@torch.inference_mode()
def draw_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    max_tokens: int,
    batch_replies: int = 400,
) -> list[Reply]:
    """Draw one reply to each prompt at temperature 1, in the prompts' order.

    Two models that are asked the same prompts with the same seed meet the same random numbers at every token, so
    that a difference between their replies is a difference between the models.
    """
    by_length: dict[int, list[int]] = defaultdict(list)  # prompts of one length need no padding
    prompt_ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    for place, ids in enumerate(prompt_ids):
        by_length[len(ids)].append(place)
    replies: dict[int, Reply] = {}
    for places in by_length.values():
        for start in range(0, len(places), batch_replies):
            batch = places[start : start + batch_replies]
            # A generator per batch: one for all would drift apart between two models as soon as their batches
            # take a different number of steps.
            noise = torch.Generator().manual_seed(seed + batch[0])
            drawn = _draw_batch(model, [prompt_ids[place] for place in batch], noise, max_tokens)
            for place, (ids, logps) in zip(batch, drawn, strict=True):
                replies[place] = Reply(
                    prompt=prompts[place],
                    text=tokenizer.decode(ids, skip_special_tokens=True),
                    prompt_ids=prompt_ids[place],
                    ids=ids,
                    logps=logps,
                )
    return [replies[place] for place in range(len(prompts))]


def _draw_batch(
    model: Any, prompt_ids: list[list[int]], noise: torch.Generator, max_tokens: int
) -> list[tuple[list[int], float]]:
    """Draw a reply to each of B prompts of one length; give its ids and the sum of their log-probabilities."""
    eos_id = model.config.eos_token_id
    fed = torch.tensor(prompt_ids)  # (B, prompt length), then (B, 1)
    cache: Any = None
    drawn: list[Tensor] = []
    token_logps: list[Tensor] = []
    ended = torch.zeros(len(prompt_ids), dtype=torch.bool)
    while len(drawn) < max_tokens and not ended.all():
        output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logps = output.logits[:, -1].float().log_softmax(-1)  # (B, vocabulary)
        fed = torch.multinomial(logps.exp(), 1, generator=noise)
        drawn.append(fed)
        token_logps.append(logps.gather(1, fed).double().masked_fill(ended[:, None], 0.0))
        ended |= fed[:, 0] == eos_id
    sums = torch.cat(token_logps, 1).sum(1).tolist()
    replies = []
    for ids, logps_sum in zip(torch.cat(drawn, 1).tolist(), sums, strict=True):
        length = ids.index(eos_id) + 1 if eos_id in ids else len(ids)
        replies.append((ids[:length], logps_sum))
    return replies
