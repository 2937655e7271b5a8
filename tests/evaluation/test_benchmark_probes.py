"""The probes of `hjepa eval` on features whose answer is known, and beside scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.clustering import normalized_mutual_info_score as torchmetrics_nmi

from hjepa.evaluation.clusters import clusters, kmeans, lloyd, normalised_mutual_information
from hjepa.evaluation.few_shot import draw_rows, few_shot, too_few
from hjepa.evaluation.logistic import fits, logistic
from hjepa.evaluation.task import Task, held_out
from hjepa.evaluation.trained import Recipe, attentive, cosine, sgd_linear


def blobs(n: int, d: int, classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian clusters with centres that do not depend on the seed, and of unequal scale."""
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    features = centres[labels] + spread * torch.randn(n, d, generator=generator)
    return features * torch.linspace(0.5, 2.0, d), labels


def task(n: int = 300, m: int = 200, d: int = 16, classes: int = 5, spread: float = 1.2) -> Task:
    return Task(*blobs(n, d, classes, spread, 1), *blobs(m, d, classes, spread, 2), classes, seed=0)


def noise() -> Task:
    """Labels that the features know nothing of."""
    there = task(600, 1000)
    return there._replace(train_labels=there.train_labels[torch.randperm(600, generator=torch.Generator())])


# ---- few-shot


def test_few_shot_is_scikit_learns_ridge_on_the_drawn_images() -> None:
    """Mean and spread over the draws, each of them predicted by scikit-learn from the same rows."""
    given = task()
    found = dict(few_shot(given))
    assert list(found) == ["shot1", "shot5", "shot10"]
    for k in (1, 5, 10):
        scores = []
        for draw in range(5):
            rows = draw_rows(given, k, draw)
            assert torch.equal(given.train_labels[rows].bincount(), torch.full((5,), k))
            scaler = StandardScaler().fit(given.train[rows].double())
            ridge = Ridge(alpha=float(len(rows))).fit(
                scaler.transform(given.train[rows].double()), F.one_hot(given.train_labels[rows], 5)
            )
            predicted = torch.from_numpy(ridge.predict(scaler.transform(given.test.double()))).argmax(1)
            scores.append(100 * float(multiclass_accuracy(predicted, given.test_labels, 5, average="micro")))
        assert found[f"shot{k}"].value == pytest.approx(np.mean(scores), abs=1e-4)
        assert found[f"shot{k}"].spread == pytest.approx(np.std(scores, ddof=1), abs=1e-4)
    assert found["shot1"].value < found["shot10"].value


def test_draws_differ_are_the_seeds_and_grow() -> None:
    given = task()
    assert torch.equal(draw_rows(given, 5, 0), draw_rows(given, 5, 0))
    assert not torch.equal(draw_rows(given, 5, 0), draw_rows(given, 5, 1))
    assert not torch.equal(draw_rows(given, 5, 0), draw_rows(given._replace(seed=1), 5, 0))
    assert torch.equal(draw_rows(given, 5, 0), draw_rows(given, 10, 0).view(5, 10)[:, :5].flatten())


def test_classes_with_too_few_images_are_told_and_their_figure_left_out() -> None:
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 7)
    given = Task(torch.randn(25, 4), labels, torch.randn(9, 4), torch.arange(9) % 3, 3, 0)
    assert list(dict(few_shot(given))) == ["shot1", "shot5"]
    assert too_few(labels, 3, 10) == "2 of 3 classes have fewer than 10 training images (the smallest has 6)"
    assert too_few(labels, 4, 1) == "1 of 4 classes have fewer than 1 training images (the smallest has 0)"
    assert too_few(labels, 3, 6) is None


# ---- clusters


def test_nmi_is_scikit_learns_and_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    for a, b in ((5, 5), (3, 20), (1, 4), (1, 1)):
        x = torch.randint(a, (500,), generator=generator)
        y = torch.where(
            torch.rand(500, generator=generator) < 0.5, x % b, torch.randint(b, (500,), generator=generator)
        )
        ours = normalised_mutual_information(x, y)
        assert ours == pytest.approx(normalized_mutual_info_score(y.numpy(), x.numpy()), abs=1e-9)
        if a > 1:
            assert ours == pytest.approx(float(torchmetrics_nmi(x, y)), abs=1e-5)
    assert normalised_mutual_information(x, x) == 1.0


def test_lloyd_is_scikit_learns() -> None:
    """From the same start to the same centres; of several starts the best is kept."""
    points, _ = blobs(400, 8, 6, 1.5, 1)
    starts = torch.stack([points[i * 7 : i * 7 + 6] for i in range(4)])
    theirs = [
        KMeans(6, init=start.numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=200).fit(points.numpy())
        for start in starts
    ]
    for start, fitted in zip(starts, theirs, strict=True):
        torch.testing.assert_close(
            lloyd(points, start[None], 200), torch.from_numpy(fitted.cluster_centers_), rtol=1e-3, atol=1e-3
        )
    best = min(theirs, key=lambda fitted: fitted.inertia_)
    torch.testing.assert_close(
        lloyd(points, starts, 200), torch.from_numpy(best.cluster_centers_), rtol=1e-3, atol=1e-3
    )


