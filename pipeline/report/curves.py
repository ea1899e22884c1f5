"""Curves over the steps: of one run all that belongs together in one chart, of several each metric with all runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.charts import Line, line_chart, style_of
from pipeline.report.comparison import Shown, differing_settings
from pipeline.report.pages import COLORS, Section, beside, table
from pipeline.run.reading import Run, part

__all__ = [
    "curves_of_many",
    "curves_of_one",
    "held_out_sets",
]

_LN_2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One chart of a run."""

    title: str
    unit: str
    series: Mapping[str, str]
    """Metrics by name; no name where there is one only."""
    held_out: bool = True
    bounds: tuple[float, float] | None = None
    level: tuple[float, str] | None = None
    smoothed: bool = True


@dataclass(frozen=True, kw_only=True)
class _Curves:
    """What is drawn in one chart, or written down where there is no curve yet."""

    title: str
    panel: _Panel
    lines: Sequence[Line]
    marks: Sequence[int] = ()


_PANELS = (
    _Panel(
        title="Accuracy: share of pairs with a margin above 0",
        unit="share of pairs",
        series={"": "rewards/accuracies"},
        bounds=(0, 1.02),
        level=(0.5, "chance"),
    ),
    _Panel(title="Reward margin", unit="chosen less rejected reward", series={"": "rewards/margins"}),
    _Panel(
        title="Rewards: beta times the log-prob shift",
        unit="reward, beta × nats",
        series={"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
    ),
    _Panel(
        title="Log-prob shift: policy less reference",
        unit="nats per completion",
        series={"chosen": "logps/chosen_shift", "rejected": "logps/rejected_shift"},
    ),
    _Panel(title="Entropy of the policy", unit="nats per token", series={"": "entropy"}),
    _Panel(title="Gradient norm", unit="norm, before clipping", series={"": "grad_norm"}, held_out=False),
    _Panel(title="Learning rate", unit="learning rate", series={"": "learning_rate"}, held_out=False, smoothed=False),
)


_CURVES_NOTE = (
    "Each point is a mean over the pairs since the last log. Of 80 points or more the curve as logged is pale, and the "
    "mean of neighbouring points strong."
)


def _panels(shown: Sequence[Shown]) -> list[_Panel]:
    plain = all((one.run.settings.get("loss") or {}).get("type") in ("sigmoid", ["sigmoid"]) for one in shown)
    level = (_LN_2, "ln 2: policy = reference") if plain else None
    return [_Panel(title="Loss", unit="loss", series={"": "loss"}, level=level), *_PANELS]


def curves_of_one(one: Shown) -> list[Section]:
    """Draw a run's metrics, training and held-out pairs in one chart."""
    run = one.run
    held_out = run.held_out()
    charts = []
    marks = _moves_of_reference(run)
    for panel in _panels([one]):
        lines = []
        for i, (series, metric) in enumerate(panel.series.items()):
            lines.append(_line(run, metric, series or "training", COLORS[i], "solid", panel.smoothed))
            for j, (name, prefix) in enumerate(held_out.items() if panel.held_out else ()):
                # A metric of one curve has a color for each set, one of two curves a dash for each set.
                color = COLORS[i] if series else style_of(j + 1)[0]
                dash = _DASHES_OF_SETS[j % len(_DASHES_OF_SETS)]
                shown_as = f"{series}, {name}" if series else name
                lines.append(_line(run, prefix + metric, shown_as, color, dash, smoothed=False))
        charts.append(_Curves(title=panel.title, panel=panel, lines=lines, marks=marks))
    notes = [_CURVES_NOTE]
    if held_out:
        notes.append(f"Held-out pairs: {', '.join(held_out)}.")
    if marks:
        notes.append("Dotted upright lines: the reference moved, and rewards are against the new one from there on.")
    return _section("Curves", charts, notes)


_DASHES_OF_SETS = ("dash", "dot", "dashdot")


def _moves_of_reference(run: Run) -> list[int]:
    sync = part(run.settings, "reference", "sync")
    steps = sync.get("steps")
    if not isinstance(steps, int) or run.step // steps > 60:
        return []
    return list(range(steps, run.step, steps))


def curves_of_many(shown: Sequence[Shown]) -> list[Section]:
    """Draw each metric of the training pairs, and of each held-out set, with a curve for each run."""
    notes = [_CURVES_NOTE, *_cautions(shown)]
    panels = _panels(shown)
    sections = _section("Training pairs", [c for panel in panels for c in _overlaid(shown, panel, None)], notes)
    for name in held_out_sets(shown):
        charts = [c for panel in panels if panel.held_out for c in _overlaid(shown, panel, name)]
        sections += _section(f"Held-out pairs: {name}", charts, _cautions(shown))
    return sections


def _overlaid(shown: Sequence[Shown], panel: _Panel, set_name: str | None) -> list[_Curves]:
    """Give a chart for each of a panel's metrics, with a curve for each run: of training, or of a held-out set."""
    charts = []
    for series, metric in panel.series.items():
        lines = []
        for one in shown:
            prefix = "" if set_name is None else one.run.held_out().get(set_name)
            if prefix is not None:
                smoothed = panel.smoothed and set_name is None
                lines.append(_line(one.run, prefix + metric, one.name, one.color, one.dash, smoothed))
        title = f"{panel.title}, {series}" if series else panel.title
        title = title if set_name is None else f"{title} ({set_name})"
        charts.append(_Curves(title=title, panel=panel, lines=lines))
    return charts


def _cautions(shown: Sequence[Shown]) -> list[str]:
    differing = differing_settings([one.run for one in shown])
    cautions = []
    if "loss.beta" in differing:
        cautions.append(
            "Rewards and margins are in units of beta, which differs: compare accuracy and log-prob shifts instead."
        )
    if any(key.startswith("loss.") for key in differing):
        cautions.append("Losses of different settings have different scales.")
    return cautions


def _line(run: Run, metric: str, name: str, color: str, dash: str, smoothed: bool) -> Line:
    curve = run.curve(metric)
    return Line(name=name, x=curve.steps, y=curve.values, color=color, dash=dash, smoothed=smoothed)


def _section(title: str, charts: Sequence[_Curves], notes: Sequence[str]) -> list[Section]:
    """Draw what has two points or more; numbers that stand alone are in a table."""
    drawn = [one for one in charts if any(len(line.x) > 1 for line in one.lines)]
    alone = [
        [one.title, line.name, int(line.x[0]), line.y[0]]
        for one in charts
        if one not in drawn
        for line in one.lines
        if line.x
    ]
    body = Markup("")
    if drawn:
        body += beside([_chart(one) for one in drawn])
    if alone:
        body += table(["measured once", "of", "after step", "value"], alone)
    return [Section(title=title, body=body, note=" ".join(notes))] if body else []


def _chart(one: _Curves) -> Markup:
    panel = one.panel
    return line_chart(one.title, one.lines, y_title=panel.unit, bounds=panel.bounds, level=panel.level, marks=one.marks)


def held_out_sets(shown: Sequence[Shown]) -> list[str]:
    """Name the held-out sets, of all runs."""
    return list(dict.fromkeys(name for one in shown for name in one.run.held_out()))
