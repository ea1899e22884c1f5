"""Sections about replies: reward against KL, and the replies of reference and policy to the same prompts."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.replies.means import Mean, estimate, estimate_kl, estimate_reward
from pipeline.replies.records import GENERATIONS, Reply
from pipeline.report.charts import Point, histogram_chart, point_chart
from pipeline.report.comparison import Shown, runs_table
from pipeline.report.curves import held_out_sets
from pipeline.report.pages import COLORS, GRAY, Section, beside, preformatted, swatch
from pipeline.run.reading import Run, part

__all__ = ["frontier_section", "replies_section"]

_SIDES = ("reference", "policy")
_OPEN_PROMPTS, _MOST_PROMPTS = 5, 25
"""Number of prompts that are unfolded, and number of prompts on the page"""

_KL_NOTE = (
    "KL(policy ‖ reference) is estimated from the policy's replies: their mean log-prob under the policy minus that "
    "under the reference. Errors and bars are one standard error, so an estimate near 0 may be negative."
)


def frontier_section(shown: Sequence[Shown]) -> list[Section]:
    """Plot the reward of each run's replies against its KL; without rewards, the runs' accuracies."""
    drawn = [one for one in shown if one.run.generations]
    rewards = [estimate_reward(one.run.generations, "policy") for one in drawn]
    title = "Accuracy against KL" if None in rewards else "Reward against KL"
    if not drawn:
        note = "A KL needs replies of the policies; see Replies before and after."
        return [] if shown[0].alone else [Section(title=title, body=Markup(""), note=note)]
    notes = [_KL_NOTE, *_sampling_cautions(drawn)]
    points = []
    if all(reward is not None for reward in rewards):
        judges = sorted({g.reward_by or "unknown" for one in drawn for g in one.run.generations})
        y_title, judged = "mean reward of replies", f" ({' / '.join(judges)})"
        if len(judges) > 1:
            notes.append("Different judges gave the rewards, so they can't be compared.")
        ys = [reward for reward in rewards if reward is not None]
        before = estimate_reward(drawn[0].run.generations, "reference")
        if before is not None:
            points = [Point(name="reference", x=Mean(0, None, 1), y=before, color=GRAY)]
    elif len(drawn) == 1:
        return []
    else:
        (y_title, ys), judged = _accuracies(drawn), ""
        notes.append(f"Not all runs have rewards of their replies, so the chart shows {y_title}.")
    for one, y in zip(drawn, ys, strict=True):
        name = "policy" if one.alone else one.name
        points.append(Point(name=name, x=estimate_kl(one.run.generations), y=y, color=one.color))
    points = [point for point in points if math.isfinite(point.y.mean)]
    if not points:
        return []
    body = point_chart(
        f"{y_title.capitalize()}{judged} against KL",
        points,
        x_title="KL(policy ‖ reference), nats per reply",
        y_title=y_title,
    )
    body += _how_to_generate([one for one in shown if not one.run.generations])
    return [Section(title=title, body=body, note=" ".join(notes))]


def _accuracies(drawn: Sequence[Shown]) -> tuple[str, list[Mean]]:
    """Give the runs' accuracies, and their name: on a held-out set that all runs share, else on training pairs."""
    common = [name for name in held_out_sets(drawn) if all(name in one.run.held_out() for one in drawn)]
    found = []
    for one in drawn:
        prefix = one.run.held_out()[common[0]] if common else ""
        accuracy = one.run.curve(f"{prefix}rewards/accuracies").last
        pairs = part(one.run.inputs, "sets", common[0]).get("matched") if common else None
        error = math.sqrt(accuracy * (1 - accuracy) / pairs) if accuracy is not None and pairs else None
        found.append(Mean(math.nan if accuracy is None else accuracy, error, pairs or 0))
    return (f"accuracy on held-out pairs ({common[0]})" if common else "accuracy on training pairs, last logged"), found


def _sampling_cautions(drawn: Sequence[Shown]) -> list[str]:
    cautions = []
    for one in drawn:
        temperatures = sorted({g.temperature for g in one.run.generations if g.temperature is not None} - {1.0})
        if temperatures:
            listed = ", ".join(f"{temperature:g}" for temperature in temperatures)
            cautions.append(f"Replies of {one.name} were drawn at temperature {listed}, so their KL is biased.")
    if len({g.max_tokens for one in drawn for g in one.run.generations}) > 1:
        cautions.append("The runs' replies were cut at different lengths, so their KLs can't be compared strictly.")
    return cautions


