"""Replies of a run's policy and of its reference to the same prompts, with what both models make of each reply.

    reference draws -> policy draws, scores both -> reference scores both -> reward model

One model is in memory at a time. Where the reference is the policy with its adapter switched off, one is loaded in all.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.base.errors import ConfigError, DataError, IdentityError
from pipeline.base.files import read_json
from pipeline.base.progress import Progress, without_other_bars
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.data.sources import describe, open_set
from pipeline.models.files import in_one_process, load_tokenizer, policy_as_reference, reference_dtype
from pipeline.models.identity import identity_of_reference, kinship
from pipeline.models.loading import load_reference, pick_device
from pipeline.replies.means import estimate_kl, estimate_reward
from pipeline.replies.records import GENERATIONS, Generation, Reply, write_generations
from pipeline.replies.rewarding import load_reward_model
from pipeline.replies.sampling import (
    Prompt,
    Sampling,
    choose_prompts,
    draw_replies,
    leave_if_asked,
    score_replies,
    stop_ids,
)
from pipeline.run.checkpoints import saved_policy
from pipeline.run.reading import SETTINGS
from pipeline.run.records import INPUTS
from pipeline.scoring.memory import peak_memory
from pipeline.scoring.scorer import Scorer

__all__ = [
    "run",
]

T = TypeVar("T")


def run(
    run_folder: Path,
    *,
    num_prompts: int,
    set_name: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    reward_model: str | None,
    stop_at: float | None = None,
) -> None:
    """Draw replies, score them, and write them to the run's folder.

    Args:
        run_folder: Of a run that is finished, or has saved a checkpoint.
        num_prompts: How many prompts, spread evenly over the set.
        set_name: `train`, or a set that data.eval names; the first of those, if None, and `train` where there is none.
        max_tokens: Of a reply.
        temperature: 1 for the models' own distributions, 0 for the likeliest tokens.
        seed: Of the random numbers, which both models share.
        reward_model: Folder or hub name of a sequence classifier that gives rewards.
        stop_at: When to stop, on `time.monotonic`'s clock.

    Raises:
        ConfigError: There is no run, no such set, or a model that can't write or score replies.
        IdentityError: The reference is not that which the run was trained against.
        UnfinishedError: Nothing was saved yet; or asked to stop, and nothing is written.
    """
    flag = watch_signals(stop_at)
    # Models are let go of by collections, which need not look through all that the imports have made.
    gc.freeze()
    config = _settings_of(run_folder)
    step, folder = saved_policy(run_folder)
    _check_reference(config, run_folder)
    name = set_name or next(iter(config.data.eval), "train")
    source = open_set(config.data, name)
    tokenizer: Any = load_tokenizer(config)
    prompts = choose_prompts(source, tokenizer, config, num_prompts, flag)
    if not prompts:
        raise ConfigError(f"--set {name}: no row of {describe(source)} is a pair, so there is no prompt")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    drawn = _draw(config, folder, prompts, sampling, tokenizer, flag)

    texts = {
        who: [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies.ids] for who, replies in drawn.items()
    }
    rewards = _rewards(reward_model, prompts, texts, flag)
    replies = {
        who: [
            Reply(text=text, num_tokens=len(ids), ref_logps=ref, policy_logps=policy, reward=reward)
            for text, ids, ref, policy, reward in zip(
                texts[who], drawn[who].ids, drawn[who].ref_logps, drawn[who].policy_logps, rewards[who], strict=True
            )
        ]
        for who in drawn
    }
    generations = [
        Generation(
            set_name=name,
            row=prompt.row,
            prompt=tokenizer.decode(prompt.ids),
            step=step,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            num_prompts=num_prompts,
            reward_by=reward_model,
            reference=reference,
            policy=policy,
        )
        for prompt, reference, policy in zip(prompts, replies["reference"], replies["policy"], strict=True)
    ]
    write_generations(run_folder, generations)
    _say_result(generations, run_folder, step)


@dataclass(frozen=True)
class _Replies:
    """What one model wrote, a reply a prompt, and both models' logps of it."""

    ids: list[list[int]]
    ref_logps: list[float]
    policy_logps: list[float]


def _settings_of(run_folder: Path) -> Config:
    file = run_folder / SETTINGS
    if not file.exists():
        raise ConfigError(f"{run_folder}: holds no {SETTINGS}, so it is no run's folder; name a train.output_dir")
    config = load_config(file)
    if config.reference.declared is not None:
        raise ConfigError(
            f"{run_folder}: its reference is known by name alone (reference.declared: {config.reference.declared}), "
            "so it can't write or score replies"
        )
    return in_one_process(config)


def _check_reference(config: Config, run_folder: Path) -> None:
    """Make sure that the reference is the one that the run wrote down, where it did."""
    if config.reference.sync is not None:
        click.echo("The reference moved in training (reference.sync); here it is the one that training began with")
        return
    if not (run_folder / INPUTS).exists():
        return
    stored, now = read_json(run_folder / INPUTS)["reference"]["identity"], identity_of_reference(config)
    found = [key for key in sorted({*stored, *now}) if stored.get(key) != now.get(key)]
    if found:
        raise IdentityError(
            f"{run_folder}: the reference that its settings name is not the one that it was trained against; other "
            f"{', '.join(found)}. Restore it"
        )