def test_clusters_find_classes_that_are_clusters() -> None:
    assert clusters(task(spread=0.2)).value == pytest.approx(100)
    assert clusters(noise()._replace(test=torch.randn(1000, 16))).value < 5
    same = task()._replace(train=torch.ones(300, 16), test=torch.ones(200, 16))
    assert clusters(same).value == pytest.approx(0, abs=1e-6)
    points, _ = blobs(300, 8, 5, 1.0, 1)
    inertia = [float(torch.cdist(points, kmeans(points, 5, seed, 4)).min(1).values.square().sum()) for seed in (0, 1)]
    theirs = KMeans(5, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert max(inertia) < 1.02 * theirs


# ---- logistic


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_logistic_is_scikit_learns(l2: float) -> None:
    given = task()
    (ours,) = fits(given.train, given.train_labels, 5, [l2])
    scaler = StandardScaler().fit(given.train.double())
    theirs = LogisticRegression(C=1 / (l2 * 300), tol=1e-8, max_iter=2000)
    theirs.fit(scaler.transform(given.train.double()), given.train_labels)
    torch.testing.assert_close(
        ours.weights - ours.weights.mean(1, keepdim=True),
        torch.from_numpy(theirs.coef_.T - theirs.coef_.T.mean(1, keepdims=True)),
        rtol=1e-3,
        atol=1e-3,
    )
    predicted = theirs.predict(scaler.transform(given.test.double()))
    assert (ours.predict(given.test).numpy() == predicted).mean() > 0.99


def test_of_regularisations_that_do_equally_well_logistic_takes_the_strongest() -> None:
    assert 60 < logistic(task()).value < 100
    easy = logistic(task(spread=0.05))
    assert (easy.value, easy.chosen["l2"]) == (100, 1e-1)
    constant = task()._replace(train=torch.ones(300, 16), test=torch.ones(200, 16))
    assert logistic(constant).value == pytest.approx(20)


# ---- trained by gradient


def test_sgd_agrees_with_logistic_regression() -> None:
    """Without weight decay it is logistic regression stopped early: near the best of its grid."""
    given = task(1000, 1000, spread=1.5)
    ours = sgd_linear(given, Recipe(epochs=20, rates=(1e-3, 1e-1, 30.0), batch_size=100))
    assert ours.value == pytest.approx(logistic(given).value, abs=3)
    assert ours.chosen == {"lr": 0.1, "epochs": 20}


def test_rates_are_chosen_without_a_look_at_test() -> None:
    given = task()
    recipe = Recipe(epochs=3, rates=(1e-3, 1e-1), batch_size=50)
    found = sgd_linear(given, recipe)
    turned = (given.test_labels + 1) % 5
    again = sgd_linear(given._replace(test_labels=turned), recipe)
    assert again.chosen == found.chosen
    assert again.value < found.value
    assert sgd_linear(given, recipe).value == found.value
    choice, fit = held_out(300, 0)
    assert (len(choice), len(fit)) == (60, 240)
    assert sorted(torch.cat([choice, fit]).tolist()) == list(range(300))


def test_attention_finds_the_token_that_knows() -> None:
    """One token in eight, anywhere, holds the class and a mark; the mean hardly shows it."""
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % 4
        tokens = torch.randn(n, 8, 16, generator=generator)
        place = torch.randint(8, (n,), generator=generator)
        tokens[torch.arange(n), place] = 4 * F.one_hot(labels, 16).float()
        tokens[torch.arange(n), place, 15] = 8.0
        return tokens, labels

    train, test = images(800), images(400)
    recipe = Recipe(epochs=12, rates=(1e-4, 3e-3), batch_size=100, warmup=0.1)
    found = attentive(Task(*train, *test, 4, 0), recipe)
    assert found.value > 95
    assert found.chosen["lr"] == 3e-3
    pooled = sgd_linear(Task(train[0].mean(1), train[1], test[0].mean(1), test[1], 4, 0), Recipe(20, (0.1,), 100))
    assert pooled.value < found.value


def test_rows_may_be_half_precision_and_come_on_demand() -> None:
    given = task()

    class Asked:
        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, rows: Tensor) -> Tensor:
            return self.rows[rows].half()

    recipe = Recipe(epochs=5, rates=(0.1,), batch_size=50)
    lazy = sgd_linear(given._replace(train=Asked(given.train), test=Asked(given.test)), recipe)
    assert lazy.value == pytest.approx(sgd_linear(given, recipe).value, abs=1)


def test_the_rate_rises_and_falls() -> None:
    shares = [cosine(100, 0.1)(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5)
    assert shares[99] < 1e-3
    assert shares[10:] == sorted(shares[10:], reverse=True)
