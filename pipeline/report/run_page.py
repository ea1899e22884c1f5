"""The page of one run, or of several runs beside each other.

Everything on it comes from the runs' own records. The page computes only means, standard errors and differences.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.statistics import share_positive
from pipeline.config.reader import dump_settings
from pipeline.replies.means import estimate_kl, estimate_reward
from pipeline.report.charts import histogram_chart
from pipeline.report.comparison import Shown, common_folder, differing_settings, runs_table, show_runs
from pipeline.report.curves import curves_of_many, curves_of_one, held_out_sets
from pipeline.report.input_sections import input_sections
from pipeline.report.pages import GRAY, Section, beside, facts, page, preformatted, table
from pipeline.report.reply_sections import frontier_section, replies_section
from pipeline.report.verdict import verdict_of
from pipeline.run.reading import SETTINGS, MarginRows, Run, part

__all__ = ["report_page"]

_HELD_OUT = {"loss": "loss", "accuracy": "rewards/accuracies", "reward margin": "rewards/margins"}
"""Name -> metric of the numbers in the summary"""

_MOST_WORST = 10
_OF_WORST = ("ref_margin", "policy_margin", "chosen_shift", "rejected_shift")
_WORST_HEADER = ["row", "change of the margin", "margin before", "after", "log-prob shift of chosen", "of rejected"]
_MARGINS = ("ref_margin", "policy_margin", "reward_margin")


def report_page(runs: Sequence[Run]) -> str:
    """Make the page of one or more runs."""
    shown = show_runs(runs)
    sections = [
        _summary(shown),
        *frontier_section(shown),
        *(curves_of_one(shown[0]) if shown[0].alone else curves_of_many(shown)),
        *_margins(shown),
        replies_section(shown),
        *input_sections(shown),
        *_settings(shown),
    ]
    where = common_folder(runs)
    title = (
        f"Run {'/'.join(runs[0].folder.absolute().parts[-2:])}"
        if len(runs) == 1
        else f"{len(runs)} runs in {where.name or where}"
    )
    return page(title, sections, subtitle=f"{where}, read on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")


def _summary(shown: Sequence[Shown]) -> Section:
    remarks = [remark if one.alone else f"{one.name}: {remark}" for one in shown for remark in one.run.remarks]
    if len({part(one.run.inputs, "reference").get("fingerprint") for one in shown} - {None}) > 1:
        remarks.append("the runs have different references; each run's KL, shifts and rewards use its own")
    verdicts = verdict_of(shown[0].run) if shown[0].alone else []
    body = Markup("").join(Markup("<p>{}</p>").format(printable(text)) for text in verdicts) + _figures_of_all(shown)
    if remarks:
        listed = Markup("").join(Markup("<li>{}</li>").format(printable(remark)) for remark in remarks)
        body += Markup("<ul>{}</ul>").format(listed)
    return Section(title="Summary", body=body)


def _figures(run: Run, sets: Sequence[str], trained: Sequence[str]) -> dict[str, object]:
    """Give a run's last figures by their names, with those of these held-out and training sets; None if unknown."""
    figures: dict[str, object] = {"state": _state(run), "training loss": run.curve("loss").last}
    for name in trained:
        figures[f"{name}: training accuracy"] = run.curve(f"rewards/accuracies/{name}").last
    for name in sets:
        prefix = run.held_out().get(name)
        for word, metric in _HELD_OUT.items():
            figures[f"{name}: {word}"] = None if prefix is None else run.figure(prefix + metric)
    figures["KL, nats per reply"] = estimate_kl(run.generations) if run.generations else None
    figures["reward of replies before"] = estimate_reward(run.generations, "reference")
    figures["reward of replies"] = estimate_reward(run.generations, "policy")
    return figures | {"folder": run.folder.name}


def _figures_of_all(shown: Sequence[Shown]) -> Markup:
    """Show the runs' figures, and the settings that differ. Figures that no run has are left out."""
    sets = held_out_sets(shown)
    trained = list(dict.fromkeys(name for one in shown for name in part(one.run.settings, "data", "sets")))
    differing = differing_settings([one.run for one in shown])
    rows = [
        {**{key: values[i] for key, values in differing.items()}, **_figures(one.run, sets, trained)}
        for i, one in enumerate(shown)
    ]
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    if shown[0].alone:
        told = {name: rows[0][name] for name in names}
        if loss := shown[0].run.settings.get("loss"):
            types = [loss["type"]] if isinstance(loss["type"], str) else loss["type"]
            told["loss"] = f"{' + '.join(types)}, beta {loss['beta']:g}"
        return facts(told)
    return runs_table(names, [(one, [row[name] for name in names]) for one, row in zip(shown, rows, strict=True)])


def _state(run: Run) -> str:
    if run.finished:
        best = "" if run.policy_step in (None, run.step) else f"; the policy is that of step {run.policy_step:,}"
        return f"finished, {run.step:,} steps{best}"
    if not run.records or run.last_written is None:
        return "nothing logged yet"
    total = "" if run.max_steps is None else f" of {run.max_steps:,}"
    written = f"{datetime.fromtimestamp(run.last_written, UTC):%Y-%m-%d %H:%M} UTC"
    return f"not finished, at step {run.step:,}{total}; last log: {written}"


