"""Numbers against closed forms, brute force and other libraries; intervals are as wide as chance."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.metrics import roc_curve
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.fid import FrechetInceptionDistance
from toys import windows

from mdlib.data.windows import WindowSet
from mdlib.evaluation import metrics
from mdlib.evaluation.evidence import bootstrap_blocks


def test_psnr_knows_the_range():
    images, other = torch.rand(4, 1, 8, 8) * 2 - 1, torch.rand(4, 1, 8, 8) * 2 - 1
    reference = PeakSignalNoiseRatio(data_range=1.0)  # of intensities in [0, 1]
    for one, two, value in zip(images, other, metrics.psnr(images, other), strict=True):
        assert float(value) == pytest.approx(float(reference((one + 1) / 2, (two + 1) / 2)), rel=1e-5)
    assert float(metrics.psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2))) == pytest.approx(20.0, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_agrees_with_torchmetrics(channels):
    images = torch.rand(3, channels, 32, 40) * 2 - 1
    noisy = (images + torch.tensor([0.0, 0.1, 0.5]).view(3, 1, 1, 1) * torch.randn_like(images)).clamp(-1, 1)
    value = metrics.ssim(noisy, images)
    expected = structural_similarity_index_measure(noisy, images, data_range=2.0, reduction="none")
    torch.testing.assert_close(value.float(), expected, atol=1e-4, rtol=0)
    assert value[0] == pytest.approx(1) and value[2] < 0.9


def test_codebook_figures_are_counted():
    tokens = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 2]], [[3, 3], [3, 3]]])
    counts = metrics.code_counts(tokens, torch.tensor([0, 0, 1]), num_codes=6, num_users=2)
    assert counts.tolist() == [[5, 2, 1, 0, 0, 0], [0, 0, 0, 4, 0, 0]]
    found = metrics.codebook_metrics(counts, torch.tensor([2, 1]))
    share = np.array([5, 2, 1, 4]) / 12
    assert found["usage"] == pytest.approx(4 / 6)
    assert found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert found["codes_per_user"] == 2.0
    assert found["distinctive_codes_per_user"] == 2.0 and found["distinctive_codes_least"] == 1.0
    with_absent = torch.cat([counts, torch.zeros(1, 6, dtype=torch.long)])
    assert metrics.codebook_metrics(with_absent, torch.tensor([2, 1, 0])) == found, "a user without windows"


def test_codes_that_all_use_alike_or_hardly_are_not_distinctive():
    counts = torch.full((3, 10), 40)
    assert metrics.codebook_metrics(counts, torch.full((3,), 20))["distinctive_codes_per_user"] == 0
    rare = counts.clone()
    rare[0, 0], rare[1, 0], rare[2, 0] = 4, 0, 0  # 4 times in 20 windows: less than once in four
    assert metrics.codebook_metrics(rare, torch.full((3,), 20))["distinctive_codes_per_user"] == 0


def test_control_ratio_is_one_for_chance():
    labels = torch.arange(4).repeat(5)
    assert metrics.control_ratio(torch.full((20, 4), 0.25), labels) == pytest.approx(1)
    sure = torch.nn.functional.one_hot(labels, 4) * 0.7 + 0.1 * (1 - torch.nn.functional.one_hot(labels, 4))
    assert metrics.control_ratio(sure, labels) == pytest.approx(7)


def correlated(n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.double)
    return torch.randn(n, width, generator=generator, dtype=torch.double) @ mix + seed


def test_frechet_distance_is_the_formula_with_a_matrix_root():
    first, second = correlated(200, 12, 0), correlated(150, 12, 1)
    cov, other = np.cov(first.T.numpy()), np.cov(second.T.numpy())
    root = scipy.linalg.sqrtm(cov @ other).real
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + np.trace(cov + other - 2 * root)
    assert metrics.frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_torchmetrics():
    first, second = correlated(90, 6, 0), correlated(80, 6, 1)
    reference = FrechetInceptionDistance(feature=nn.Flatten(), input_img_size=(1, 2, 3))
    reference.set_dtype(torch.double)
    for part, real in ((first, True), (second, False)):
        reference.update(part.view(-1, 1, 2, 3), real=real)
    assert metrics.frechet_distance(first, second) == pytest.approx(float(reference.compute()), rel=1e-4)


def test_frechet_distance_between_shifted_copies_is_the_shift():
    white = torch.linalg.qr(torch.randn(60, 8, dtype=torch.double)).Q
    white = white - white.mean(0)
    shift = torch.arange(8.0)
    assert metrics.frechet_distance(white, white + shift) == pytest.approx(float(shift.square().sum()))
    # Σ and 9Σ: the roots differ by a factor of three, tr(Σ + 9Σ − 2·3Σ) = 4 tr Σ.
    assert metrics.frechet_distance(white, 3 * white) == pytest.approx(4 * float(white.var(0).sum()))


def test_frechet_distance_of_fewer_samples_than_features():
    few = correlated(40, 1024, 0).float()
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-6 * float(few.var(0).sum()))
    flat = torch.zeros(50, 1024)
    # Against a point, nothing but the mean and the own variance is left.
    expected = float(few.double().mean(0).square().sum() + few.double().var(0).sum())
    assert metrics.frechet_distance(few, flat) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_the_unbiased_mmd_of_cubic_kernels():
    torch.manual_seed(0)
    first, second = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64) + 1
    kernel = lambda x, y: (float(x @ y) / 4 + 1) ** 3
    own = [
        sum(kernel(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j) for part in (first, second)
    ]
    both = sum(kernel(a, b) for a in first for b in second)
    assert metrics.kernel_distance(first, second) == pytest.approx(sum(own) / 30 - 2 * both / 36)
    draws = [metrics.kernel_distance(torch.randn(50, 4), torch.randn(50, 4)) for _ in range(40)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 40**0.5 + 0.02, "no bias for sets of one distribution"


def test_manifold_figures_are_what_the_papers_count():
    torch.manual_seed(0)
    real, made, k = torch.randn(12, 3), torch.randn(9, 3) * 1.5, 3
    radius = lambda part, row: sorted(float((row - other).norm()) for other in part)[k]
    inside = lambda part, row, point: float((row - point).norm()) < radius(part, row)
    found = metrics.manifold_metrics(real, made, k)
    assert found["precision"] == pytest.approx(np.mean([any(inside(real, row, m) for row in real) for m in made]))
    assert found["recall"] == pytest.approx(np.mean([any(inside(made, row, r) for row in made) for r in real]))
    assert found["density"] == pytest.approx(sum(inside(real, row, m) for row in real for m in made) / (k * len(made)))
    assert found["coverage"] == pytest.approx(np.mean([any(inside(real, row, m) for m in made) for row in real]))
    assert set(metrics.manifold_metrics(real, made + 100, k).values()) == {0.0}
    collapsed = metrics.manifold_metrics(real, real[:1] + 0.01 * torch.randn(9, 3), k)
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.3 and collapsed["coverage"] < 1


def test_inception_score_lies_between_one_and_the_number_of_users():
    assert metrics.inception_score(torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    assert metrics.inception_score(torch.full((7, 5), 0.2)) == pytest.approx(1)
    assert metrics.inception_score(torch.eye(5)[:1].repeat(9, 1)) == pytest.approx(1), "everybody the same user"
    rows = torch.rand(8, 3).softmax(1).double()
    each = (rows * (rows / rows.mean(0)).log()).sum(1)
    assert metrics.inception_score(rows) == pytest.approx(float(each.mean().exp()))


def error_rate(scores, genuine, weights=None):
    return metrics.equal_error_rate(*roc_curve(genuine, scores, sample_weight=weights, drop_intermediate=False)[:2])


def test_equal_error_rate_of_two_normal_distributions():
    rng, n = np.random.default_rng(0), 20_000
    scores = np.concatenate([rng.normal(2, 1, n), rng.normal(0, 1, n)])
    genuine = np.arange(2 * n) < n
    assert error_rate(scores, genuine) == pytest.approx(scipy.stats.norm.cdf(-1), abs=0.005)
    assert error_rate(-scores, genuine) == pytest.approx(scipy.stats.norm.cdf(1), abs=0.005)


def test_equal_error_rate_of_few_scores():
    genuine = np.array([True, True, False, False])
    assert error_rate(np.array([0.9, 0.8, 0.2, 0.1]), genuine) == 0
    assert error_rate(np.array([0.9, 0.2, 0.8, 0.1]), genuine) == pytest.approx(0.5)
    assert error_rate(np.full(4, 0.3), genuine) == pytest.approx(0.5), "one score for all is chance"
    assert error_rate(np.array([0.1, 0.2, 0.8, 0.9]), genuine) == 1
    scores, weights = np.array([0.9, 0.4, 0.8, 0.3, 0.2]), np.array([1, 3, 2, 1, 2])
    genuine = np.array([True, True, False, False, False])
    repeated = error_rate(scores.repeat(weights), genuine.repeat(weights))
    assert error_rate(scores, genuine, weights) == pytest.approx(repeated)


def some(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), 1, 32, 32), dtype=torch.uint8, generator=generator)
    return WindowSet(images, torch.tensor(labels), (1, 2, 3), tuple(range(len(labels))), "jet", "data")


def test_a_copy_is_found_also_when_it_is_shifted_but_never_among_another_users():
    train = some([0, 0, 0, 1], seed=0)
    queries = some([0, 0, 1], seed=1)
    queries.images[0] = train.images[2]
    queries.images[1] = train.images[1].roll(5, dims=-1)
    queries.images[2] = train.images[0]
    distance, row = metrics.nearest_train(queries, train)
    assert distance[:2].max() < 1e-3 and row[:2].tolist() == [2, 1]
    shifted = torch.stack([train.float(3).roll(shift, dims=-1) for shift in range(32)])
    expected = (queries.float(2) - shifted).square().mean((1, 2, 3)).sqrt().min()
    torch.testing.assert_close(distance[2], expected)
    assert row[2] == 3


def test_bootstrap_interval_of_independent_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrapped(values, np.arange(400))["ci95"]
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_overlapping_windows_widen_the_interval():
    values = np.random.default_rng(0).normal(size=100).repeat(4)  # blocks of four alike
    width = lambda blocks: np.ptp(metrics.bootstrapped(values, blocks)["ci95"])
    assert width(np.arange(400) // 4) == pytest.approx(2 * width(np.arange(400)), rel=0.2)


def test_intervals_hold_the_truth_where_windows_overlap():
    case, rng, held = windows(100, 0), np.random.default_rng(0), 0
    blocks = bootstrap_blocks(case, gap=4)
    for _ in range(200):  # windows that share three of their four steps with the next: a moving mean of four
        steps = rng.standard_normal((4, 103))
        values = sum(steps[:, i : i + 100] for i in range(4)).ravel()
        low, high = metrics.bootstrapped(values, blocks)["ci95"]
        held += low <= 0 <= high
    assert held >= 0.9 * 200


def test_paired_gain():
    rng = np.random.default_rng(1)
    first = rng.random((3, 300)) < 0.6
    blocks = np.arange(300) // 4
    nothing = metrics.paired_gain(first, first, blocks)
    assert nothing == {"value": 0, "n": 300, "ci95": [0, 0]} and metrics.p_value(first, first, blocks) == 1
    better = first | (rng.random((3, 300)) < 0.3)
    gain = metrics.paired_gain(first, better, blocks)
    assert gain["value"] == pytest.approx(better.mean() - first.mean())
    assert 0 < gain["ci95"][0] < gain["value"] < gain["ci95"][1]
    assert metrics.p_value(first, better, blocks) < 0.01


def test_equivalent_count_is_read_off_the_line_of_real_windows():
    counts = np.array([10, 20, 40])
    rows = np.array([[0.5, 0.4, 0.6, 0.8], [0.3, 0.4, 0.6, 0.8], [0.9, 0.4, 0.6, 0.8], [0.6, 0.4, 0.3, 0.8]])
    assert metrics.equivalent_count(counts, rows) == pytest.approx([10 * 2**0.5, 10, 40, 20 * 2**0.5], rel=1e-6)


def test_intervals_over_few_users_hold_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = metrics.over_users(rng.standard_normal(4))["ci95"]
        held += low < 0 < high
    assert 0.92 < held / 400 < 0.98
    assert "ci95" not in metrics.over_users(np.ones(2))
