"""The benchmark of the simulators: that it measures what it says, and that its page shows targets that were missed."""

import itertools
from dataclasses import replace

from sims import AllToAll, TrainingStep
from tests.bench.page import render
from tests.bench.sims import CURVE, GRID, bare_events, measure_collective, measure_events


def test_the_grid_is_200_points_that_can_be_routed_and_the_curve_reaches_4096():
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    assert len([replace(AllToAll(n_routed_experts=256), **point) for point in points]) == 200
    assert CURVE[-1] == 4096
    assert all(TrainingStep(nodes=gpus // 8, batch_size=9 * gpus).gpus == gpus for gpus in CURVE if gpus >= 128)


def test_events_are_those_of_every_phase_of_every_microbatch():
    """16 stages, 144 microbatches of 8 pipelines: more than a dozen phases per layer and microbatch over 60 layers, each an event."""
    found = measure_events(1, quick=True)
    assert 60 * 144 * 10 < found["events"] < 60 * 144 * 20
    assert found["events_per_second"] > 0 < found["bare_events_per_second"]
    assert bare_events(3, 30) > 0


def test_the_page_says_where_a_target_is_missed():
    sims = {
        "events": {"events": 10, "events_per_second": 5.0, "bare_events_per_second": 10.0, "share": 0.5},
        "collective": measure_collective(1) | {"seconds": 0.5},
        "step": {"seconds": 1.0, "seconds_events": 11.0, "events": 10},
        "sweep": {"points": 200, "seconds": 30.0},
        "curve": [
            {"gpus": 8, "all_to_all_seconds": 0.1},
            {"gpus": 128, "all_to_all_seconds": 0.1, "step_seconds": 1, "step_events": 2, "step_phases": 3},
        ],
        "devices": [{"gpus": 8, "seconds": 0.1, "events_seconds": 0.1}],
    }
    page = render({"date": "2026-01-01", "command": "make bench", "machine": {}, "core": 1, "sims": sims})
    assert "500.0 ms (**target 20 ms**)" in page
    assert "11.0 s (**target 10 s**)" in page
    assert "30.0 s (target 120 s)" in page
    assert "0.50 of it" in page
    assert "| 128 | 100 | 1.00 | 2 | 3 |" in page
