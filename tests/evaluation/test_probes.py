import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from hjepa.config.sections import KNN, Evaluation
from hjepa.evaluation import ridge as ridge_module
from hjepa.evaluation.probes import (
    accuracy,
    knn_accuracy,
    knn_predict,
    linear_probe,
    nearest,
    probes,
)
from hjepa.evaluation.ridge import Ridge

GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def blobs(n: int, d: int, classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian clusters with centres that do not depend on the seed, off the origin and of unequal scale."""
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, d, generator=generator)
    return 0.3 + features * torch.linspace(0.5, 2.0, d), labels


# ---- k nearest neighbours


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_predicts_what_sklearn_predicts(k: int, temperature: float) -> None:
    bank, bank_labels = blobs(700, 16, 7, 2.0, seed=1)
    queries, query_labels = blobs(300, 16, 7, 2.0, seed=2)
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), bank_labels.numpy())
    expected = theirs.predict(queries.double().numpy())
    ours = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature, num_classes=7)
    np.testing.assert_array_equal(ours.numpy(), expected)
    value = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature, num_classes=7)
    assert 20 < value < 95  # the comparison above says something only where the task is neither
    assert value == pytest.approx(100 * (expected == query_labels.numpy()).mean())


def test_nearest_is_the_brute_force() -> None:
    bank, _ = blobs(533, 24, 5, 1.0, seed=1)
    queries, _ = blobs(71, 24, 5, 1.0, seed=2)
    exact = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = exact.sort(dim=1, descending=True)
    similarity, index = nearest(bank, queries, 10)
    assert torch.equal(index, expected.indices[:, :10])
    torch.testing.assert_close(similarity.double(), expected.values[:, :10], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("query_block", "bank_block"), [(1, 533), (7, 10), (71, 64), (64, 3), (1000, 1000)])
def test_block_sizes_change_nothing(query_block: int, bank_block: int) -> None:
    bank, _ = blobs(533, 24, 5, 1.0, seed=1)
    queries, _ = blobs(71, 24, 5, 1.0, seed=2)
    similarity, index = nearest(bank, queries, 20)
    similarity_, index_ = nearest(bank, queries, 20, query_block=query_block, bank_block=bank_block)
    assert torch.equal(index, index_)
    torch.testing.assert_close(similarity, similarity_, rtol=0, atol=1e-6)


def test_similarities_of_both_signs_and_zero_keep_their_order() -> None:
    angles = torch.tensor([0.0, 0.3, math.pi / 2, 2.0, math.pi])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    bank[2] = torch.tensor([0.0, 1.0])
    similarity, index = nearest(bank.flip(0), torch.tensor([[2.0, 0.0]]), 5)
    assert index.tolist() == [[4, 3, 2, 1, 0]]
    torch.testing.assert_close(similarity[0], bank[:, 0])


@pytest.mark.parametrize("bank_block", [1, 4, 100])
def test_of_equal_similarities_the_lowest_index_comes_first(bank_block: int) -> None:
    # What a collapsed encoder gives: every image the same, and no winner but by the rule.
    bank = torch.ones(50, 4)
    _, index = nearest(bank, torch.ones(3, 4), 6, bank_block=bank_block)
    assert index.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    labels = torch.tensor([2, 1, 1, 2, 0, 0] + [3] * 44)
    predicted = knn_predict(bank, labels, torch.ones(3, 4), k=6, temperature=0.07, num_classes=4)
    assert predicted.tolist() == [0, 0, 0]


def test_zero_features_are_no_accident() -> None:
    similarity, index = nearest(torch.zeros(5, 3), torch.zeros(2, 3), 2)
    assert similarity.tolist() == [[0, 0], [0, 0]]
    assert index.tolist() == [[0, 1], [0, 1]]


def test_k_is_clamped_to_the_bank() -> None:
    bank, labels = blobs(9, 4, 3, 0.5, seed=1)
    queries, _ = blobs(20, 4, 3, 0.5, seed=2)
    _, index = nearest(bank, queries, 1000)
    assert index.shape == (20, 9)
    assert torch.equal(index.sort(dim=1).values, torch.arange(9).expand(20, 9))
    every, nine = (knn_predict(bank, labels, queries, k=k, temperature=0.07, num_classes=3) for k in (1000, 9))
    assert torch.equal(every, nine)


def test_a_low_temperature_does_not_overflow() -> None:
    bank, labels = blobs(200, 8, 4, 1.0, seed=1)
    queries, _ = blobs(50, 8, 4, 1.0, seed=2)
    cold = knn_predict(bank, labels, queries, k=10, temperature=1e-6, num_classes=4)
    one = knn_predict(bank, labels, queries, k=1, temperature=1.0, num_classes=4)
    assert torch.equal(cold, one)


# ---- linear


@pytest.mark.parametrize(("n", "d"), [(400, 30), (60, 150)], ids=["primal", "dual"])
@pytest.mark.parametrize("grid", [GRID, (0.1,)], ids=["eigendecomposition", "solve"])
def test_ridge_predicts_what_sklearn_predicts(n: int, d: int, grid: tuple[float, ...]) -> None:
    train, labels = blobs(n, d, 5, 3.0, seed=1)
    test, _ = blobs(300, d, 5, 3.0, seed=2)
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0)
    z, z_test = (((x.double() - mean) / deviation).numpy() for x in (train, test))
    ridge = Ridge(train, labels, 5)
    for l2, weights in zip(grid, ridge.weights(grid), strict=True):
        theirs = SklearnRidge(alpha=l2 * n).fit(z, F.one_hot(labels, 5).numpy())
        np.testing.assert_allclose(weights.T.numpy(), theirs.coef_, rtol=1e-8, atol=1e-10)
        expected = theirs.predict(z_test).argmax(axis=1)
        np.testing.assert_array_equal(ridge.predict(test, weights).numpy(), expected)


def test_ridge_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = blobs(100, 20, 4, 1.0, seed=1)
    (whole,) = Ridge(train, labels, 4).weights([0.1])
    monkeypatch.setattr(ridge_module, "ROW_BLOCK", 7)
    (blocks,) = Ridge(train, labels, 4).weights([0.1])
    torch.testing.assert_close(whole, blocks)


@pytest.mark.parametrize("d", [10, 90], ids=["primal", "dual"])
def test_a_constant_feature_gets_no_weight(d: int) -> None:
    train, labels = blobs(50, d, 3, 1.0, seed=1)
    train[:, 0] = 0.1  # its mean in float64 is not exactly 0.1
    train[:, 1] = 0.0
    (weights,) = Ridge(train, labels, 3).weights([0.1])
    assert weights.isfinite().all()
    assert not weights[:2].any()


def test_linear_probe_is_the_ridge_of_all_of_train() -> None:
    train, train_labels = blobs(300, 20, 5, 3.0, seed=1)
    test, test_labels = blobs(200, 20, 5, 3.0, seed=2)
    result = linear_probe(train, train_labels, test, test_labels, l2=GRID, num_classes=5, seed=3)
    ridge = Ridge(train, train_labels, 5)
    (weights,) = ridge.weights([result.l2])
    assert result.accuracy == accuracy(ridge.predict(test, weights), test_labels)
    assert result == linear_probe(train, train_labels, test, test_labels, l2=GRID[::-1], num_classes=5, seed=3)


def test_the_choice_never_sees_test() -> None:
    train, train_labels = blobs(120, 60, 5, 4.0, seed=1)
    chosen = set()
    for seed in range(5):
        test, test_labels = blobs(100, 60, 5, 0.5, seed=seed)
        chosen.add(linear_probe(train, train_labels, test, test_labels, l2=GRID, num_classes=5, seed=3).l2)
        shuffled = test_labels[torch.randperm(100, generator=torch.Generator().manual_seed(seed))]
        chosen.add(linear_probe(train, train_labels, test, shuffled, l2=GRID, num_classes=5, seed=3).l2)
    assert len(chosen) == 1


def test_the_choice_follows_the_held_out_part() -> None:
    # 80 rows of 79 noise features and one that tells: little regularisation fits noise, more sees the one.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    train = torch.randn(100, 80, generator=generator)
    train[:, 0] = labels + 0.3 * torch.randn(100, generator=generator)
    result = linear_probe(train, labels, train, labels, l2=(1e-6, 1.0), num_classes=2, seed=0)
    assert result.l2 == 1.0


def test_equal_candidates_give_the_strongest() -> None:
    train, labels = blobs(200, 10, 3, 0.01, seed=1)
    assert linear_probe(train, labels, train, labels, l2=(1e-3, 1e-1, 1e-2), num_classes=3, seed=0) == (
        100,
        0.1,
    )


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6])
def test_very_few_rows_are_enough(n: int) -> None:
    train = torch.eye(6)[:n]
    labels = torch.arange(n) % 2
    value, l2 = linear_probe(train, labels, train, labels, l2=GRID, num_classes=2, seed=0)
    assert 0 <= value <= 100
    assert l2 in GRID


# ---- both


def test_separable_data_give_100() -> None:
    train, train_labels = blobs(400, 16, 8, 0.02, seed=1)
    test, test_labels = blobs(200, 16, 8, 0.02, seed=2)
    found = dict(probes(Evaluation(), train, train_labels, test, test_labels, 8, seed=0))
    assert found == {"knn": 100.0, "linear": 100.0}


def test_shuffled_labels_give_chance() -> None:
    train, train_labels = blobs(2000, 16, 4, 0.02, seed=1)
    test, test_labels = blobs(2000, 16, 4, 0.02, seed=2)
    generator = torch.Generator().manual_seed(3)
    train_labels = train_labels[torch.randperm(2000, generator=generator)]
    test_labels = test_labels[torch.randperm(2000, generator=generator)]
    for name, value in probes(Evaluation(), train, train_labels, test, test_labels, 4, seed=0):
        assert value == pytest.approx(25, abs=5), name  # five standard deviations of 2000 coin flips


def test_accuracy_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(5, (333,), generator=generator) for _ in range(2))
    expected = 100 * multiclass_accuracy(predicted, labels, num_classes=5, average="micro").item()
    assert accuracy(predicted, labels) == pytest.approx(expected)


def test_the_config_is_obeyed() -> None:
    train, train_labels = blobs(200, 8, 4, 2.0, seed=1)
    test, test_labels = blobs(100, 8, 4, 2.0, seed=2)
    config = Evaluation(knn=KNN(k=3, temperature=0.5), linear=False)
    expected = knn_accuracy(train, train_labels, test, test_labels, k=3, temperature=0.5, num_classes=4)
    assert list(probes(config, train, train_labels, test, test_labels, 4, seed=0)) == [("knn", expected)]


def test_features_that_are_not_finite_give_nan_and_no_crash() -> None:
    train, labels = blobs(20, 4, 2, 1.0, seed=1)
    broken = train.clone()
    broken[3, 2] = math.inf
    for bank, queries in ((broken, train), (train, broken)):
        found = dict(probes(Evaluation(), bank, labels, queries, labels, 2, seed=0))
        assert list(found) == ["knn", "linear"]
        assert all(math.isnan(value) for value in found.values())
