"""Curves over the steps: related metrics of one run in one chart, or one metric of several runs in one chart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.charts import Line, line_chart, style_of
from pipeline.report.comparison import Shown, differing_settings
from pipeline.report.pages import COLORS, Section, beside, table
from pipeline.run.reading import Run, part

__all__ = ["curves_of_many", "curves_of_one", "held_out_sets"]

_DASHES_OF_SETS = ("dash", "dot", "dashdot")
_MOST_MARKS = 60


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One chart of a run."""

    title: str
    unit: str
    series: Mapping[str, str]
    """Name of a curve -> its metric; a single curve has no name"""
    held_out: bool = True
    bounds: tuple[float, float] | None = None
    level: tuple[float, str] | None = None
    smoothed: bool = True
    from_zero: bool = True
    """The axis shows 0; otherwise the curves and the level fill it"""


_Drawn = tuple[str, _Panel, Sequence[Line]]
"""Title, panel and curves of one chart"""


_PANELS = (
    _Panel(
        title="Accuracy: share of pairs with a margin above 0",
        unit="share of pairs",
        series={"": "rewards/accuracies"},
        bounds=(0, 1.02),
        level=(0.5, "chance"),
    ),
    _Panel(title="Reward margin", unit="reward, beta × nats", series={"": "rewards/margins"}),
    _Panel(
        title="Rewards: beta times the log-prob shift",
        unit="reward, beta × nats",
        series={"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
    ),
    _Panel(
        title="Log-prob shift: policy minus reference",
        unit="nats per completion",
        series={"chosen": "logps/chosen_shift", "rejected": "logps/rejected_shift"},
    ),
    _Panel(title="Entropy of the policy", unit="nats per token", series={"": "entropy"}, from_zero=False),
    _Panel(title="Gradient norm", unit="norm, before clipping", series={"": "grad_norm"}, held_out=False),
    _Panel(title="Learning rate", unit="learning rate", series={"": "learning_rate"}, held_out=False, smoothed=False),
)

_NOTE = (
    "Each point is a mean over the pairs since the previous log. A curve of 80 points or more is pale, with a running "
    "mean drawn over it."
)


def _panels(shown: Sequence[Shown]) -> list[_Panel]:
    plain = all((one.run.settings.get("loss") or {}).get("type") in ("sigmoid", ["sigmoid"]) for one in shown)
    level = (math.log(2), "ln 2: policy = reference") if plain else None
    return [_Panel(title="Loss", unit="loss", series={"": "loss"}, level=level, from_zero=False), *_PANELS]


def curves_of_one(one: Shown) -> list[Section]:
    """Draw each metric of a run, with training and held-out pairs in one chart."""
    run = one.run
    held_out = run.held_out()
    marks = _moves_of_reference(run)
    charts: list[_Drawn] = []
    for panel in _panels([one]):
        lines = []
        for i, (series, metric) in enumerate(panel.series.items()):
            line = Line(name=series or "training", curve=run.curve(metric), color=COLORS[i], smoothed=panel.smoothed)
            lines.append(line)
            for j, (name, prefix) in enumerate(held_out.items() if panel.held_out else ()):
                # A single metric has a color for each set; two metrics have a dash for each set.
                color = COLORS[i] if series else style_of(j + 1)[0]
                dash = _DASHES_OF_SETS[j % len(_DASHES_OF_SETS)]
                label = f"{series}, {name}" if series else name
                lines.append(Line(name=label, curve=run.curve(prefix + metric), color=color, dash=dash))
            for name in part(run.settings, "data", "sets"):
                curve = run.curve(f"{metric}/{name}")
                if curve.steps:
                    color = style_of(len(lines))[0]
                    lines.append(Line(name=f"training, {name}", curve=curve, color=color, smoothed=panel.smoothed))
        charts.append((panel.title, panel, lines))
    notes = [_NOTE]
    if held_out:
        notes.append(f"Held-out pairs: {', '.join(held_out)}.")
    if marks:
        notes.append("At each dotted vertical line the reference moved; rewards after it use the new reference.")
    return _section("Curves", charts, notes, marks)


def _moves_of_reference(run: Run) -> list[int]:
    steps = part(run.settings, "reference", "sync").get("steps")
    if not isinstance(steps, int) or run.step // steps > _MOST_MARKS:
        return []
    return list(range(steps, run.step, steps))


def curves_of_many(shown: Sequence[Shown]) -> list[Section]:
    """Draw each metric of the training pairs, and of each held-out set, with a curve for each run."""
    cautions = _cautions(shown)
    panels = _panels(shown)
    sections = _section("Training pairs", [c for panel in panels for c in _overlaid(shown, panel)], [_NOTE, *cautions])
    for name in held_out_sets(shown):
        charts = [c for panel in panels if panel.held_out for c in _overlaid(shown, panel, name)]
        sections += _section(f"Held-out pairs: {name}", charts, cautions)
    return sections


def _overlaid(shown: Sequence[Shown], panel: _Panel, set_name: str | None = None) -> list[_Drawn]:
    """Give a chart for each metric of a panel, with a curve for each run: on training pairs, or on a held-out set."""
    charts: list[_Drawn] = []
    for series, metric in panel.series.items():
        lines = []
        for one in shown:
            prefix = "" if set_name is None else one.run.held_out().get(set_name)
            if prefix is not None:
                curve, smoothed = one.run.curve(prefix + metric), panel.smoothed and set_name is None
                lines.append(Line(name=one.name, curve=curve, color=one.color, dash=one.dash, smoothed=smoothed))
        title = f"{panel.title}, {series}" if series else panel.title
        title = title if set_name is None else f"{title} ({set_name})"
        charts.append((title, panel, lines))
    return charts


def _cautions(shown: Sequence[Shown]) -> list[str]:
    differing = differing_settings([one.run for one in shown])
    cautions = []
    if "loss.beta" in differing:
        cautions.append("Rewards and margins scale with loss.beta, which differs: compare accuracy and shifts.")
    if any(key.startswith("loss.") for key in differing):
        cautions.append("Losses of different settings have different scales.")
    return cautions


def _section(title: str, charts: Sequence[_Drawn], notes: Sequence[str], marks: Sequence[int] = ()) -> list[Section]:
    """Draw charts in which a line has two points or more; put the other numbers into a table."""
    drawn, single = [], []
    for name, panel, lines in charts:
        if any(len(line.curve.steps) > 1 for line in lines):
            bounds = panel.bounds if panel.from_zero else _span(lines, panel.level)
            drawn.append(line_chart(name, lines, y_title=panel.unit, bounds=bounds, level=panel.level, marks=marks))
        else:
            single += [[name, line.name, line.curve.steps[0], line.curve.last] for line in lines if line.curve.steps]
    body = beside(drawn) if drawn else Markup("")
    if single:
        body += table(["measured once", "curve", "after step", "value"], single)
    return [Section(title=title, body=body, note=" ".join(notes))] if body else []


def _span(lines: Sequence[Line], level: tuple[float, str] | None) -> tuple[float, float] | None:
    """Give the ends of an axis that the curves and the level fill; None without a value."""
    values = [value for line in lines for value in line.curve.values if value is not None]
    if not values:
        return None
    values += [] if level is None else [level[0]]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def held_out_sets(shown: Sequence[Shown]) -> list[str]:
    """Give the names of the held-out sets of all runs."""
    return list(dict.fromkeys(name for one in shown for name in one.run.held_out()))
