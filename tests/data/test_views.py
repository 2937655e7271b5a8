"""Every step equals torchvision's function of that name; a draw follows its address and its distribution."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hjepa.config.data import Augmentation
from hjepa.data import transforms
from hjepa.data.views import Float32, ViewParameters, Views, center_views, draw_views

TOLERANCE = 1e-4  # of the range 0..1
EVERYTHING = Augmentation(color_jitter=0.4, grayscale=0.3, gaussian_blur=0.5, solarization=0.4)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def random_images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def random_floats(n: int, size: int) -> Tensor:
    """Random colours, and among them black, white, grays and pixels whose two largest channels agree."""
    x = random_images(n, size, size).float() / 255
    x[:, :, 0, 0], x[:, :, 0, 1] = 0, 1
    x[:, 1:, 1] = x[:, :1, 1]
    x[:, 1, 2] = x[:, 0, 2]
    x[:, 2, 3] = x[:, 1, 3]
    return x


def whole(n: int) -> ViewParameters:
    return center_views(np.ones((n, 2), np.float32))


def sizes(n: int, height: float = 64, width: float = 64) -> Float32:
    return np.tile(np.array([height, width], np.float32), (n, 1))


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Crop, resize, flip


@pytest.mark.parametrize(
    ("stored", "size", "box"),
    [
        ((32, 32), 32, (0, 0, 32, 32)),
        ((32, 32), 32, (3, 5, 20, 17)),
        ((64, 64), 24, (1, 0, 63, 50)),
        ((64, 48), 40, (7, 9, 30, 39)),
        ((20, 30), 64, (2, 28, 18, 2)),
        ((256, 256), 224, (10, 31, 239, 200)),
        ((200, 160), 7, (0, 1, 200, 159)),
        ((16, 16), 1, (4, 4, 9, 5)),
        ((16, 16), 8, (15, 0, 1, 1)),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_equals_torchvision(
    stored: tuple[int, int], size: int, box: tuple[int, int, int, int], flip: bool
) -> None:
    image = random_images(1, *stored)
    shares = torch.tensor([box]) / torch.tensor([*stored, *stored])
    actual = transforms.crop_resize(image, shares, torch.tensor([flip]), size)
    expected = tv.resized_crop(image.float() / 255, *box, size=[size, size], antialias=True)
    close(actual, tv.horizontal_flip(expected) if flip else expected)


def test_whole_image_at_its_own_size_is_that_image() -> None:
    images = random_images(3, 32, 32)
    close(Views(Augmentation(**RAW), 32)(images, whole(3)), images / 255, 1e-6)


def test_crop_moves_smoothly_between_pixels() -> None:
    images = random_images(1, 24, 24).expand(100, -1, -1, -1)
    left = torch.linspace(0, 0.25, 100)
    boxes = torch.stack([left * 0, left, left * 0 + 0.7, left * 0 + 0.7], dim=1)
    crops = transforms.crop_resize(images, boxes, torch.zeros(100, dtype=torch.bool), 24)
    assert crops.diff(dim=0).abs().max() < 0.1  # a box rounded to pixels jumps by up to 1
    assert crops.min() >= 0
    assert crops.max() <= 1 + 1e-6


# Colour


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_each_factor_equals_torchvision(step: int, factor: float) -> None:
    x = random_floats(2, 12)
    jitter = torch.tensor([NEUTRAL, NEUTRAL])
    jitter[:, step] = factor
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[step]
    close(transforms.jitter_color(x, jitter), torch.stack([adjust(image, factor) for image in x]))


@pytest.mark.parametrize("turns", [-0.5, -0.25, -0.1, 0.0, 0.03, 1 / 6, 0.25, 0.5])
def test_hue_equals_torchvision(turns: float) -> None:
    x = random_floats(2, 24)
    actual = transforms.shift_hue(x, torch.full((2, 1, 1), turns))
    close(actual, torch.stack([tv.adjust_hue(image, turns) for image in x]))


def test_jitter_applies_the_four_in_the_documented_order() -> None:
    x = random_floats(2, 12)
    factors = [(0.7, 1.4, 0.6, 0.1), (1.3, 0.8, 1.4, -0.07)]
    expected = []
    for image, (brightness, contrast, saturation, hue) in zip(x, factors, strict=True):
        image = tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast)
        expected.append(tv.adjust_hue(tv.adjust_saturation(image, saturation), hue))
    close(transforms.jitter_color(x, torch.tensor(factors)), torch.stack(expected))


def test_grayscale_equals_torchvision_and_leaves_the_others() -> None:
    images = random_images(2, 16, 16)
    parameters = whole(2)._replace(grayscale=torch.tensor([True, False]))
    actual = Views(Augmentation(grayscale=0.5, **RAW), 16)(images, parameters)
    x = images / 255
    close(actual, torch.stack([tv.rgb_to_grayscale(x[0], num_output_channels=3), x[1]]))


def test_solarize_equals_torchvision_at_the_middle_and_leaves_the_others() -> None:
    images = random_images(2, 16, 16)
    images[:, :, 0, 0], images[:, :, 0, 1], images[:, :, 0, 2] = 127, 128, 255
    parameters = whole(2)._replace(solarize=torch.tensor([True, False]))
    actual = Views(Augmentation(solarization=0.5, **RAW), 16)(images, parameters)
    x = images / 255
    close(actual, torch.stack([tv.solarize(x[0], 0.5), x[1]]))
    assert actual[0].max() < 0.5 + TOLERANCE


# Blur and normalisation


@pytest.mark.parametrize("size", [2, 3, 8, 32, 64, 96])
def test_blur_equals_torchvision(size: int) -> None:
    x = random_floats(4, max(size, 4))[:, :, :size, :size]
    sigma = [0.0, 0.1, 0.9, 2.0]
    actual = transforms.gaussian_blur(x.contiguous(), torch.tensor(sigma), transforms.reflected_band(size))
    kernel = 2 * transforms.blur_radius(size) + 1
    close(actual[0], x[0], 1e-6)
    close(actual[1:], torch.stack([tv.gaussian_blur(x[i], kernel, sigma[i]) for i in (1, 2, 3)]))


def test_blur_kernel_is_odd_and_near_a_tenth() -> None:
    assert [2 * transforms.blur_radius(size) + 1 for size in (1, 32, 64, 96, 224)] == [3, 5, 7, 11, 23]


def test_normalise_equals_torchvision() -> None:
    images = random_images(2, 16, 16)
    config = Augmentation()
    expected = tv.normalize(images / 255, list(config.mean), list(config.std))
    close(Views(config, 16)(images, whole(2)), expected)


# The whole


def test_the_chain_equals_torchvision_in_the_documented_order() -> None:
    n, size = 6, 40
    images = random_images(n, 64, 48)
    parameters = draw_views(EVERYTHING, 1, "view", np.arange(n), sizes(n, 64, 48))
    boxes = (parameters.box * torch.tensor([64, 48, 64, 48])).round().int().clamp(min=1)
    parameters = parameters._replace(box=boxes / torch.tensor([64, 48, 64, 48]))
    expected = []
    for i, image in enumerate(images / 255):
        x = tv.resized_crop(image, *boxes[i].tolist(), size=[size, size], antialias=True)
        x = tv.horizontal_flip(x) if parameters.flip[i] else x
        brightness, contrast, saturation, hue = parameters.jitter[i].tolist()
        x = tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast)
        x = tv.adjust_hue(tv.adjust_saturation(x, saturation), hue)
        x = tv.rgb_to_grayscale(x, num_output_channels=3) if parameters.grayscale[i] else x
        sigma = float(parameters.blur_sigma[i])
        x = tv.gaussian_blur(x, 2 * transforms.blur_radius(size) + 1, sigma) if sigma else x
        x = tv.solarize(x, 0.5) if parameters.solarize[i] else x
        expected.append(tv.normalize(x, list(EVERYTHING.mean), list(EVERYTHING.std)))
    assert parameters.solarize.any()
    close(Views(EVERYTHING, size)(images, parameters), torch.stack(expected), TOLERANCE / 0.2)


def test_parameters_travel_as_one_tensor_and_come_out_as_they_were() -> None:
    drawn = draw_views(EVERYTHING, 0, "view", np.arange(64), sizes(64))
    packed = drawn.packed()
    assert (packed.shape, packed.dtype) == ((64, 12), torch.float32)
    for before, after in zip(drawn, ViewParameters.unpacked(packed), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_views_are_written_where_they_shall_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    images, drawn = random_images(5, 40, 40), draw_views(EVERYTHING, 0, "view", np.arange(5), sizes(5, 40, 40))
    render = Views(EVERYTHING, 32)
    whole = render(images, drawn)
    for size in (8_000_000, 2 * 3 * 4 * 32**2):  # all at once, and two at a time
        monkeypatch.setattr("hjepa.data.views.CPU_BYTES", size)
        place = torch.full((7, 3, 32, 32), torch.nan)
        out = render(images, drawn, place[1:6])
        assert out.data_ptr() == place[1].data_ptr()
        close(place[1:6], whole, 1e-6)
        assert place[[0, 6]].isnan().all()


def test_a_view_is_the_same_in_any_batch() -> None:
    images = random_images(9, 40, 40)
    parameters = draw_views(EVERYTHING, 0, "view", np.arange(9), sizes(9, 40, 40))
    render = Views(EVERYTHING, 32)
    together = render(images, parameters)
    for rows in ([4], [8, 0, 3]):
        alone = render(images[rows], ViewParameters(*(tensor[rows] for tensor in parameters)))
        close(alone, together[rows], 1e-5)


def test_a_cpu_draws_many_views_in_parts_that_fit_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Augmentation(color_jitter=0.4, grayscale=0.5, gaussian_blur=0.5, solarization=0.5)
    images = torch.randint(0, 256, (7, 3, 20, 24), dtype=torch.uint8)
    drawn = draw_views(config, 0, "view", np.arange(7), np.full((7, 2), 24, np.float32))
    views = Views(config, 16)
    whole = views(images, drawn)
    monkeypatch.setattr("hjepa.data.views.CPU_BYTES", 3 * 3 * 4 * 16**2)  # three at a time
    torch.testing.assert_close(views(images, drawn), whole, rtol=0, atol=1e-6)


def test_output_is_plain_and_input_is_untouched() -> None:
    images = random_images(4, 20, 20)
    before = images.clone()
    parameters = draw_views(EVERYTHING, 0, "view", np.arange(4), sizes(4))
    kept = [tensor.clone() for tensor in parameters]
    out = Views(EVERYTHING, 32)(images, parameters)
    assert out.shape == (4, 3, 32, 32)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert not out.requires_grad
    assert torch.equal(images, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, parameters, strict=True))


def test_mixed_precision_of_the_model_does_not_reach_the_views() -> None:
    images = random_images(4, 32, 32)
    parameters = draw_views(EVERYTHING, 0, "view", np.arange(4), sizes(4))
    render = Views(EVERYTHING, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = render(images, parameters)
    assert torch.equal(inside, render(images, parameters))


def test_nothing_reads_a_value_on_the_device() -> None:
    # A fake tensor has no values, so any .item(), boolean index or branch on data raises.
    images, parameters = random_images(4, 32, 32), draw_views(EVERYTHING, 0, "view", np.arange(4), sizes(4))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        drawn = ViewParameters(*(fake.from_tensor(tensor).to("cuda") for tensor in parameters))
        x = Views(EVERYTHING, 24).to("cuda")(fake.from_tensor(images).to("cuda"), drawn)
    assert x.shape == (4, 3, 24, 24)
    assert x.device.type == "cuda"


@pytest.mark.parametrize("chosen", [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_changing_some_images_is_changing_all_and_keeping_some(chosen: list[int]) -> None:
    x, which, factor = random_floats(5, 8), torch.tensor(chosen).bool(), torch.arange(5.0)

    def change(images: Tensor, factors: Tensor) -> Tensor:
        return images * factors.view(-1, 1, 1, 1)

    expected = torch.where(which.view(-1, 1, 1, 1), change(x, factor), x)
    assert torch.equal(transforms.change_some(x.clone(), which, change, factor), expected)


@pytest.mark.parametrize(
    "config",
    [
        Augmentation(color_jitter=0.4, color_jitter_probability=0.5, **RAW),
        Augmentation(gaussian_blur=0.5, **RAW),
    ],
)
def test_an_image_that_is_not_chosen_stays_as_it_was_cut(config: Augmentation) -> None:
    images = random_images(32, 24, 24)
    drawn = draw_views(config, 0, "view", np.arange(32), sizes(32, 24, 24))
    untouched = (drawn.blur_sigma == 0) & (drawn.jitter == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(dim=1)
    assert 0 < untouched.sum() < 32
    actual, cut = Views(config, 16)(images, drawn), Views(Augmentation(**RAW), 16)(images, drawn)
    changed = (actual != cut).flatten(1).any(dim=1)
    assert torch.equal(changed, ~untouched)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
def test_cuda_agrees_with_cpu_and_never_waits() -> None:
    images = random_images(8, 40, 40)
    parameters = draw_views(EVERYTHING, 0, "view", np.arange(8), sizes(8))
    render = Views(EVERYTHING, 32).to("cuda")
    on_device = images.cuda(), parameters.to("cuda")
    render(*on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = render(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(out.cpu(), Views(EVERYTHING, 32)(images, parameters), TOLERANCE / 0.2)


# What is drawn


def test_a_row_depends_on_its_address_alone() -> None:
    true_sizes = np.random.default_rng(0).uniform(20, 200, (50, 2)).astype(np.float32)
    positions = np.arange(1000, 1050)
    parameters = draw_views(EVERYTHING, 7, "view", positions, true_sizes)
    rows = np.array([30, 2, 2, 49])
    again = draw_views(EVERYTHING, 7, "view", positions[rows], true_sizes[rows])
    for one, other in zip(parameters, again, strict=True):
        assert torch.equal(one[torch.from_numpy(rows)], other)


def test_seed_stream_and_position_each_change_the_draw() -> None:
    first = draw_views(EVERYTHING, 0, "a", np.arange(8), sizes(8))
    for seed, stream, start in ((1, "a", 0), (0, "b", 0), (0, "a", 8)):
        other = draw_views(EVERYTHING, seed, stream, np.arange(start, start + 8), sizes(8))
        assert not torch.isclose(first.box, other.box).all(dim=1).any()


def test_shapes_and_dtypes() -> None:
    for parameters in (draw_views(EVERYTHING, 0, "view", np.arange(5), sizes(5)), center_views(sizes(5))):
        shapes = [tuple(tensor.shape) for tensor in parameters]
        assert shapes == [(5, 4), (5,), (5, 4), (5,), (5,), (5,)]
        dtypes = [tensor.dtype for tensor in parameters]
        assert dtypes == [torch.float32, torch.bool, torch.float32, torch.bool, torch.float32, torch.bool]
    empty = draw_views(EVERYTHING, 0, "view", np.arange(0), sizes(0))
    assert Views(EVERYTHING, 8)(random_images(0, 8, 8), empty).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 300)])
def test_crops_lie_in_the_ranges_and_are_distributed_as_torchvisions(height: int, width: int) -> None:
    config = Augmentation(crop_scale=(0.2, 0.9), crop_ratio=(0.5, 2.0))
    n = 3000
    box = draw_views(config, 0, "view", np.arange(n), sizes(n, height, width)).box.double().numpy()
    assert (box >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= 1 + 1e-6).all()
    area = box[:, 2] * box[:, 3]
    ratio = box[:, 3] * width / (box[:, 2] * height)
    assert area.min() >= 0.2 - 1e-5
    assert area.max() <= 0.9 + 1e-5
    assert ratio.min() >= 0.5 - 1e-4
    assert ratio.max() <= 2.0 + 1e-4

    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=(0.2, 0.9), ratio=(0.5, 2.0))
    blank = torch.empty(3, height, width)
    drawn = [transform.make_params([blank]) for _ in range(n)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn], dtype=np.float64)
    theirs /= [height, width, height, width]
    quantiles = [0.1, 0.3, 0.5, 0.7, 0.9]
    for mine, other in [*zip(box.T, theirs.T, strict=True), (area, theirs[:, 2] * theirs[:, 3])]:
        np.testing.assert_allclose(np.quantile(mine, quantiles), np.quantile(other, quantiles), atol=0.035)


def test_crop_falls_back_to_the_largest_centred_box() -> None:
    config = Augmentation(crop_scale=(1.0, 1.0))
    true_sizes = np.array([[40, 400], [400, 40], [90, 100]], np.float32)
    box = draw_views(config, 0, "view", np.arange(3), true_sizes).box
    side = 40 * (4 / 3) / 400
    expected = [[0, (1 - side) / 2, 1, side], [(1 - side) / 2, 0, side, 1], [0, 0, 1, 1]]
    close(box, torch.tensor(expected), 1e-6)


def test_full_scale_and_square_ratio_is_the_whole_image() -> None:
    config = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    box = draw_views(config, 0, "view", np.arange(20), sizes(20, 33, 33)).box
    close(box, torch.tensor([0.0, 0, 1, 1]).expand(20, 4), 1e-6)


def test_crop_is_never_thinner_than_a_pixel() -> None:
    config = Augmentation(crop_scale=(1e-9, 1e-9))
    box = draw_views(config, 0, "view", np.arange(200), sizes(200, 8, 16)).box
    assert (box[:, 2:] * torch.tensor([8, 16]) >= 1 - 1e-6).all()
    out = Views(config, 8)(random_images(200, 16, 16), whole(200)._replace(box=box))
    assert out.isfinite().all()


def test_crop_of_a_squeezed_image_keeps_its_true_aspect() -> None:
    config = Augmentation(crop_ratio=(1.0, 1.0), crop_scale=(0.1, 0.2))
    box = draw_views(config, 0, "view", np.arange(100), sizes(100, 120, 480)).box
    close(box[:, 2] * 120, box[:, 3] * 480, 1e-3)


def test_center_view_is_the_largest_true_square() -> None:
    true_sizes = np.array([[100, 200], [300, 150], [64, 64]], np.float32)
    expected = torch.tensor([[0, 0.25, 1, 0.5], [0.25, 0, 0.5, 1], [0, 0, 1, 1]])
    close(center_views(true_sizes).box, expected, 1e-6)
    images = random_images(3, 32, 32)
    # Under a config of everything the evaluation's parameters still change nothing.
    plain = Views(Augmentation(), 32)(images, center_views(true_sizes))
    close(Views(EVERYTHING, 32)(images, center_views(true_sizes)), plain, TOLERANCE)


def test_rates_and_ranges() -> None:
    n = 20000
    config = Augmentation(
        horizontal_flip=0.3,
        color_jitter=0.8,
        color_jitter_probability=0.6,
        grayscale=0.2,
        gaussian_blur=0.4,
        solarization=0.1,
    )
    p = draw_views(config, 0, "view", np.arange(n), sizes(n))
    jittered = (p.jitter != torch.tensor(NEUTRAL)).any(dim=1)
    blurred = p.blur_sigma > 0
    rates = ((p.flip, 0.3), (jittered, 0.6), (p.grayscale, 0.2), (blurred, 0.4), (p.solarize, 0.1))
    for happened, rate in rates:
        assert abs(happened.float().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    drawn = [*p.jitter[jittered].unbind(1), p.blur_sigma[blurred]]
    for values, (low, high) in zip(drawn, [*3 * [(0.2, 1.8)], (-0.2, 0.2), (0.1, 2.0)], strict=True):
        quantiles = torch.linspace(0, 1, 11)
        expected = low + (high - low) * quantiles
        close(torch.quantile(values, quantiles), expected, 0.03 * (high - low))
        assert values.min() >= low - 1e-6
        assert values.max() <= high + 1e-6
    decisions = torch.stack([p.flip, jittered, p.grayscale, blurred, p.solarize, p.box[:, 0]]).double()
    for independent in (decisions, p.jitter[jittered].T):
        assert torch.corrcoef(independent).fill_diagonal_(0).abs().max() < 0.04


def test_nothing_is_drawn_where_the_config_gives_nothing() -> None:
    p = draw_views(Augmentation(horizontal_flip=0.0), 0, "view", np.arange(50), sizes(50))
    assert not p.flip.any()
    assert (p.jitter == torch.tensor(NEUTRAL)).all()
    assert not p.grayscale.any()
    assert not p.blur_sigma.any()
    assert not p.solarize.any()
    full = draw_views(
        Augmentation(horizontal_flip=1.0, grayscale=1.0, gaussian_blur=1.0, blur_sigma=(0.7, 0.7), solarization=1.0),
        0,
        "view",
        np.arange(50),
        sizes(50),
    )
    assert full.flip.all()
    assert full.grayscale.all()
    assert full.solarize.all()
    close(full.blur_sigma, torch.full((50,), 0.7), 1e-6)
