"""The classifier for few labels: against scikit-learn, against counting, and on features that say nothing."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from hjepa.evaluation.few_labels import Accuracy, cross_validate, fit, stratified
from hjepa.evaluation.ridge import Ridge


def blobs(count: int, classes: int, width: int, distance: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` rows of each class around centres that lie `distance` standard deviations from the middle."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(classes, width, generator=generator), dim=1) * distance
    labels = torch.arange(classes).repeat(count)
    return centres[labels] + torch.randn(len(labels), width, generator=generator), labels


@pytest.mark.parametrize("width", [5, 60])
def test_leave_one_out_in_closed_form_is_that_by_leaving_out(width: int) -> None:
    rows, labels = blobs(5, 3, width, 1.0)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    ridge = Ridge(rows, labels, 3)
    z = (rows.double() - ridge.mean) * ridge.scale
    for l2, (weights, scores) in zip((0.1, 3.0), ridge.leave_one_out(rows, labels, (0.1, 3.0)), strict=True):
        (expected,) = ridge.weights([l2])
        torch.testing.assert_close(weights, expected)
        for row in range(len(rows)):
            others = torch.arange(len(rows)) != row
            # The penalty does not shrink with the row that is left out, and frequencies are those of all.
            left = SklearnRidge(l2 * len(rows)).fit(z[others], targets[others])
            expected = left.predict(z[row : row + 1])[0] - targets[others].mean(0).numpy() + ridge.prior.numpy()
            np.testing.assert_allclose(scores[row], expected, atol=1e-8)


@pytest.mark.parametrize("distance", [1.5, 3.0])
def test_cross_validation_says_what_new_images_will_say(distance: float) -> None:
    estimates, truths, sure = [], [], []
    for seed in range(6):
        rows, labels = blobs(100, 4, 20, distance, seed)
        few = slice(0, 40)
        accuracy = cross_validate({"x": rows[few]}, labels[few], 4)[0]["x"]
        probabilities = fit(rows[few], labels[few], 4).probabilities(rows[40:])
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(360, dtype=torch.float64))
        truths.append(100 * (probabilities.argmax(dim=1) == labels[40:]).double().mean().item())
        sure.append(100 * probabilities.amax(dim=1).mean().item())
        estimates.append(accuracy.mean)
    assert np.mean(truths) > 45
    assert np.mean(estimates) == pytest.approx(np.mean(truths), abs=8)
    assert np.mean(sure) == pytest.approx(np.mean(truths), abs=10)


def test_features_that_say_nothing_are_worth_chance_and_no_less() -> None:
    means, sure = [], []
    for seed in range(8):
        rows, labels = blobs(8, 5, 30, 0.0, seed)
        accuracy = cross_validate({"x": rows}, labels, 5)[0]["x"]
        means.append(accuracy.mean)
        sure.append(accuracy.confidence)
    assert 12 < np.mean(means) < 28  # 20 by chance
    assert np.mean(sure) < 40


def test_folds_leave_out_each_row_once_and_as_much_of_every_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [4, 8, 12, 1])
    tested = labels != 3
    for repeat in range(3):
        folds = stratified(labels, tested, 0, repeat)
        assert set(folds[tested]) == {0, 1, 2, 3}
        assert (folds[~tested] == -1).all()
        for label, each in ((0, 1), (1, 2), (2, 3)):
            assert np.bincount(folds[labels == label]).tolist() == [each] * 4
    assert (stratified(labels, tested, 0, 0) != stratified(labels, tested, 0, 1)).any()
    pairs = np.repeat([0, 1], 2)
    assert all(len(set(stratified(pairs, pairs >= 0, 0, r)[pairs == c])) == 2 for r in range(5) for c in (0, 1))


def test_no_row_is_judged_by_a_classifier_that_saw_it() -> None:
    # Noise in as many dimensions as can remember every label.
    rows, labels = torch.randn(20, 200, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2
    assert (fit(rows, labels, 2).probabilities(rows).argmax(dim=1) == labels).double().mean() > 0.9
    accuracies, said = cross_validate({"x": rows}, labels, 2)
    assert accuracies["x"].mean < 80
    assert said["x"].shape == (20, 2)


def test_a_class_of_one_image_is_known_but_not_tested() -> None:
    rows, labels = blobs(6, 2, 10, 4.0)
    rows, labels = torch.cat([rows, torch.full((1, 10), 9.0)]), torch.cat([labels, torch.tensor([2])])
    accuracies, said = cross_validate({"x": rows}, labels, 3)
    assert accuracies["x"].images == 12
    assert said["x"][:12].isfinite().all()
    assert said["x"][12].isnan().all()
    assert fit(rows, labels, 3).probabilities(rows[12:]).argmax() == 2


def test_few_labels_without_an_error_do_not_make_it_certain() -> None:
    rows, labels = blobs(3, 2, 10, 20.0)
    sure = fit(rows, labels, 2).probabilities(rows).amax(dim=1)
    assert 0.7 < sure.mean() < 0.97


def test_the_interval_is_wilsons() -> None:
    # scipy.stats.binomtest(17, 20).proportion_ci(method="wilson")
    low, high = Accuracy(85.0, None, 80.0, 20).interval
    assert (low, high) == pytest.approx((63.96, 94.76), abs=0.02)
    assert Accuracy(100.0, None, 99.0, 20).interval[1] == pytest.approx(100)
