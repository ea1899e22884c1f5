"""Names of near points, ends of axes."""

from itertools import combinations

from pipeline.replies.means import Mean
from pipeline.report.charts import Line, Point, _ends, _label_shifts
from pipeline.report.curves import _span
from pipeline.run.reading import Curve


def test_names_of_near_points_keep_a_line_between_them_and_far_ones_stay_at_their_point() -> None:
    near = [
        Point(name=f"beta={i}", x=Mean(0.1, 0.1, 9), y=Mean(0.5 + i / 1000, 0.1, 9), color="#000000") for i in range(5)
    ]
    points = [*near, Point(name="far", x=Mean(3.0, 0.1, 9), y=Mean(0.5, 0.1, 9), color="#000000")]
    low, high = _ends([point.y for point in points])
    assert low < 0.4 and high > 0.604
    *shifts, far = _label_shifts(points, low, high)
    heights = [(p.y.mean - low) / (high - low) * 380 + shift for p, shift in zip(near, shifts, strict=True)]
    assert all(abs(a - b) >= 16 for a, b in combinations(heights, 2))
    assert far == 12


def test_no_name_lies_on_another_point_or_its_error_bar() -> None:
    def point(kl: float, accuracy: float) -> Point:
        return Point(name="beta", x=Mean(kl, 0.12, 24), y=Mean(accuracy, 0.022, 400), color="#000000")

    points = [point(0.226, 0.725), point(0.227, 0.725), point(0.228, 0.725), point(0.228, 0.7325)]
    low, high = _ends([one.y for one in points])
    heights = [(one.y.mean - low) / (high - low) * 380 for one in points]
    names = [height + shift for height, shift in zip(heights, _label_shifts(points, low, high), strict=True)]
    assert all(abs(name - bar) >= 8 for name in names for bar in heights)


def test_an_axis_of_losses_is_filled_by_the_curves_and_their_level() -> None:
    lines = [Line(name="a", curve=Curve([1, 2, 3], [0.63, None, 0.70]), color="#000000")]
    low, high = _span(lines, (0.6931, "ln 2")) or (0.0, 0.0)
    assert 0.62 < low < 0.63 and 0.70 < high < 0.71
    assert _span([], None) is None