def _margins(shown: Sequence[Shown]) -> list[Section]:
    names = {name for one in shown for name in one.run.margins}
    if not names:
        return []
    charts, broken = [], []
    rows: list[tuple[Shown, Sequence[object]]] = []
    for name in sorted(names, key=lambda name: (name != "train", name)):
        measured = [(one, one.run.margins[name]) for one in shown if name in one.run.margins]
        charts.append(_margin_chart(name, measured))
        for one, margins in measured:
            rows.append((one, _margin_row(name, margins)))
            pairs = np.stack([margins.columns[column] for column in _MARGINS])
            if count := pairs.shape[1] - int(np.isfinite(pairs).all(axis=0).sum()):
                whose = name if one.alone else f"{name} of {one.name}"
                broken.append(f"{whose}: {count:,} of {pairs.shape[1]:,} are not finite")
    header = ["pairs of", "after step", "pairs", "reference prefers chosen", "policy prefers chosen"]
    header += ["mean margin before, nats", "after, nats", "mean reward margin"]
    note = (
        "A margin is the log-prob of the chosen minus that of the rejected completion: before training (reference) "
        "and after (policy). A tie counts as half. The training pairs are the last that were trained on."
    )
    if broken:
        note += f" Left out of shares, means and charts: {'; '.join(broken)}."
    body = beside(charts) + runs_table(header, rows)
    sections = [Section(title="Margins before and after", body=body, note=note)]
    return sections + (_worst_pairs(shown[0].run) if shown[0].alone else [])


def _worst_pairs(run: Run) -> list[Section]:
    """List the pairs of each set whose margin has fallen most; a file of an earlier version does not say which."""
    body = Markup("")
    for name, margins in sorted(run.margins.items(), key=lambda item: (item[0] != "train", item[0])):
        # A row of several training sets does not say of which one it is.
        if margins.rows is None or (name == "train" and part(run.settings, "data", "sets")):
            continue
        columns = margins.columns
        change = columns["policy_margin"].astype(np.float64) - columns["ref_margin"]
        # A pair of the training set may be among the last ones several times; the last time counts.
        latest = {int(row): i for i, row in enumerate(margins.rows) if change[i] < 0}
        worst = sorted(latest.values(), key=lambda i: change[i])[:_MOST_WORST]
        shown: list[npt.NDArray[Any]] = [change, *(columns[name] for name in _OF_WORST)]
        # As text: a row is typed as it is shown.
        rows = [[str(margins.rows[i]), *(f"{values[i]:+.2f}" for values in shown)] for i in worst]
        if rows:
            body += Markup("<h3>{}</h3>").format(printable(name)) + table(_WORST_HEADER, rows)
    if not body:
        return []
    note = "Pairs whose margin has fallen most, in nats: training moved them toward the rejected completion."
    command = f"refshard explain --config {run.folder / SETTINGS} --policy {run.folder} --set SET --row ROW"
    body += Markup("<p>This command shows one of them, token by token:</p>") + preformatted(command)
    return [Section(title="Pairs that got worst", body=body, note=note)]


def _margin_chart(name: str, measured: Sequence[tuple[Shown, MarginRows]]) -> Markup:
    references = [margins.columns["ref_margin"] for _, margins in measured]
    same = all(np.array_equal(np.sort(references[0]), np.sort(other)) for other in references[1:])
    columns = []
    for i, (one, margins) in enumerate(measured):
        if i == 0 or not same:
            before = "before (reference)" if same else f"before, {one.name}"
            columns.append((before, references[i], GRAY if same else one.color, "dot"))
        after = "after (policy)" if one.alone else one.name
        columns.append((after, margins.columns["policy_margin"], one.color, one.dash))
    title = "Margins of the last training pairs" if name == "train" else f"Margins of held-out pairs: {name}"
    return histogram_chart(title, columns, x_title="margin, nats", of="pairs")


def _margin_row(name: str, margins: MarginRows) -> list[object]:
    finite = [values[np.isfinite(values)] for values in (margins.columns[column] for column in _MARGINS)]
    shares = [share_positive(values) for values in finite[:2]]
    return [
        name,
        margins.step,
        len(margins.columns["ref_margin"]),
        *(None if share is None else f"{share:.1%}" for share in shares),
        *(float(values.mean(dtype=np.float64)) if len(values) else None for values in finite),
    ]


def _settings(shown: Sequence[Shown]) -> list[Section]:
    parts = []
    for one in shown:
        if one.run.settings:
            text = dump_settings(one.run.settings)
            folded = Markup("<details><summary>{}</summary>{}</details>")
            parts.append(folded.format(printable(str(one.run.folder)), preformatted(text)))
        if one.run.attempts and (versions := one.run.attempts[-1].versions):
            listed = ", ".join(f"{name} {version}" for name, version in versions.items())
            parts.append(Markup('<p class="note">{}</p>').format(printable(listed)))
    note = "The settings that the run saved, with all defaults."
    return [Section(title="Settings", body=Markup("").join(parts), note=note)] if parts else []
