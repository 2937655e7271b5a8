import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa.config.data import Data
from hjepa.config.sections import Evaluation
from hjepa.data.source import Source
from hjepa.data.views import Views
from hjepa.evaluation.chosen import shares, skip_reason, usable
from hjepa.evaluation.evaluator import Evaluator
from hjepa.evaluation.features import collect, pixel_features

CPU = torch.device("cpu")
DATA = Data(image_size=8)


class Colours(Source):
    """Noisy squares, each class of one colour; counts how many images it was asked for."""

    def __init__(self, colours: list[tuple[int, int, int]], length: int, seed: int, side: int = 10) -> None:
        generator = np.random.default_rng(seed)
        self.name = "colours"
        self.size = (side, side)
        self.num_classes = len(colours)
        self.labels = np.arange(length, dtype=np.int64) % len(colours)
        noise = generator.integers(0, 20, (length, 3, side, side))
        self.pixels = (np.asarray(colours)[self.labels][:, :, None, None] + noise).astype(np.uint8)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        self.asked += indices.tolist()
        return self.pixels[indices]


WARM = [(220, 20, 20), (220, 180, 20)]
COLD = [(20, 20, 220), (20, 180, 220)]


def pair(colours: list[tuple[int, int, int]], train: int = 60, test: int = 20) -> tuple[Colours, Colours]:
    return Colours(colours, train, seed=1), Colours(colours, test, seed=2)


def channel_means(images: Tensor) -> dict[str, Tensor]:
    return {"last": images.mean(dim=(2, 3))}


def test_names_come_in_order_and_colours_are_told_apart() -> None:
    def target(images: Tensor) -> dict[str, Tensor]:
        return {"tap4": images[:, :2].mean(dim=(2, 3))} | channel_means(images) | {"level0": images.flatten(1)}

    evaluator = Evaluator(Evaluation(), DATA, 0, [pair(WARM)], CPU)
    found = dict(evaluator.evaluate(target, channel_means))
    assert list(found) == [
        *("knn", "linear", "knn_online", "linear_online"),
        *("knn_tap4", "linear_tap4", "knn_level0", "linear_level0"),
    ]
    assert set(found.values()) == {100.0}
    assert list(dict(evaluator.evaluate(channel_means))) == ["knn", "linear"]
    config = Evaluation(linear=False)
    assert list(dict(Evaluator(config, DATA, 0, [pair(WARM)], CPU).evaluate(target))) == [
        *("knn", "knn_tap4", "knn_level0")
    ]


def test_what_is_constant_is_at_chance() -> None:
    evaluator = Evaluator(Evaluation(), DATA, 0, [pair(WARM)], CPU)
    found = dict(evaluator.evaluate(lambda images: {"last": torch.ones(len(images), 5)}))
    assert found == {"knn": 50.0, "linear": 50.0}


def test_equal_labels_of_two_sources_are_two_classes() -> None:
    evaluator = Evaluator(Evaluation(), DATA, 0, [pair(WARM), pair(COLD)], CPU)
    assert (evaluator.num_classes, evaluator.num_train, evaluator.num_test) == (4, 120, 40)
    assert dict(evaluator.evaluate(channel_means)) == {"knn": 100.0, "linear": 100.0}
    # The same pictures under another source's name are other classes: one in two is then a guess.
    twice = Evaluator(Evaluation(), DATA, 0, [pair(WARM), pair(WARM)], CPU)
    assert dict(twice.evaluate(channel_means))["knn"] == pytest.approx(50, abs=1)


def test_subsets_are_the_seeds_spread_and_not_the_first() -> None:
    config = Evaluation(max_train=30, max_test=10, batch_size=7)

    def asked(seed: int) -> list[list[int]]:
        pairs = [pair(WARM, 600, 100), pair(COLD, 300, 100)]
        evaluator = Evaluator(config, DATA, seed, pairs, CPU)
        assert (evaluator.num_train, evaluator.num_test) == (30, 10)
        list(evaluator.evaluate(channel_means, channel_means))
        first = [list(source.asked) for sides in pairs for source in sides]
        list(evaluator.evaluate(channel_means))
        assert [source.asked for sides in pairs for source in sides] == [twice + twice for twice in first]
        return first

    once = asked(seed=0)
    assert once == asked(seed=0)
    assert once != asked(seed=1)
    assert [len(indices) for indices in once] == [20, 5, 10, 5]  # each image once, for both encoders
    for indices, size in zip(once, (600, 100, 300, 100), strict=True):
        assert indices == sorted(set(indices))
        assert indices[0] < size / 2 < indices[-1]


