"""Pipeline schedules against their published closed forms, and laws that any schedule keeps."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sims.training.schedules import SCHEDULES, bubble, graph, longest_path, orders, stages_of

times = st.floats(0.1, 2.0)


def idle(schedule, positions, microbatches, **seconds):
    """Of each position: the longest path less what the position does."""
    seconds = {**seconds, "BW": seconds["B"] + seconds["W"]}
    seconds.setdefault("FB", seconds["F"] + seconds["BW"])
    ends = longest_path(graph(schedule, positions, microbatches), positions, lambda job: seconds[job.kind])
    return [float(max(ends)) - sum(seconds[job.kind] for job in jobs) for jobs in orders(schedule, positions, microbatches)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(0, 20), times, times, times)
def test_1f1b_idles_for_p_minus_1_forward_and_backward_passes(positions, more, F, B, W):
    found = idle("1f1b", positions, positions + more, F=F, B=B, W=W)
    np.testing.assert_allclose(found, bubble("1f1b", positions, F=F, B=B, W=W), rtol=0, atol=1e-9)
    assert bubble("1f1b", positions, F=F, B=B, W=W) == pytest.approx((positions - 1) * (F + B + W))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(0, 20), times, times, times)
def test_zero_bubble_idles_as_zb_h1(positions, more, F, B, W):
    """DeepSeek's (P - 1)(F + B - 2W) with their B = B + W here; where W > F the last stage's weights come in the way."""
    assume(W <= B)
    found = idle("zero-bubble", positions, positions + more, F=F, B=B, W=W)
    np.testing.assert_allclose(found, bubble("zero-bubble", positions, F=F, B=B, W=W), rtol=0, atol=1e-9)
    if W <= F:
        assert bubble("zero-bubble", positions, F=F, B=B, W=W) == pytest.approx((positions - 1) * (F + (B + W) - 2 * W))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10), times, st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_dualpipe_idles_as_published(half, more, F, share, overlap):
    """(P / 2 - 1)(F&B + B - 3W) of DeepSeek-V3's table 2, for F = B >= W and F&B between F + B and their whole sum.

    Its middle positions, whose first pair does not overlap, have exactly that; with F&B the whole sum, all have.
    """
    positions, W = 2 * half, share * F
    both = 2 * F + overlap * W
    found = idle("dualpipe", positions, 2 * (positions + more), F=F, B=F, W=W, FB=both)
    want = bubble("dualpipe", positions, F=F, B=F, W=W, FB=both)
    assert want == pytest.approx((half - 1) * (both + (F + W) - 3 * W))
    assert found[half] == pytest.approx(want, abs=1e-9)
    assert max(found) == pytest.approx(want, abs=1e-9)
    whole = idle("dualpipe", positions, 2 * (positions + more), F=F, B=F, W=W)
    np.testing.assert_allclose(whole, (half - 1) * (2 * F + W + F - 2 * W), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_microbatch_passes_every_stage_once_each_way(schedule):
    positions, microbatches = 4, 12
    forward, backward, weights = set(), set(), set()
    for position, jobs in enumerate(orders(schedule, positions, microbatches)):
        for job in jobs:
            assert job.stage in stages_of(schedule, positions, position)
            here = (job.direction, job.microbatch, job.stage)
            back = (1 - job.direction, job.back_microbatch, job.back_stage) if job.kind == "FB" else here
            for kind, place, seen in (("F", here, forward), ("B", back, backward), ("W", back, weights)):
                if kind in job.kind or (kind == "W" and job.kind == "FB"):
                    assert place not in seen
                    seen.add(place)
    directions = 2 if schedule == "dualpipe" else 1
    everything = {(d, m, s) for d in range(directions) for m in range(microbatches // directions) for s in range(positions)}
    assert forward == backward == weights == everything


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 4), st.integers(0, 6), st.integers(0, 10**6), st.floats(0, 0.5))
def test_nothing_starts_before_what_it_needs_and_slower_work_never_ends_sooner(schedule, half, more, seed, send):
    positions, random = 2 * half, np.random.default_rng(seed)
    steps = graph(schedule, positions, 2 * (positions + more))
    cost = {(s.position, s.job): random.uniform(0.1, 2.0) for s in steps}
    assert all(max(s.forward_from, s.backward_from) < i for i, s in enumerate(steps))

    def ends(times):
        position = iter([s.position for s in steps])
        return np.array(longest_path(steps, positions, lambda job: times[next(position), job], send))

    slowed = dict(cost)
    slowed[list(cost)[seed % len(cost)]] += 1.0
    assert (ends(slowed) >= ends(cost) - 1e-12).all()


def test_draws_are_independent():
    steps, forward = graph("zero-bubble", 4, 9), np.array([1.0, 2.0, 0.5])
    together = longest_path(steps, 4, lambda job: forward if job.kind == "F" else 0.7)
    for draw, value in enumerate(forward):
        alone = longest_path(steps, 4, lambda job, value=value: value if job.kind == "F" else 0.7)
        assert [float(np.broadcast_to(end, 3)[draw]) for end in together] == [float(end) for end in alone]


@pytest.mark.parametrize(("positions", "microbatches"), [(3, 12), (4, 7), (4, 6)])
def test_dualpipe_says_what_it_needs(positions, microbatches):
    with pytest.raises(ValueError, match=f"not {positions}, {microbatches}"):
        graph("dualpipe", positions, microbatches)