def _draw(
    config: Config, folder: Path, prompts: Sequence[Prompt], sampling: Sampling, tokenizer: Any, flag: StopFlag
) -> dict[str, _Replies]:
    """Have both models write and score, one of them in memory at a time."""
    trained = policy_as_reference(config, folder)
    work = _Work(
        prompts=[prompt.ids for prompt in prompts],
        sampling=sampling,
        stops=stop_ids(config, tokenizer),
        flag=flag,
        progress=Progress("generate", 2 * len(prompts), "replies"),
    )
    try:
        if kinship(config).adapters_off and reference_dtype(config) == reference_dtype(trained):
            theirs, ours, ref_logps, policy_logps = _with_model(trained, "policy", tokenizer, partial(_do_all, work))
        else:
            theirs = _with_model(config, "reference", tokenizer, work.draw)
            ours, policy_logps = _with_model(trained, "policy", tokenizer, partial(_draw_and_score, work, theirs))
            ref_logps = _with_model(config, "reference", tokenizer, lambda scorer: work.score(scorer, ours, theirs))
    finally:
        work.progress.close()
    return {
        "policy": _Replies(ours, ref_logps[0], policy_logps[0]),
        "reference": _Replies(theirs, ref_logps[1], policy_logps[1]),
    }


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is asked of each model alike."""

    prompts: list[list[int]]
    sampling: Sampling
    stops: list[int]
    flag: StopFlag
    progress: Progress

    def draw(self, scorer: Scorer) -> list[list[int]]:
        """Have a model write a reply to each prompt."""
        return draw_replies(
            scorer.model,
            self.prompts,
            self.sampling,
            stops=self.stops,
            pad_id=scorer.pad_id,
            flag=self.flag,
            count=lambda replies, tokens: self.progress.advance(
                replies, tokens=tokens, memory=peak_memory(pick_device())
            ),
        )

    def score(self, scorer: Scorer, ours: list[list[int]], theirs: list[list[int]]) -> list[list[float]]:
        """Give a model's logps of the policy's and of the reference's replies."""
        leave_if_asked(self.flag)
        return score_replies(scorer, self.prompts, ours, theirs)


def _draw_and_score(work: _Work, theirs: list[list[int]], scorer: Scorer) -> tuple[list[list[int]], list[list[float]]]:
    ours = work.draw(scorer)
    return ours, work.score(scorer, ours, theirs)


def _do_all(
    work: _Work, scorer: Scorer
) -> tuple[list[list[int]], list[list[int]], list[list[float]], list[list[float]]]:
    """Do both models' part with one, whose adapter is switched off for the reference's."""
    with scorer.model.disable_adapter():
        theirs = work.draw(scorer)
    ours, policy_logps = _draw_and_score(work, theirs, scorer)
    with scorer.model.disable_adapter():
        return theirs, ours, work.score(scorer, ours, theirs), policy_logps


def _with_model(config: Config, what: str, tokenizer: Any, work: Callable[[Scorer], T]) -> T:
    """Load the reference that the settings name, have it work, and let go of it."""
    named = config.reference
    click.echo(f"Loading the {what} {named.adapter or named.model or config.policy.model} ...")
    with without_other_bars():
        model: Any = load_reference(config, pick_device())
    if not all(bool(weight.isfinite().all()) for weight in model.parameters() if _is_here(weight)):
        raise DataError(f"the {what}'s weights are not all numbers; if that is the policy, its training has diverged")
    scorer = Scorer.check(model, tokenizer, f"the {what}")
    del model
    try:
        return work(scorer)
    finally:
        scorer.release()


def _is_here(weight: Any) -> bool:
    """Whether a weight is a number that can be looked at: not in few bits, and not kept off the device."""
    return bool(weight.is_floating_point()) and weight.device.type != "meta"


def _rewards(
    reward_model: str | None, prompts: Sequence[Prompt], texts: dict[str, list[str]], flag: StopFlag
) -> dict[str, list[float | None]]:
    if reward_model is None:
        return {who: [None] * len(prompts) for who in texts}
    click.echo(f"Loading the reward model {reward_model} ...")
    reward = load_reward_model(reward_model, pick_device())
    found: dict[str, list[float | None]] = {who: [] for who in texts}
    for i, prompt in enumerate(prompts):
        leave_if_asked(flag)
        for who, value in zip(texts, reward(prompt.content, [texts[who][i] for who in texts]), strict=True):
            found[who].append(value)
    return found


def _say_result(generations: Sequence[Generation], run_folder: Path, step: int) -> None:
    first = generations[0]
    told = f"{len(generations)} prompts of {first.set_name}, policy after step {step:,}: KL from the reference "
    told += f"{estimate_kl(generations)} nats"
    if first.temperature != 1:
        told += " (biased: not drawn at temperature 1)"
    before, after = (estimate_reward(generations, side) for side in ("reference", "policy"))
    if after is not None:
        told += f"; mean reward {before} before, {after} after"
    click.echo(told)
    click.echo(f"Replies are in {run_folder / GENERATIONS}; refshard report {run_folder} shows them")
