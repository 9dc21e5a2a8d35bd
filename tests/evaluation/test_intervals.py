"""Intervals are as wide as chance."""

import numpy as np
import pytest
from toys import windows

from mdlib.evaluation import intervals
from mdlib.evaluation.evidence import chance_blocks


def test_bootstrap_interval_of_independent_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    low, high = intervals.interval(intervals.block_bootstrap(values, np.arange(400)))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_overlapping_windows_widen_the_interval():
    values = np.random.default_rng(0).normal(size=100).repeat(4)  # blocks of four alike
    width = lambda blocks: np.ptp(intervals.interval(intervals.block_bootstrap(values, blocks)))
    assert width(np.arange(400) // 4) == pytest.approx(2 * width(np.arange(400)), rel=0.2)


def test_intervals_hold_the_truth_where_windows_overlap():
    case, rng, held = windows(100, 0), np.random.default_rng(0), 0
    blocks = chance_blocks(case, gap=4)
    for _ in range(200):  # windows that share three of their four steps with the next: a moving mean of four
        steps = rng.standard_normal((4, 103))
        values = sum(steps[:, i : i + 100] for i in range(4)).ravel()
        low, high = intervals.bootstrapped(values, blocks)["ci95"]
        held += low <= 0 <= high
    assert held >= 0.9 * 200


def test_paired_gain():
    rng = np.random.default_rng(1)
    first = rng.random((3, 300)) < 0.6
    blocks = np.arange(300) // 4
    nothing = intervals.paired_gain(first, first, blocks)
    assert nothing == {"value": 0, "n": 300, "ci95": [0, 0]} and intervals.p_value(first, first, blocks) == 1
    better = first | (rng.random((3, 300)) < 0.3)
    gain = intervals.paired_gain(first, better, blocks)
    assert gain["value"] == pytest.approx(better.mean() - first.mean())
    assert 0 < gain["ci95"][0] < gain["value"] < gain["ci95"][1]
    assert intervals.p_value(first, better, blocks) < 0.01


def test_equivalent_count_is_read_off_the_line_of_real_windows():
    counts = np.array([10, 20, 40])
    rows = np.array([[0.5, 0.4, 0.6, 0.8], [0.3, 0.4, 0.6, 0.8], [0.9, 0.4, 0.6, 0.8], [0.6, 0.4, 0.3, 0.8]])
    assert intervals.equivalent_count(counts, rows) == pytest.approx([10 * 2**0.5, 10, 40, 20 * 2**0.5], rel=1e-6)
