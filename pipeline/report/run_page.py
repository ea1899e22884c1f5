"""The page of one run, or of several beside each other: curves, margins, replies, data, identity, cost.

Several runs are told apart by what differs in their settings. Nothing is computed that the runs have not written
down, but means, standard errors and differences of it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import yaml
from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.statistics import share_positive
from pipeline.replies.means import estimate, estimate_kl, estimate_reward
from pipeline.report.charts import Point, histogram_chart, point_chart
from pipeline.report.comparison import Shown, common_folder, differing_settings, flatten, show_runs
from pipeline.report.curves import curves_of_many, curves_of_one, held_out_sets
from pipeline.report.pages import COLORS, Section, beside, facts, page, table
from pipeline.run.reading import MarginRows, Run, part

__all__ = [
    "report_page",
]

_GRAY = COLORS[-1]


_Described = TypeVar("_Described")


def report_page(runs: Sequence[Run], *, title: str = "") -> str:
    """Make the page of one or more runs; the title is theirs if left out."""
    shown = show_runs(runs)
    sections = [
        _summary(shown),
        *_frontier(shown),
        *(curves_of_one(shown[0]) if len(shown) == 1 else curves_of_many(shown)),
        *_margins(shown),
        _generations(shown),
        *_data(shown),
        *_identity(shown),
        *_cost(shown),
        *_settings(shown),
    ]
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    where = common_folder(runs)
    if not title:
        title = f"Run {runs[0].folder.name}" if len(runs) == 1 else f"{len(runs)} runs in {where.name or where}"
    return page(title, sections, subtitle=f"{where}, as it was on {made}")


# Summary ------------------------------------------------------------------------------------------------------------


def _summary(shown: Sequence[Shown]) -> Section:
    remarks = [f"{one.name}: {remark}" if len(shown) > 1 else remark for one in shown for remark in one.run.remarks]
    if len({_fingerprint(one.run) for one in shown} - {None}) > 1:
        remarks.append("the runs have different references: KL, shifts and rewards are each against its own")
    listed = Markup("").join(Markup("<li>{}</li>").format(printable(remark)) for remark in remarks)
    body = _summary_of_one(shown[0].run) if len(shown) == 1 else _summary_of_many(shown)
    if remarks:
        body += Markup("<ul>{}</ul>").format(listed)
    return Section(title="Summary", body=body)


def _summary_of_one(run: Run) -> Markup:
    lines: dict[str, object] = {"state": _state(run)}
    if (loss := _loss_text(run)) is not None:
        lines["loss"] = loss
    last = run.curve("loss").last
    if last is not None:
        lines["training loss, last logged"] = f"{last:.4g}"
    for name, prefix in run.held_out().items():
        numbers = [
            f"{word} {value:.4g}"
            for word, metric in _HELD_OUT_NUMBERS.items()
            if (value := run.curve(prefix + metric).last) is not None
        ]
        lines[f"held-out pairs, {name}"] = f"{', '.join(numbers)} (step {run.curve(f'{prefix}loss').steps[-1]:,})"
    if run.generations:
        lines["KL(policy ‖ reference)"] = f"{estimate_kl(run.generations)} nats per reply"
        before, after = (estimate_reward(run.generations, side) for side in ("reference", "policy"))
        if before is not None and after is not None:
            lines["reward of replies"] = f"{before} before, {after} after"
    return facts(lines)


_HELD_OUT_NUMBERS = {"loss": "loss", "accuracy": "rewards/accuracies", "reward margin": "rewards/margins"}


def _summary_of_many(shown: Sequence[Shown]) -> Markup:
    differing = differing_settings([one.run for one in shown])
    columns: dict[str, list[object]] = {"run": [_swatch(one) for one in shown]}
    columns |= {key: list(values) for key, values in differing.items()}
    columns["training loss"] = [one.run.curve("loss").last for one in shown]
    for name in held_out_sets(shown):
        prefixes = [one.run.held_out().get(name) for one in shown]
        for word, metric in _HELD_OUT_NUMBERS.items():
            columns[f"{name}: {word}"] = [
                None if prefix is None else one.run.curve(prefix + metric).last
                for one, prefix in zip(shown, prefixes, strict=True)
            ]
    columns["KL, nats per reply"] = [estimate_kl(one.run.generations) if one.run.generations else None for one in shown]
    columns["reward of replies"] = [estimate_reward(one.run.generations, "policy") for one in shown]
    columns["state"] = [_state(one.run) for one in shown]
    columns["folder"] = [one.run.folder.name for one in shown]
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _state(run: Run) -> str:
    of = "" if run.max_steps is None else f" of {run.max_steps:,}"
    if run.finished:
        return f"finished, {run.step:,} steps"
    if not run.records:
        return "nothing logged yet"
    written = "" if run.last_written is None else f"; last line of the log: {_time(run.last_written)}"
    return f"not finished, at step {run.step:,}{of}{written}"


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _loss_text(run: Run) -> str | None:
    loss = run.settings.get("loss")
    if not loss:
        return None
    types = loss["type"] if isinstance(loss["type"], list) else [loss["type"]]
    return f"{' + '.join(types)}, beta {loss['beta']:g}"


def _swatch(one: Shown) -> Markup:
    return Markup('<span class="run"><span class="swatch" style="background:{}"></span>{}</span>').format(
        one.color, printable(one.name)
    )


# Reward against KL --------------------------------------------------------------------------------------------------


_KL_NOTE = (
    "KL(policy ‖ reference) is estimated from the policy's own replies: the mean of their log-prob under the policy "
    "less that under the reference. Errors and bars are one standard error."
)


def _frontier(shown: Sequence[Shown]) -> list[Section]:
    drawn = [one for one in shown if one.run.generations]
    title = "Reward against KL"
    if not drawn:
        if len(shown) == 1:
            return []
        return [
            Section(title=title, body=Markup(""), note="There is no KL without replies of the policies: see below.")
        ]
    rewards = [estimate_reward(one.run.generations, "policy") for one in drawn]
    notes = [_KL_NOTE, *_sampling_remarks(drawn)]
    points = []
    if all(reward is not None for reward in rewards):
        judges = {g.reward_by or "unknown" for one in drawn for g in one.run.generations}
        y_title, judged = "mean reward of replies", f" ({' / '.join(sorted(judges))})"
        if len(judges) > 1:
            notes.append("The rewards are not all by the same judge, and are not to be compared.")
        ys = [(reward.mean, reward.error) for reward in rewards if reward is not None]
        before = estimate_reward(drawn[0].run.generations, "reference")
        if before is not None:
            points = [Point(name="reference", x=0, y=before.mean, x_error=None, y_error=before.error, color=_GRAY)]
    elif len(drawn) == 1:
        return []
    else:
        (y_title, ys), judged = _accuracies(drawn), ""
        notes.append(f"Not all runs have rewards of their replies, so {y_title} stands for them.")
    for one, (y, y_error) in zip(drawn, ys, strict=True):
        kl = estimate_kl(one.run.generations)
        name = one.name if len(shown) > 1 else "policy"
        points.append(Point(name=name, x=kl.mean, y=y, x_error=kl.error, y_error=y_error, color=one.color))
    points = [point for point in points if math.isfinite(point.y)]
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


def _accuracies(drawn: Sequence[Shown]) -> tuple[str, list[tuple[float, float | None]]]:
    """Accuracy of each run with its standard error, held-out where all have one set in common; and what it is."""
    common = [name for name in held_out_sets(drawn) if all(name in one.run.held_out() for one in drawn)]
    found: list[tuple[float, float | None]] = []
    for one in drawn:
        prefix = one.run.held_out()[common[0]] if common else ""
        accuracy = one.run.curve(f"{prefix}rewards/accuracies").last
        pairs = part(one.run.inputs, "sets", common[0]).get("matched") if common else None
        known = accuracy is not None and isinstance(pairs, int) and pairs > 1
        error = math.sqrt(accuracy * (1 - accuracy) / pairs) if known and accuracy is not None and pairs else None
        found.append((math.nan if accuracy is None else accuracy, error))
    return (f"accuracy on held-out pairs ({common[0]})" if common else "accuracy on training pairs, last logged"), found


def _sampling_remarks(drawn: Sequence[Shown]) -> list[str]:
    remarks = []
    for one in drawn:
        temperatures = {g.temperature for g in one.run.generations if g.temperature not in (None, 1.0)}
        if temperatures:
            listed = ", ".join(f"{t:g}" for t in sorted(t for t in temperatures if t is not None))
            remarks.append(
                f"Replies of {one.name} were drawn at temperature {listed}, not 1, so theirs is not the KL of the "
                "policy itself."
            )
    lengths = {g.max_tokens for one in drawn for g in one.run.generations}
    if len(lengths) > 1:
        remarks.append("The runs' replies were cut at different lengths and are not strictly comparable.")
    return remarks


def _how_to_generate(shown: Sequence[Shown]) -> Markup:
    if not shown:
        return Markup("")
    commands = "\n".join(f"refshard generate {one.run.folder}" for one in shown)
    return Markup("<p>No replies have been drawn yet. To have them, with their KL:</p><pre>{}</pre>").format(
        _lines(commands)
    )


# Margins ------------------------------------------------------------------------------------------------------------


def _margins(shown: Sequence[Shown]) -> list[Section]:
    sets = list(dict.fromkeys(name for one in shown for name in one.run.margins))
    if not sets:
        return []
    charts = []
    rows: list[list[object]] = []
    broken: list[str] = []
    for name in sorted(sets, key=lambda name: name == "train"):
        measured = [(one, one.run.margins[name]) for one in shown if name in one.run.margins]
        charts.append(_margin_chart(name, measured, len(shown)))
        rows += [_margin_row(name, one, margins, len(shown)) for one, margins in measured]
        for one, margins in measured:
            pairs = np.stack([margins.columns[column] for column in _MARGINS])
            if count := pairs.shape[1] - int(np.isfinite(pairs).all(axis=0).sum()):
                whose = f"{name} of {one.name}" if len(shown) > 1 else name
                broken.append(f"{whose}: {count:,} of {pairs.shape[1]:,} are not numbers")
    header = ["pairs of", *(["run"] if len(shown) > 1 else []), "after step", "pairs", "reference prefers chosen"]
    header += ["policy prefers chosen", "mean margin before, nats", "after, nats", "mean reward margin"]
    note = (
        "Margin: log-prob of the chosen less that of the rejected completion, before (reference) and after (policy). "
        "A tie counts as half. Of the training pairs the last ones that were trained on."
    )
    if broken:
        note += f" Left out of shares, means and charts: {'; '.join(broken)}."
    return [Section(title="Margins before and after", body=beside(charts) + table(header, rows), note=note)]


def _margin_chart(name: str, measured: Sequence[tuple[Shown, MarginRows]], num_runs: int) -> Markup:
    references = [margins.columns["ref_margin"] for _, margins in measured]
    same = all(np.array_equal(np.sort(references[0]), np.sort(other)) for other in references[1:])
    columns = []
    for i, (one, margins) in enumerate(measured):
        if i == 0 or not same:
            before = "before (reference)" if same else f"before, {one.name}"
            columns.append((before, references[i], _GRAY if same else one.color, "dot"))
        after = "after (policy)" if num_runs == 1 else one.name
        columns.append((after, margins.columns["policy_margin"], one.color, one.dash))
    title = "Margins of the last training pairs" if name == "train" else f"Margins of held-out pairs: {name}"
    return histogram_chart(title, columns, x_title="margin, nats", of="pairs")


def _margin_row(name: str, one: Shown, margins: MarginRows, num_runs: int) -> list[object]:
    finite = [values[np.isfinite(values)] for values in (margins.columns[column] for column in _MARGINS)]
    shares = [share_positive(values) for values in finite[:2]]
    return [
        name,
        *([_swatch(one)] if num_runs > 1 else []),
        margins.step,
        len(margins.columns["ref_margin"]),
        *(None if share is None else f"{share:.1%}" for share in shares),
        *(float(values.mean(dtype=np.float64)) if len(values) else None for values in finite),
    ]


_MARGINS = ("ref_margin", "policy_margin", "reward_margin")


# Generations --------------------------------------------------------------------------------------------------------


_OPEN_PROMPTS, _MOST_PROMPTS = 5, 25
"""Of the first prompts so many are open to the eye, and so many on the page at all."""


_MOST_CHARACTERS = 8000


def _generations(shown: Sequence[Shown]) -> Section:
    title = "Replies before and after"
    drawn = [one for one in shown if one.run.generations]
    if not drawn:
        return Section(title=title, body=_how_to_generate(shown))
    rows = [_reply_row(one, side, len(shown)) for one in drawn for side in ("reference", "policy")]
    header = [*(["run"] if len(shown) > 1 else []), "replies of", "replies", "tokens", "reward"]
    header += ["log-prob, policy", "log-prob, reference", "KL, nats per reply"]
    prompts = list(dict.fromkeys((g.set_name, g.row, g.prompt) for one in drawn for g in one.run.generations))
    body = table(header, rows)
    if len(drawn) == 1:
        body += _reward_chart(drawn[0].run)
    replies = [_replies_to(prompt, drawn, len(shown)) for prompt in prompts[:_MOST_PROMPTS]]
    body += Markup("").join(replies[:_OPEN_PROMPTS])
    if len(replies) > _OPEN_PROMPTS:
        body += Markup("<details><summary>{:,} more prompts of {:,}{}</summary>{}</details>").format(
            len(replies) - _OPEN_PROMPTS,
            len(prompts),
            "; generations.jsonl has them all" if len(prompts) > len(replies) else "",
            Markup("").join(replies[_OPEN_PROMPTS:]),
        )
    judges = sorted({g.reward_by for one in drawn for g in one.run.generations if g.reward_by})
    note = f"Rewards by {', '.join(judges)}. " if judges else "No reward model has judged them. "
    note += " ".join([_KL_NOTE, *_sampling_remarks(drawn)])
    return Section(title=title, body=body, note=note)


def _reply_row(one: Shown, side: str, num_runs: int) -> list[object]:
    generations = one.run.generations
    replies = [g.reference if side == "reference" else g.policy for g in generations]
    return [
        *([_swatch(one)] if num_runs > 1 else []),
        side,
        len(replies),
        estimate([reply.num_tokens for reply in replies]),
        estimate_reward(generations, side),
        estimate([reply.policy_logps for reply in replies]),
        estimate([reply.ref_logps for reply in replies]),
        estimate_kl(generations) if side == "policy" else None,
    ]


def _reward_chart(run: Run) -> Markup:
    sides = {"before (reference)": "reference", "after (policy)": "policy"}
    columns = []
    for (name, side), (color, dash) in zip(sides.items(), ((_GRAY, "dot"), (COLORS[0], "solid")), strict=True):
        rewards = [reply.reward for g in run.generations if (reply := getattr(g, side)).reward is not None]
        columns.append((name, np.array(rewards, dtype=np.float64), color, dash))
    if not any(len(values) for _, values, _, _ in columns):
        return Markup("")
    return beside([histogram_chart("Rewards of replies", columns, x_title="reward", of="replies")])


def _replies_to(prompt: tuple[str, int, str], drawn: Sequence[Shown], num_runs: int) -> Markup:
    """Show what the models reply to a prompt: the reference once, if all runs have the same reply of it."""
    set_name, row, text = prompt
    found = [(one, g) for one in drawn for g in one.run.generations if (g.set_name, g.row, g.prompt) == prompt]
    cards = []
    told = set()
    for one, generation in found:
        if generation.reference.text not in told:
            before = "reference" if len({g.reference.text for _, g in found}) == 1 else f"reference of {one.name}"
            cards.append(_card(before, _GRAY, generation.reference))
            told.add(generation.reference.text)
        cards.append(_card("policy" if num_runs == 1 else one.name, one.color, generation.policy))
    return Markup(
        '<section class="prompt"><h3>{}, row {:,}</h3><pre>{}</pre><div class="replies">{}</div></section>'
    ).format(printable(set_name), row, _lines(text), Markup("").join(cards))


def _card(name: str, color: str, reply: Any) -> Markup:
    reward = "" if reply.reward is None else f"reward {reply.reward:.4g}; "
    logps = f"log-prob {reply.policy_logps:.1f} policy, {reply.ref_logps:.1f} reference"
    numbers = f"{reward}{reply.num_tokens:,} tokens; {logps}"
    return Markup(
        '<div><h4><span class="swatch" style="background:{}"></span>{}</h4><pre>{}</pre><p class="note">{}</p></div>'
    ).format(color, printable(name), _lines(reply.text), numbers)


def _lines(text: str) -> str:
    """Text of several lines, made harmless line by line, cut where it is very long."""
    cut = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ... ({len(text):,} characters)"
    return "\n".join(map(printable, cut.split("\n")))


# Data, identity, cost -----------------------------------------------------------------------------------------------


def _data(shown: Sequence[Shown]) -> list[Section]:
    tables = _by_equal(shown, _data_rows)
    if not tables:
        return []
    header = ["set", "source", "rows", "kept", "dropped", "noted", "joined", "missing"]
    header += ["prompt tokens", "chosen tokens", "rejected tokens", "noise floor, nats a token"]
    body = Markup("").join(
        (Markup("<h3>{}</h3>").format(printable(name)) if name else Markup("")) + table(header, rows)
        for name, rows in tables
    )
    note = "What became of the rows when the run last started. Joined: pairs that found their reference log-probs."
    if any(part(one.run.settings, "reference", "sync") for one in shown):
        note += " Where the reference moves, those of the last window."
    return [Section(title="Data", body=body, note=note)]


def _data_rows(run: Run) -> list[list[object]]:
    rows: list[list[object]] = []
    moves = bool(part(run.settings, "reference", "sync"))
    for name, given in part(run.inputs, "sets").items():
        if not isinstance(given, Mapping):
            continue
        ledger, tokens, noise = (part(given, key) for key in ("ledger", "tokens", "noise"))
        measured = noise.get("tokens")
        rows.append(
            [
                name,
                str(given.get("dataset", "")),
                ledger.get("rows"),
                ledger.get("kept"),
                _counts(ledger.get("dropped")),
                _counts(ledger.get("noted")),
                # A window of held-out sets alone has joined no pairs to train on.
                None if moves and "store" not in given else given.get("matched"),
                # Of a window all others are missing, as they should.
                None if moves else given.get("missing"),
                *(tokens.get(side) for side in ("prompt", "chosen", "rejected")),
                f"{noise['mean']:.2g}, {noise['largest']:.2g} at most" if measured else "not measured",
            ]
        )
    return rows


def _counts(counts: object) -> str:
    if not isinstance(counts, Mapping) or not counts:
        return "none"
    return ", ".join(f"{count:,} {str(reason).replace('_', ' ')}" for reason, count in counts.items())


def _identity(shown: Sequence[Shown]) -> list[Section]:
    groups = _by_equal(shown, lambda run: _identity_facts(run.inputs))
    if not groups:
        return []
    body = Markup("").join(
        (Markup("<h3>{}</h3>").format(printable(name)) if name else Markup("")) + facts(found) for name, found in groups
    )
    return [Section(title="Reference and policy", body=body, note="Digests are SHA-256 of content, as in the shards.")]


def _identity_facts(inputs: Mapping[str, Any]) -> dict[str, object]:
    reference, policy = part(inputs, "reference"), part(inputs, "policy")
    if not reference and not policy:
        return {}
    step = _moved_after(inputs)
    moved = f" as moved after step {step:,}" if step else ""
    found: dict[str, object] = {"reference": reference.get("name")}
    found[f"fingerprint{moved}"] = reference.get("fingerprint")
    found |= {f"reference{moved}, {key}": value for key, value in flatten(part(reference, "identity")).items()}
    found |= {"policy started from": policy.get("model"), "policy, adapter": policy.get("adapter") or "none"}
    total, trained = policy.get("parameters"), policy.get("trained_parameters")
    if isinstance(total, int) and isinstance(trained, int):
        share = f" ({trained / total:.2%})" if total and trained < total else ""
        found["policy, parameters"] = f"{total:,}, of which {trained:,}{share} are trained"
    found["policy, dtype"] = policy.get("dtype")
    return {name: value for name, value in found.items() if value is not None}


def _moved_after(inputs: Mapping[str, Any]) -> int | None:
    """Give the step after which the reference had moved to where it scored these sets; None where it had not."""
    folders = [str(given.get("store")) for given in part(inputs, "sets").values() if isinstance(given, Mapping)]
    steps = [int(found[1]) for folder in folders if (found := re.search(r"/references/step-(\d+)/", folder))]
    return max(steps, default=None)


def _fingerprint(run: Run) -> object:
    return part(run.inputs, "reference").get("fingerprint")


def _by_equal(shown: Sequence[Shown], describe: Callable[[Run], _Described]) -> list[tuple[str, _Described]]:
    """Describe runs; those that are described the same, together, under their names. No names where all are one."""
    groups: list[tuple[list[str], _Described]] = []
    for one in shown:
        described = describe(one.run)
        if not described:
            continue
        names = next((names for names, other in groups if other == described), None)
        if names is None:
            groups.append(([one.name], described))
        else:
            names.append(one.name)
    if len(groups) == 1 and len(groups[0][0]) == len(shown):
        return [("", groups[0][1])]
    return [("; ".join(names), described) for names, described in groups]


def _cost(shown: Sequence[Shown]) -> list[Section]:
    header = ["stage one", "workers", "pairs", "tokens", "time of all workers", "tokens/s of a worker"]
    header += ["peak memory of a worker", "device"]
    body = Markup("")
    for name, rows in _by_equal(shown, _stage_one_rows):
        body += (Markup("<h3>{}</h3>").format(printable(name)) if name else Markup("")) + table(header, rows)
    header = [*(["run"] if len(shown) > 1 else []), "stage two", "processes", "steps", "done twice", "tokens"]
    header += ["time", "peak memory", "device"]
    rows = [_stage_two_row(one, len(shown)) for one in shown if one.run.attempts]
    body += table(header, rows) if rows else Markup("")
    note = (
        "Stage one is shared by all runs on its shards. Time is that of scoring and training, evaluations included, "
        "without loading; memory is the GPU's where there is one, else that of the process, the first one of several. "
        "Tokens of a pair: prompt and chosen, prompt and rejected."
    )
    return [Section(title="Cost", body=body, note=note)] if body else []


def _stage_one_rows(run: Run) -> list[list[object]]:
    costs = run.inputs.get("stage_one")
    sums: dict[str, list[Mapping[str, Any]]] = {}
    for cost in costs if isinstance(costs, list) else []:
        if isinstance(cost, Mapping):
            sums.setdefault(str(cost.get("set")), []).append(cost)
    rows = [_stage_one_row(name, parts) for name, parts in sorted(sums.items())]
    if len(rows) > 1:
        rows.append(_stage_one_row("all", [cost for parts in sums.values() for cost in parts]))
    return rows


def _stage_one_row(name: str, costs: Sequence[Mapping[str, Any]]) -> list[object]:
    pairs, tokens, seconds = (math.fsum(cost.get(key) or 0 for cost in costs) for key in ("pairs", "tokens", "seconds"))
    return [
        name,
        len({cost.get("worker") for cost in costs}),
        int(pairs),
        int(tokens),
        _duration(seconds),
        int(tokens / seconds) if seconds else None,
        _memory(max((cost.get("memory_bytes") or 0 for cost in costs), default=0)),
        ", ".join(sorted({str(cost.get("device")) for cost in costs})),
    ]


def _stage_two_row(one: Shown, num_runs: int) -> list[object]:
    attempts = one.run.attempts
    tokens = one.run.curve("num_tokens").last
    again = sum(max(before.last_step - after.step, 0) for before, after in pairwise(attempts))
    return [
        *([_swatch(one)] if num_runs > 1 else []),
        f"{len(attempts):,} {'attempt' if len(attempts) == 1 else 'attempts'}",
        attempts[-1].processes,
        one.run.step,
        again,
        None if tokens is None else int(tokens),
        _duration(math.fsum(attempt.seconds for attempt in attempts)),
        _memory(max(attempt.memory_bytes or 0 for attempt in attempts)),
        ", ".join(dict.fromkeys(attempt.device for attempt in attempts if attempt.device)),
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _memory(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size else "not measured"


def _settings(shown: Sequence[Shown]) -> list[Section]:
    parts = []
    for one in shown:
        if one.run.settings:
            text = yaml.safe_dump(dict(one.run.settings), sort_keys=False, allow_unicode=True)
            parts.append(
                Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(
                    printable(str(one.run.folder)), _lines(text)
                )
            )
        if one.run.attempts and (versions := one.run.attempts[-1].versions):
            listed = ", ".join(f"{name} {version}" for name, version in versions.items())
            parts.append(Markup('<p class="note">{}</p>').format(printable(listed)))
    if not parts:
        return []
    return [Section(title="Settings", body=Markup("").join(parts), note="As the run saved them, defaults filled in.")]
