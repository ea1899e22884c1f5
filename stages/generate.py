"""Draw replies of a run's policy and of its reference to the same prompts, and write them to the run's folder."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.base.digests import WatchedFiles
from pipeline.base.errors import ConfigError, IdentityError, number_of
from pipeline.base.progress import say
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.config.schema import Config
from pipeline.data.sources import describe, open_source
from pipeline.models.files import files_of_model, in_one_process, load_tokenizer, reference_sources
from pipeline.models.identity import differing_fields, identity_of_reference
from pipeline.models.loading import pick_device
from pipeline.replies.drawing import draw_both
from pipeline.replies.means import estimate_kl, estimate_reward
from pipeline.replies.records import GENERATIONS, Generation, Reply, write_generations
from pipeline.replies.rewarding import load_reward_model
from pipeline.replies.sampling import Prompt, Sampling, choose_prompts, leave_if_asked
from pipeline.run.checkpoints import saved_policy
from pipeline.run.reading import part, read_inputs
from pipeline.run.records import INPUTS
from stages.early import settings_of_run

__all__ = ["run"]


def run(
    run_folder: Path,
    *,
    set_name: str | None,
    num_prompts: int,
    sampling: Sampling,
    reward_model: str | None,
    stop_at: float | None = None,
) -> None:
    """Draw replies to prompts spread evenly over a set, score them, and write them to the run's folder.

    Raises:
        ConfigError: The run, its set or a model can't be used.
        IdentityError: The reference is not the one that the run was trained against, or was changed meanwhile.
        UnfinishedError: The run has saved nothing yet, or a stop was requested.
    """
    flag = watch_signals(stop_at)
    # Collections that free models need not look through what the imports made.
    gc.freeze()
    config = in_one_process(settings_of_run(run_folder))
    step, policy_folder = saved_policy(run_folder)
    reference, adapter = reference_sources(config)
    # Before its identity is taken; after that it is loaded once or twice.
    files = WatchedFiles(files_of_model(reference.folder(), adapter))
    _check_reference(config, run_folder)
    name = set_name or next(iter((*config.data.eval, *config.data.training)))
    source = open_source(config.data, name)
    tokenizer: Any = load_tokenizer(config)
    prompts = choose_prompts(source, tokenizer, config.data.of(name), num_prompts, flag)
    if not prompts:
        raise ConfigError(f"--set: must be a set with pairs, got {name} ({describe(source)}). Choose another set")
    if len(prompts) < num_prompts:
        found = number_of(len(prompts), "prompt")
        say(f"{found}, not {num_prompts}: {name} has no more different ones ({describe(source)})")
    replies = draw_both(config, policy_folder, [prompt.ids for prompt in prompts], sampling, tokenizer, flag)
    files.check()
    if reward_model is not None:
        replies = _rewarded(reward_model, prompts, replies, flag)
    generations = [
        Generation(
            set_name=name,
            row=prompt.row,
            prompt=tokenizer.decode(prompt.ids),
            step=step,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            num_prompts=num_prompts,
            reward_by=reward_model,
            reference=reference,
            policy=policy,
        )
        for prompt, (reference, policy) in zip(prompts, replies, strict=True)
    ]
    write_generations(run_folder, generations)
    _print_result(generations, run_folder, step)


def _check_reference(config: Config, run_folder: Path) -> None:
    """Compare the reference with the one in the run's `inputs.json`, if that exists."""
    if config.reference.sync is not None:
        say("The reference moved in training (reference.sync); these replies use the initial reference")
        return
    if not (run_folder / INPUTS).exists():
        return
    stored, now = part(read_inputs(run_folder), "reference", "identity"), identity_of_reference(config)
    found = [field for field, _, _ in differing_fields(stored, now)]
    if found:
        raise IdentityError(
            f"{run_folder}: the reference of its settings must be the one that it was trained against, got another "
            f"{', '.join(found)}. Restore that reference"
        )


def _rewarded(
    reward_model: str, prompts: Sequence[Prompt], replies: Sequence[tuple[Reply, Reply]], flag: StopFlag
) -> list[tuple[Reply, Reply]]:
    """Give the replies with the reward model's rewards."""
    say(f"Loading the reward model {reward_model} ...")
    reward = load_reward_model(reward_model, pick_device())
    rewarded = []
    for prompt, (reference, policy) in zip(prompts, replies, strict=True):
        leave_if_asked(flag)
        before, after = reward(prompt.content, [reference.text, policy.text])
        rewarded.append((replace(reference, reward=before), replace(policy, reward=after)))
    return rewarded


def _print_result(generations: Sequence[Generation], run_folder: Path, step: int) -> None:
    first = generations[0]
    text = f"{number_of(len(generations), 'prompt')} of {first.set_name}, policy after step {step:,}: "
    text += f"KL from the reference {estimate_kl(generations)} nats"
    if first.temperature != 1:
        text += " (biased: not drawn at temperature 1)"
    before, after = (estimate_reward(generations, side) for side in ("reference", "policy"))
    if after is not None:
        text += f"; mean reward {before} before, {after} after"
    say(text)
    say(f"Replies are in {run_folder / GENERATIONS}; refshard report {run_folder} shows them")
