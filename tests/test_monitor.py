import pytest
import torch

from hjepa.monitor import rankme, relative_std


def test_std_over_images_sees_a_collapse_that_layer_norm_hides() -> None:
    same = torch.randn(1, 16, 32).expand(64, -1, -1)  # every image gives the same features at each place
    normed = torch.nn.functional.layer_norm(same, (32,))
    assert normed.std(dim=-1).mean() == pytest.approx(1, abs=0.05)  # what a naive monitor would read
    assert relative_std(same) < 1e-3
    assert relative_std(normed) < 1e-3


def test_std_is_near_one_for_features_that_follow_the_image_and_has_no_unit() -> None:
    x = torch.randn(256, 16, 32)
    assert relative_std(x).item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(relative_std(1000 * x), relative_std(x))


def test_partial_collapse_lies_between() -> None:
    x = torch.randn(256, 4, 32)
    x[..., 8:] = 1.0
    assert 0.4 < relative_std(x) < 0.6


def test_rankme_counts_dimensions() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64)).Q
    for rank in (1, 5, 40):
        x = torch.randn(4096, rank) @ basis[:rank]
        assert rankme(x).item() == pytest.approx(rank, rel=0.05)


def test_what_is_not_finite_does_not_stop_a_monitor() -> None:
    x = torch.randn(16, 8)
    x[3, 3] = float("inf")
    assert rankme(x).isnan()
    assert not relative_std(x).isfinite()


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (48, 48)])
def test_rankme_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g) * torch.logspace(0, -5, shape[1]) + 3
    values = torch.linalg.svdvals(x.double() - x.double().mean(dim=0))
    p = values / values.sum()
    assert rankme(x).item() == pytest.approx(torch.exp(torch.special.entr(p).sum()).item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_rankme_of_a_constant_is_zero(value: float) -> None:
    assert rankme(torch.full((32, 8), value) * torch.linspace(0.5, 1, 8)) == 0
