import pytest
import torch
import torch.nn.functional as F

from hjepa.model.whitening import whitened_filters


def smooth_images(n: int) -> torch.Tensor:
    """Noise, blurred: neighbouring pixels are alike, as in pictures, and the mean is not 0."""
    noise = torch.randn(n, 3, 35, 35, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 4, stride=1) * 5 + 1


def test_outputs_on_the_datas_patches_have_mean_zero_and_variance_near_one() -> None:
    images = smooth_images(400)
    weight, bias = whitened_filters(images, 4, 24, seed=0)
    assert weight.shape == (24, 3, 4, 4)
    out = F.conv2d(images, weight, bias, stride=4).transpose(0, 1).flatten(1)
    assert out.mean(1).abs().max() < 1e-3
    # Directions of little variance are held down by the floor.
    assert (out.var(1) < 1.05).all()
    assert out.var(1).mean() > 0.15
    random = F.conv2d(images, torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(1)), stride=4)
    apart = [torch.corrcoef(x).abs().fill_diagonal_(0).mean() for x in (out, random.transpose(0, 1).flatten(1))]
    assert apart[0] < 0.6 * apart[1]


def test_filters_are_a_function_of_the_seed() -> None:
    images = smooth_images(50)
    one, two, other = (whitened_filters(images, 4, 8, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("images", [torch.ones(3, 3, 8, 8), smooth_images(1)[:, :, :4, :4]])
def test_images_without_variance_give_finite_filters(images: torch.Tensor) -> None:
    weight, bias = whitened_filters(images, 4, 8, seed=0)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