def test_baselines_are_computed_once() -> None:
    pairs = [pair(WARM)]
    evaluator = Evaluator(Evaluation(), DATA, 0, pairs, CPU)
    projection = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(0))

    def random(images: Tensor) -> dict[str, Tensor]:
        return {"last": images.flatten(1) @ projection, "tap1": images.flatten(1)}

    first = list(evaluator.baselines(random))
    assert [name for name, _ in first] == ["knn_pixels", "linear_pixels", "knn_random", "linear_random"]
    assert all(value == 100.0 for _, value in first)
    asked = len(pairs[0][0].asked)
    assert list(evaluator.baselines(random)) == first
    assert len(pairs[0][0].asked) == asked == 60


def test_features_are_compared_without_their_mean() -> None:
    # Two greys: as directions from black they are one, from their mean they are two.
    black = DATA.augmentation.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    data = DATA.model_copy(update={"augmentation": black})
    pairs = [pair([(120, 120, 120), (180, 180, 180)])]
    found = dict(Evaluator(Evaluation(), data, 0, pairs, CPU).baselines(lambda x: {"last": pixel_features(x)}))
    assert found["knn_pixels"] == 100.0
    assert found["knn_random"] == 100.0


@pytest.mark.parametrize(("side", "kept"), [(8, 8), (32, 32), (40, 32), (96, 32)])
def test_pixel_features_are_area_means(side: int, kept: int) -> None:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    features = pixel_features(images)
    assert features.shape == (2, 3 * kept * kept)
    if side % kept == 0:
        factor = side // kept
        means = images.view(2, 3, kept, factor, kept, factor).mean(dim=(3, 5))
        torch.testing.assert_close(features, means.flatten(1))


def test_collect_sees_normalised_squares_in_batches() -> None:
    source, _ = pair(WARM)
    seen: list[tuple[int, ...]] = []

    def embed(images: Tensor) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        seen.append(tuple(images.shape))
        return {"last": images.mean(dim=(2, 3)).to(torch.bfloat16), "all": images.flatten(1)}

    indices = np.asarray([3, 1, 4, 1, 5], dtype=np.int64)
    views = Views(DATA.augmentation, DATA.image_size)
    features, labels = collect(embed, source, indices, views, 2, CPU)
    assert seen == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert labels.tolist() == [1, 1, 0, 1, 1]
    assert {name: (rows.dtype, rows.shape) for name, rows in features.items()} == {
        "last": (torch.float32, (5, 3)),
        "all": (torch.float32, (5, 192)),
    }
    mean, std = (np.asarray(value)[:, None, None] for value in (DATA.augmentation.mean, DATA.augmentation.std))
    expected = ((source.pixels[indices] / 255 - mean) / std).mean(axis=(2, 3))
    np.testing.assert_allclose(features["all"].view(5, 3, -1).mean(2), expected, atol=0.02)
    assert torch.equal(features["all"][1], features["all"][3])


def test_augmentation_of_the_run_is_not_seen() -> None:
    strong = {"color_jitter": 1.0, "grayscale": 1.0, "gaussian_blur": 1.0}
    augmented = DATA.model_copy(update={"augmentation": DATA.augmentation.model_copy(update=strong)})

    def seen(data: Data) -> Tensor:
        batches: list[Tensor] = []

        def embed(images: Tensor) -> dict[str, Tensor]:
            batches.append(images)
            return channel_means(images)

        list(Evaluator(Evaluation(), data, 0, [pair(WARM)], CPU).evaluate(embed))
        return torch.cat(batches)

    assert torch.equal(seen(DATA), seen(augmented))


def test_without_labels_the_reason_is_told() -> None:
    blind, seeing = pair(WARM), pair(COLD)
    blind[0].labels = None
    assert usable([None, blind, seeing]) == [seeing]
    assert skip_reason([None, blind, seeing]) is None
    for nothing in ([], [None], [None, blind]):
        assert skip_reason(nothing) == "k-NN skipped: no source has labels and a test part"
    assert skip_reason([pair(WARM[:1])]) == "k-NN skipped: all labelled images are of one class"
    assert skip_reason([pair(WARM[:1]), pair(COLD[:1])]) is None
    evaluator = Evaluator(Evaluation(), DATA, 0, [None, blind, seeing], CPU)
    assert (evaluator.num_classes, evaluator.num_train) == (2, 60)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([5, 7], 100, [5, 7]),
        ([50000, 5000], 10000, [9091, 909]),
        ([10, 10, 10], 10, [4, 3, 3]),
        ([1000000, 1], 10, [10, 0]),
        ([3], 2, [2]),
    ],
)
def test_shares(sizes: list[int], limit: int, expected: list[int]) -> None:
    assert shares(sizes, limit) == expected
