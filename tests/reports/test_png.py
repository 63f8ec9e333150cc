"""Figures as PNG files."""

import warnings

from reports.charts import Chart, Interval, Intervals
from reports.png import png


def test_a_label_of_any_length_leaves_room_for_the_picture():
    """matplotlib only warns where labels leave no room, and draws them outside."""
    name = "The communication loss evens out what each device receives, as counted on real workers (communication_measured)"
    items = tuple(Interval(name=f"{name} {i}", mean=i, low=i - 1, high=i + 1, tone="none") for i in range(30))
    chart = Chart(name="x", caption="", alternative="", panels=(Intervals(title="", x_label="", items=items),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(chart).startswith(b"\x89PNG")