def _how_to_generate(shown: Sequence[Shown]) -> Markup:
    if not shown:
        return Markup("")
    commands = "\n".join(f"refshard generate {one.run.folder}" for one in shown)
    return Markup("<p>No replies yet. These commands draw them and estimate the KL:</p>") + preformatted(commands)


def replies_section(shown: Sequence[Shown]) -> Section:
    """Show the replies of reference and policy to the first prompts, and means over all of them."""
    title = "Replies before and after"
    drawn = [one for one in shown if one.run.generations]
    if not drawn:
        return Section(title=title, body=_how_to_generate(shown))
    names = [
        "replies of",
        "replies",
        "tokens",
        "log-prob, policy",
        "log-prob, reference",
        "KL, nats per reply",
        "reward",
    ]
    means = [(one, _means(one.run, side)) for one in drawn for side in _SIDES]
    if all(values[-1] is None for _, values in means):
        names, means = names[:-1], [(one, values[:-1]) for one, values in means]
    body = runs_table(names, means)
    if len(drawn) == 1:
        body += _reward_chart(drawn[0].run)
    prompts = list(dict.fromkeys((g.set_name, g.row, g.prompt) for one in drawn for g in one.run.generations))
    replies = [_replies_to(prompt, drawn) for prompt in prompts[:_MOST_PROMPTS]]
    body += Markup("").join(replies[:_OPEN_PROMPTS])
    if len(replies) > _OPEN_PROMPTS:
        body += Markup("<details><summary>{:,} more prompts of {:,}{}</summary>{}</details>").format(
            len(replies) - _OPEN_PROMPTS,
            len(prompts),
            f"; {GENERATIONS} holds all of them" if len(prompts) > len(replies) else "",
            Markup("").join(replies[_OPEN_PROMPTS:]),
        )
    judges = sorted({g.reward_by for one in drawn for g in one.run.generations if g.reward_by})
    note = f"Rewards by {', '.join(judges)}." if judges else "Without a reward model, replies have no rewards."
    return Section(title=title, body=body, note=" ".join([note, _KL_NOTE, *_sampling_cautions(drawn)]))


def _means(run: Run, side: str) -> list[object]:
    replies: list[Reply] = [getattr(generation, side) for generation in run.generations]
    return [
        side,
        len(replies),
        estimate([reply.num_tokens for reply in replies]),
        estimate([reply.policy_logps for reply in replies]),
        estimate([reply.ref_logps for reply in replies]),
        estimate_kl(run.generations) if side == "policy" else None,
        estimate_reward(run.generations, side),
    ]


def _reward_chart(run: Run) -> Markup:
    before, after = (
        np.array([reward for g in run.generations if (reward := getattr(g, side).reward) is not None])
        for side in _SIDES
    )
    if not len(before) + len(after):
        return Markup("")
    columns = [("before (reference)", before, GRAY, "dot"), ("after (policy)", after, COLORS[0], "solid")]
    return beside([histogram_chart("Rewards of replies", columns, x_title="reward", of="replies")])


def _replies_to(prompt: tuple[str, int, str], drawn: Sequence[Shown]) -> Markup:
    """Show the replies to one prompt. A reply of the reference that all runs share is shown once."""
    set_name, row, text = prompt
    found = [(one, g) for one in drawn for g in one.run.generations if (g.set_name, g.row, g.prompt) == prompt]
    same = len({g.reference.text for _, g in found}) == 1
    cards = []
    done = set()
    for one, generation in found:
        if generation.reference.text not in done:
            cards.append(_card("reference" if same else f"reference of {one.name}", GRAY, generation.reference))
            done.add(generation.reference.text)
        cards.append(_card("policy" if one.alone else one.name, one.color, generation.policy))
    return Markup('<section class="prompt"><h3>{}, row {:,}</h3>{}<div class="replies">{}</div></section>').format(
        printable(set_name), row, preformatted(text), Markup("").join(cards)
    )


def _card(name: str, color: str, reply: Reply) -> Markup:
    reward = "" if reply.reward is None else f"reward {reply.reward:.4g}; "
    logps = f"log-prob {reply.policy_logps:.1f} policy, {reply.ref_logps:.1f} reference"
    return Markup('<div><h4>{}</h4>{}<p class="note">{}</p></div>').format(
        swatch(color, name), preformatted(reply.text), f"{reward}{reply.num_tokens:,} tokens; {logps}"
    )
