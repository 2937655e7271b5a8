"""Every way that is fast computes what the plain way does, forward and backward; the plain ways are written here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hjepa.build import create_hjepa_from_config
from hjepa.checkpoint import load_newest
from hjepa.config import Config, load_config
from hjepa.config.sections import Masking, SIGReg
from hjepa.data.decode import decode
from hjepa.errors import ConfigError
from hjepa.grid import Grid, cells, pool, sine_positions
from hjepa.masks import BlockMasks, Masks
from hjepa.memory import synthetic_batch
from hjepa.model.backbone import build_backbone
from hjepa.model.encoder import TargetEncoder, build_encoders, follow
from hjepa.model.hjepa import HJEPA
from hjepa.model.predictor import Predictor
from hjepa.model.whitening import FLOOR, NUM_PATCHES, whitened_filters
from hjepa.objective import Objective, covariance, gaussianity, invariance, variance
from hjepa.optim import build_optimizers, parameter_groups
from hjepa.rng import uniform
from hjepa.selfcheck import verify_compiler
from hjepa.train import train

ROPE = ("model.rope.use_rope=true", "model.use_layerscale=true", "model.layerscale_init=0.5")
encoders = pytest.mark.parametrize("kind", [(), ROPE], ids=["vit", "rotary"])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(module: nn.Module, by: float = 0.3) -> nn.Module:
    """The module with noise on its weights: as they start, attention is nearly even and most biases are 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Results(NamedTuple):
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def assert_near(found: Results, expected: Results, apart: float) -> None:
    """Each tensor differs by at most a share of its own norm; one that is all rounding, of the largest of its kind."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        largest = max(float(x.norm()) for x in theirs.values())
        assert 0 < largest < float("inf")
        for name, value in theirs.items():
            assert mine[name].shape == value.shape, name
            difference = float((mine[name].double() - value.double()).norm())
            assert difference <= apart * max(float(value.norm()), 1e-3 * largest), name


# The optimizer and the slow average


@pytest.mark.parametrize("words", [(), ("training.betas=[0.7,0.9]", "training.eps=0.001")], ids=str)
def test_fused_adamw_moves_as_the_loop_over_parameters_does(small: tuple[str, ...], words: tuple[str, ...]) -> None:
    config = load_config(None, (*small, "training.optimizer=adamw", "training.weight_decay=0.1", *words)).training
    model = create_hjepa_from_config(load_config(None, (*small, "loss.type=sigreg")))
    twin = deepcopy(model)
    (fast,) = build_optimizers(config, model)
    plain = torch.optim.AdamW(
        parameter_groups(twin, 0.1), lr=config.lr, betas=config.betas, eps=config.eps, fused=False, foreach=False
    )
    pairs = [(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True) if p.requires_grad]
    for step in range(6):
        for optimizer in (fast, plain):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
        for number, (p, q) in enumerate(pairs):
            # Of all sizes, so that eps counts for some.
            p.grad = noise(*p.shape, seed=100 * step + number, dtype=torch.float32) * 10.0 ** (number % 9 - 6)
            q.grad = p.grad.clone()
        fast.step()
        plain.step()
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(fast.state[p][moment], plain.state[q][moment], rtol=1e-5, atol=0)


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_the_slow_average_moves_as_a_loop_over_parameters_does(small: tuple[str, ...], on_device: bool) -> None:
    config = load_config(None, small)
    context, target = build_encoders(config.model, config.data.image_size)
    assert isinstance(target, TargetEncoder)
    shaken(target, 1.0)
    expected = [p.detach().double() for p in target.parameters()]
    for step, momentum in enumerate((0.9, 0.0, 0.3, 0.996, 1.0, 0.5, 0.9999)):
        with torch.no_grad():
            for number, p in enumerate(context.parameters()):
                p.copy_(noise(*p.shape, seed=1000 * step + number))
        target.update(context, torch.tensor(momentum) if on_device else momentum)
        for slow, p in zip(expected, context.parameters(), strict=True):
            slow.mul_(momentum).add_(p.detach().double(), alpha=1 - momentum)
        for p, slow in zip(target.parameters(), expected, strict=True):
            torch.testing.assert_close(p.double(), slow, rtol=0, atol=2e-6)


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 1.0])
def test_an_average_in_three_operations_over_all_tensors_is_that_in_one(weight: float) -> None:
    shapes = ((5, 3), (7,), (2, 3, 4))
    fast = [noise(*shape, seed=n).float() for n, shape in enumerate(shapes)]
    one, three = ([noise(*shape, seed=9 + n).float() for n, shape in enumerate(shapes)] for _ in range(2))
    before = [x.clone() for x in one]
    follow(one, fast, torch.tensor(weight), in_batches=False)
    follow(three, fast, torch.tensor(weight), in_batches=True)
    for a, b, x, y in zip(one, three, before, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, x + weight * (y - x), rtol=0, atol=1e-6)
        assert torch.equal(b, x) is (weight == 0)


# Dropped patches


@encoders
@pytest.mark.parametrize("kept", [1, 6, 16])
def test_dropping_patches_is_timms_blocks_on_all_of_them_where_nobody_looks_at_the_hidden(
    small: tuple[str, ...], kind: tuple[str, ...], kept: int
) -> None:
    config = load_config(None, (*small, *kind))
    backbone = shaken(build_backbone(config.model, 32)).double().eval()
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(3)])[:, :kept]
    of_last, of_tap = noise(3, kept, 32, seed=1), noise(3, kept, 32, seed=2)

    def run(plain: bool) -> Results:
        images = noise(3, 3, 32, 32).requires_grad_()
        if plain:
            vit = backbone.vit
            tokens, more = vit.patch_embed(images), {}
            if kind:
                more = {"rope": vit.rope.get_embed()}
            else:
                tokens = tokens + vit.pos_embed
            visible = torch.zeros(3, 16, dtype=torch.bool).scatter(1, keep, True)
            mask = visible[:, None, None, :].expand(-1, 1, 16, -1)
            taps = []
            for block in vit.blocks:
                tokens = block(tokens, attn_mask=mask, **more)
                taps.append(tokens)
            places = keep[:, :, None].expand(-1, -1, 32)
            last, tap = vit.norm(tokens).gather(1, places), taps[1].gather(1, places)
        else:
            encoded = backbone(images, keep=keep, taps=(2,))
            last, tap = encoded.tokens, encoded.taps[0]
        backbone.zero_grad()
        ((last * of_last).sum() + (tap * of_tap).sum()).backward()
        assert images.grad is not None
        outputs = {"last": last.detach(), "tap": tap.detach()}
        return Results(outputs, {"pixels": images.grad, **gradients(backbone)})

    assert_near(run(plain=False), run(plain=True), 1e-10)


# Attention


def step_of(config: Config, dtype: torch.dtype, amp: bool, compiled: bool = False) -> Results:
    """Predictions, loss and gradients of a batch of noise."""
    model = shaken(create_hjepa_from_config(config), 0.2).to(dtype).train()
    assert isinstance(model, HJEPA)
    if compiled:
        model.compile_blocks()
    _, masks, _ = synthetic_batch(config, 6, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = model(noise(2, 6, 3, 64, 64).to(dtype), masks)
        loss = Objective(config.loss, config.model.num_hierarchies, model.taps)(output, 0).total
    loss.backward()
    fused = config.model.use_flash_attention
    layers = [*model.context_encoder.backbone.attention.layers, *model.predictor.attention.layers]  # type: ignore[union-attr]
    assert layers
    assert all(layer.fused_attn is fused for layer in layers)
    levels = {f"prediction of level {level}": p.detach() for level, p in enumerate(output.predictions)}
    return Results({**levels, "loss": loss.detach()}, gradients(model))


# In float64 tests/model/test_attention.py holds three of the four against each other.
@pytest.mark.parametrize(
    ("amp", "rope", "attention", "apart"),
    [
        (True, "false", "self", 0.03),
        (True, "true", "self", 0.03),
        (True, "false", "cross", 0.03),
        (True, "true", "cross", 0.03),
        (False, "true", "cross", 1e-5),
    ],
)
def test_fused_and_explicit_attention_agree_to_the_rounding_of_their_arithmetic(
    small: tuple[str, ...], amp: bool, rope: str, attention: str, apart: float
) -> None:
    words = (f"model.rope.use_rope={rope}", f"model.predictor.attention={attention}", "model.predictor.depth=2")
    words += ("data.num_views=2", "model.predictor.num_heads=2")  # no image level: its batch norm magnifies rounding
    found, expected = (
        step_of(load_config(None, (*small, *words, f"model.use_flash_attention={fused}")), torch.float32, amp)
        for fused in ("true", "false")
    )
    assert_near(found, expected, apart)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "words", "amp", "apart"),
    [("self", (), False, 1e-5), ("cross", ROPE, False, 1e-5), ("self", (), True, 0.03)],
    ids=["float32", "rotary, cross-attention", "bfloat16"],
)
def test_compiled_blocks_compute_what_they_did(
    small: tuple[str, ...], attention: str, words: tuple[str, ...], amp: bool, apart: float
) -> None:
    needs_compiler()
    more = (f"model.predictor.attention={attention}", "model.use_flash_attention=false", "data.num_views=2")
    config = load_config(None, (*small, *more, *words))
    assert_near(step_of(config, torch.float32, amp, compiled=True), step_of(config, torch.float32, amp), apart)


def test_probes_of_a_compiled_model_are_computed_as_before_and_compile_nothing(small: tuple[str, ...]) -> None:
    from torch._dynamo.utils import counters

    config = load_config(None, (*small, "model.num_hierarchies=2", "model.fpn.use_fpn=true"))
    model, images = create_hjepa_from_config(config), noise(3, 3, 64, 64).float()

    def probed() -> list[Tensor]:
        maps = model.maps(images)
        assert "fpn" in maps
        return [*model.embed(images).values(), *maps.values(), model.patches(images, online=True)]

    expected = probed()
    counters.clear()
    model.compile_blocks()
    assert all(torch.equal(a, b) for a, b in zip(probed(), expected, strict=True))
    assert not counters["stats"]


def needs_compiler() -> None:
    # pytest listens to all loggers; this one then writes down every graph.
    logging.getLogger("torch.__trace").disabled = True
    try:
        verify_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_every_shape_of_a_compiled_run_is_compiled_and_soon_none_is_anew(
    small: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_compiler()
    from torch._dynamo.utils import counters

    words = ("data.multicrop={num_local_crops: 1, local_crop_size: 32}", "data.num_views=2", "loss.type=sigreg")
    words += ("masking.mask_scale=[0.06,0.25]", "model.drop_path_rate=0.2", "data.image_size=96", "training.epochs=4")
    words += ("training.use_compile=true", "training.use_gradient_checkpointing=encoder", "evaluation.linear=false")
    graphs = []
    for steps in (12, 32):
        limits = (f"training.max_steps={steps}", f"experiment.output_dir={tmp_path}")
        config = load_config(None, (*small, *words, *limits))
        torch._dynamo.reset()
        counters.clear()
        train(config, resume=steps > 12)
        graphs.append(counters["stats"]["unique_graphs"])
    # Blocks of 3 dropping rates in training; of one in each of the rest.
    assert graphs[0] > 8
    assert graphs[1] <= graphs[0] + 2  # a shape that the first dozen of steps had not
    assert not counters["unimplemented"], counters["unimplemented"]
    assert "recompile_limit" not in capfd.readouterr().err


@pytest.mark.slow
def test_blocks_are_compiled_whole_among_processes_too(small: tuple[str, ...]) -> None:
    needs_compiler()
    from torch._dynamo.utils import counters

    # Blocks that fill more than the first bucket of gradients, a mebibyte.
    config = load_config(None, (*small, "model.embed_dim=192", "loss.type=smoothl1", "model.num_hierarchies=1"))
    batch = synthetic_batch(config, 2, torch.device("cpu"))
    graphs = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for among in (False, True):
            torch._dynamo.reset()
            counters.clear()
            model = create_hjepa_from_config(config)
            model.compile_blocks()
            output = (nn.parallel.DistributedDataParallel(model) if among else model)(*batch)
            Objective(config.loss, model.num_levels, model.taps)(output, 0).total.backward()
            graphs.append(counters["aot_autograd"]["total"])
    finally:
        dist.destroy_process_group()
    assert graphs[0] == graphs[1] > 0


@pytest.mark.slow
def test_a_compiled_run_repeats_itself_with_dropped_paths_and_blocks_computed_twice(
    small: tuple[str, ...], tmp_path: Path
) -> None:
    needs_compiler()
    weights = []
    for name, again in (("a", "false"), ("b", "false"), ("c", "true")):
        words = ("training.use_compile=true", "model.drop_path_rate=0.3", "training.max_steps=3", "training.lr=0.01")
        more = (f"training.use_gradient_checkpointing={again}", "evaluation.eval_frequency=0")
        train(load_config(None, (*small, *words, *more, f"experiment.output_dir={tmp_path / name}")))
        saved, _ = load_newest(tmp_path / name / "checkpoints")
        assert saved is not None
        weights.append(saved.weights)
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
        torch.testing.assert_close(weights[2][name], value, rtol=1e-4, atol=1e-5)


CROSS = (
    "model.predictor.attention=cross",
    "model.predictor.depth=3",
    "model.predictor.num_heads=4",
    "model.num_hierarchies=2",
    "masking.num_masks=3",
)


def predictor_of(small: tuple[str, ...], *words: str) -> tuple[Predictor, Masks]:
    config = load_config(None, (*small, *CROSS, *words))
    predictor = create_hjepa_from_config(config).predictor
    assert predictor is not None
    shaken(predictor).double()
    return predictor, synthetic_batch(config, 3, torch.device("cpu"))[1]


def plain_prediction(predictor: Predictor, context: Tensor, masks: Masks, level: int) -> Tensor:
    """One level of one hidden block: each transformer block makes its own keys and values, a head at a time."""
    dim, depth, width = predictor.dim, len(predictor.blocks), predictor.dim // predictor.num_heads
    seen = predictor.context_norm(predictor.embed(context) + predictor.positions[masks.context])  # type: ignore[misc]
    weights = predictor.context_keys.weight.unflatten(0, (depth, 2, dim))  # type: ignore[union-attr]
    biases = predictor.context_keys.bias.unflatten(0, (depth, 2, dim))  # type: ignore[union-attr]
    h, w = masks.targets.shape[2:]
    centres = sine_positions(pool(predictor.grid.coordinates(masks.targets), level), dim).double()
    x = predictor.queries[level] + centres.flatten(1, 3)
    for number, block in enumerate(predictor.blocks):
        key, value = (F.linear(seen, weights[number, i], biases[number, i]) for i in (0, 1))
        query = block.query(block.norm1(x))
        heads = []
        for head in range(predictor.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[..., part] @ key[..., part].mT / width**0.5
            heads.append(scores.softmax(-1) @ value[..., part])
        x = x + block.proj(torch.cat(heads, dim=-1))
        x = x + block.mlp(block.norm2(x))
    out = predictor.heads[level](predictor.norm(x))
    return out.reshape(len(context), 1, *cells(h, w, level), -1, predictor.target_dim)


def alone(masks: Masks, number: int) -> Masks:
    return Masks(masks.context, masks.targets[:, number : number + 1])


def predicted(predictor: Predictor, masks: Masks, predict: Callable[[Tensor], Sequence[Tensor]]) -> Results:
    """All levels of one way to predict, and the gradients of a weighted sum of them."""
    context = noise(3, masks.context.shape[1], 32).requires_grad_()
    levels = predict(context)
    predictor.zero_grad()
    torch.stack([(p * noise(*p.shape, seed=7)).sum() for p in levels]).sum().backward()
    assert context.grad is not None
    named = {f"level {level}": p.detach() for level, p in enumerate(levels)}
    return Results(named, {"context": context.grad, **gradients(predictor)})


@pytest.mark.parametrize("fused", ["true", "false"])
def test_keys_and_values_in_one_product_are_those_of_each_block_on_its_own(small: tuple[str, ...], fused: str) -> None:
    predictor, masks = predictor_of(small, f"model.use_flash_attention={fused}")

    def plain(context: Tensor) -> list[Tensor]:
        return [
            torch.cat([plain_prediction(predictor, context, alone(masks, m), level) for m in range(3)], dim=1)
            for level in range(2)
        ]

    found = predicted(predictor, masks, lambda context: predictor(context, masks))
    assert_near(found, predicted(predictor, masks, plain), 1e-6)


@pytest.mark.parametrize(
    "fpn", [(), ("model.fpn.use_fpn=true",), ("model.fpn.use_fpn=true", "model.fpn.fusion_method=concat")], ids=str
)
def test_hidden_blocks_in_one_pass_are_predicted_as_in_a_pass_each(
    small: tuple[str, ...], fpn: tuple[str, ...]
) -> None:
    predictor, masks = predictor_of(small, *fpn)

    def plain(context: Tensor) -> list[Tensor]:
        passes = [predictor(context, alone(masks, m)) for m in range(3)]
        return [torch.cat(parts, dim=1) for parts in zip(*passes, strict=True)]

    found = predicted(predictor, masks, lambda context: predictor(context, masks))
    assert_near(found, predicted(predictor, masks, plain), 1e-10)


# The objective


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize(
    "words",
    [(), ("loss.type=combined", "data.multicrop.num_local_crops=2"), ("model.use_target_encoder=false",)],
    ids=str,
)
def test_predicting_every_kth_image_is_the_step_on_these_and_the_image_level_of_all(
    small: tuple[str, ...], every: int, words: tuple[str, ...]
) -> None:
    settings = (*small, "loss.type=sigreg", "data.num_views=2", *words)
    config = load_config(None, settings)
    plain = shaken(create_hjepa_from_config(config), 0.1)
    if plain.target_encoder is not None:
        shaken(plain.target_encoder, 0.05)
    thrifty = create_hjepa_from_config(load_config(None, (*settings, f"loss.predict_every={every}")))
    thrifty.load_state_dict(plain.state_dict())
    batch = 7  # not a multiple of k
    _, masks, crops = synthetic_batch(config, batch, torch.device("cpu"))
    images = noise(2, batch, 3, 64, 64)
    crops = None if crops is None else noise(*crops.shape, seed=1)
    rows = torch.tensor([view * batch + image for view in range(2) for image in range(0, batch, every)])

    def loss(model: HJEPA, of: Tensor, where: Masks, **section: object) -> Tensor:
        objective = Objective(config.loss.model_copy(update=section), 2, model.taps)
        total: Tensor = objective(model(of, where, crops if of is images else None), 3).total
        return total

    results = []
    for model in (thrifty.double().train(), plain.double().train()):
        if model is thrifty:
            total = loss(model, images, masks)
        else:
            silent = {
                "sigreg": config.loss.sigreg.model_copy(update={"weight": 0.0}),
                "vicreg": config.loss.vicreg.model_copy(update={"weight": 0.0}),
            }
            total = loss(model, images[:, ::every], Masks(masks.context[rows], masks.targets[rows]), **silent)
            total = total + loss(model, images, masks, hierarchy_weights=(0.0, 0.0))
        total.backward()
        results.append(Results({"loss": total.detach()}, gradients(model)))
    assert_near(*results, 1e-5)


@pytest.mark.parametrize(("knots", "end"), [(3, 2.0), (17, 3.0), (24, 5.0)])
def test_half_the_interval_of_the_characteristic_function_is_all_of_it(knots: int, end: float) -> None:
    slices, dim = 4, 6
    views = (noise(2, 9, dim, dtype=torch.float32) * 1.3 + 0.4).requires_grad_()
    found = gaussianity(views, SIGReg(num_slices=slices, num_knots=knots, t_max=end), 11)
    (gradient,) = torch.autograd.grad(found, views)

    plain = views.detach().double().requires_grad_()
    directions = torch.randn(dim, slices, generator=torch.Generator().manual_seed(11)).double()
    spacing = end / (knots - 1)
    total = torch.zeros((), dtype=torch.float64)
    for view in plain:
        for s in range(slices):
            shadow = view @ (directions[:, s] / directions[:, s].norm())
            for k in range(1 - knots, knots):
                t = k * spacing
                normal = float(np.exp(-(t**2) / 2))
                off = torch.exp(1j * t * shadow).mean() - normal
                area = spacing / 2 if abs(k) == knots - 1 else spacing
                total = total + len(view) * (off * off.conj()).real * normal * area
    expected = total / (len(plain) * slices)
    (wanted,) = torch.autograd.grad(expected, plain)
    assert_near(
        Results({"loss": found.detach()}, {"views": gradient}),
        Results({"loss": expected.detach()}, {"views": wanted}),
        1e-5,
    )


def plain_invariance(views: Tensor) -> Tensor:
    pairs = [F.mse_loss(a, b) for a, b in combinations(views, 2)]
    return torch.stack(pairs).mean()


def plain_variance(views: Tensor) -> Tensor:
    hinges = []
    for view in views:
        for column in view.T:
            spread = ((column - column.mean()) ** 2).sum() / (len(column) - 1)
            hinges.append((1 - (spread + 1e-4) ** 0.5).clamp(min=0))
    return torch.stack(hinges).mean()


def plain_covariance(views: Tensor) -> Tensor:
    sums = []
    for view in views:
        count, dim = view.shape
        off = [
            (((view[:, i] - view[:, i].mean()) * (view[:, j] - view[:, j].mean())).sum() / (count - 1)) ** 2 / dim
            for i in range(dim)
            for j in range(dim)
            if i != j
        ]
        sums.append(torch.stack(off).sum())
    return torch.stack(sums).mean()


@pytest.mark.parametrize(
    ("fast", "plain"),
    [(invariance, plain_invariance), (variance, plain_variance), (covariance, plain_covariance)],
    ids=["invariance", "variance", "covariance"],
)
@pytest.mark.parametrize("count", [2, 3])
def test_vicreg_of_all_views_at_once_is_its_formula_in_loops(fast: object, plain: object, count: int) -> None:
    results = []
    for term in (fast, plain):
        # Some dimensions wider than the hinge and some narrower.
        views = (noise(count, 9, 5) * torch.tensor([0.2, 0.6, 0.9, 1.5, 3.0]) + 0.7).requires_grad_()
        loss = term(views)  # type: ignore[operator]
        results.append(Results({"loss": loss.detach()}, {"views": torch.autograd.grad(loss, views)[0]}))
    assert_near(*results, 1e-10)


# Data


def plain_masks(sampler: BlockMasks, config: Masking, step: int, stream: str, position: int) -> tuple[list, list]:
    """Masks of one image: a block after another, and the context by sorting all of the noise."""
    (h, w), num_context = sampler.geometry(9, step)
    height, width, here = sampler.grid.height, sampler.grid.width, np.asarray([position])
    places = uniform(9, f"{stream}/place", here, 2 * config.num_masks)[0]
    blocks = []
    for m in range(config.num_masks):
        top = int(places[m] * (height - h + 1))
        left = int(places[config.num_masks + m] * (width - w + 1))
        blocks.append([[(top + i) * width + left + j for j in range(w)] for i in range(h)])
    hidden = {patch for block in blocks for row in block for patch in row}
    keys = uniform(9, f"{stream}/context", here, height * width)[0]
    order = [patch for patch in np.argsort(keys, kind="stable").tolist() if patch not in hidden]
    return sorted(order[:num_context]), blocks


@pytest.mark.parametrize("grid", [Grid(8, 8), Grid(6, 10), Grid(32, 32)], ids=str)
@pytest.mark.parametrize("num_masks", [0, 1, 4])
def test_masks_drawn_together_are_those_of_each_image_sorted_whole(grid: Grid, num_masks: int) -> None:
    config = Masking(num_masks=num_masks, context_scale=(0.5, 0.9))
    sampler = BlockMasks(config, grid, 1)
    positions = np.asarray([0, 1, 5, 77, 10**6, 10**12])
    for step in (0, 3):
        for stream in ("view0", "view1"):
            masks = sampler.sample(9, step, stream, positions)
            for row, position in enumerate(positions):
                context, blocks = plain_masks(sampler, config, step, stream, int(position))
                assert masks.context[row].tolist() == context
                assert masks.targets[row].tolist() == blocks


@pytest.mark.parametrize(("count", "share"), [(1563, 2), (3200, 3)])
def test_filters_whitened_on_a_share_of_the_patches_are_near_those_of_all(count: int, share: int) -> None:
    # Blurred, and each image of a contrast and a colour of its own.
    images = F.avg_pool2d(noise(count, 3, 35, 35, dtype=torch.float32), 4, stride=1)
    images = images * (0.3 * noise(count, 1, 1, 1, seed=1, dtype=torch.float32)).exp() * 2
    images = images + noise(count, 3, 1, 1, seed=2, dtype=torch.float32) * 0.5 + 1
    assert -(-count * 64 // NUM_PATCHES) == share
    weight, bias = whitened_filters(images, 4, 24, seed=5)

    patches = images.unflatten(2, (8, 4)).unflatten(4, (8, 4)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48).double()
    mean = patches.mean(dim=0)
    covariances = (patches - mean).T @ (patches - mean) / len(patches)
    held = covariances + FLOOR * covariances.trace() / 48 * torch.eye(48, dtype=torch.float64)
    values, vectors = np.linalg.eigh(held.numpy())
    root = torch.from_numpy(vectors / np.sqrt(values) @ vectors.T)
    directions = torch.randn(24, 48, generator=torch.Generator().manual_seed(5)).double()
    expected = directions / directions.norm(dim=1, keepdim=True) @ root
    found = weight.flatten(1).double()
    assert F.cosine_similarity(found, expected).min() > 0.999
    torch.testing.assert_close(found.norm(dim=1), expected.norm(dim=1), rtol=0.01, atol=0)
    assert (found @ mean + bias.double()).abs().max() < 0.02  # of outputs whose deviation is nearly 1


def photo(height: int, width: int) -> Image.Image:
    """Texture of the power that photos have at each frequency, and edges."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    common, own = generator.standard_normal((1, height, width)), generator.standard_normal((3, height, width))
    texture = np.fft.ifft2(np.fft.fft2(0.7 * common + 0.3 * own) / frequency).real
    y, x = np.mgrid[:height, :width]
    edges = np.where((x // 37 + y // 53) % 5 == 0, 60, 0)
    pixels = texture / texture.std() * 45 + 128 + edges
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


# What is decoded at a fraction differs most where that is hardly more than what is wanted: nothing is left to filter.
@pytest.mark.parametrize(
    ("name", "height", "width", "side", "fraction", "apart"),
    [
        ("x.png", 1021, 1403, 48, 1, 0.03),
        ("x.png", 521, 443, 20, 1, 0.045),
        ("x.jpg", 1021, 1403, 48, 8, 0.04),
        ("x.jpg", 1021, 1403, 100, 8, 0.1),
        ("x.jpg", 521, 443, 50, 8, 0.15),
        ("x.jpg", 521, 443, 96, 4, 0.12),
        ("x.jpg", 323, 401, 128, 2, 0.1),
        ("x.jpg", 129, 145, 16, 8, 0.15),  # where a part of a pixel at the border is much of the image
        ("x.jpg", 129, 145, 32, 4, 0.15),
    ],
)
def test_a_textured_photo_reduced_on_the_way_is_the_whole_one_filtered(
    tmp_path: Path, name: str, height: int, width: int, side: int, fraction: int, apart: float
) -> None:
    path = tmp_path / name
    photo(height, width).save(path, quality=90)
    with Image.open(path) as image:
        image.draft(None, (side, side))
        assert image.size == (-(-width // fraction), -(-height // fraction))
    with Image.open(path) as image:
        whole = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float64)
    difference = decode(path, side)[0].transpose(1, 2, 0) - whole
    assert np.sqrt((difference**2).mean()) < apart * whole.std()
    assert abs(difference.mean()) < 0.3


KEEPING = """
import json, sys
from pathlib import Path
import torch
import hjepa.fabric
from hjepa.config import load_config
from hjepa.train import train

torch.set_num_threads(1)
keep, told = hjepa.fabric.keep_freed_memory, []
hjepa.fabric.keep_freed_memory = lambda: told.append(sys.argv[1] == "keep" and keep())
train(load_config(None, sys.argv[2:]))
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="told to glibc alone")
def test_a_run_that_keeps_what_it_frees_learns_exactly_as_one_that_does_not(
    small: tuple[str, ...], tmp_path: Path
) -> None:
    lines = []
    for word in ("keep", "give back"):
        folder = tmp_path / word
        settings = ("training.max_steps=4", "evaluation.eval_frequency=0", "loss.type=sigreg", "data.num_views=2")
        command = [sys.executable, "-c", KEEPING, word, *small, *settings, f"experiment.output_dir={folder}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ, check=True)
        told = json.loads(ended.stdout.splitlines()[-1])
        if word == "keep" and told == [False]:
            pytest.skip("this C library cannot be told")
        assert told == [word == "keep"]
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        lines.append([{k: v for k, v in r.items() if k.startswith(("loss", "grad_norm", "rankme"))} for r in records])
    kept, given_back = ([line for line in record if "loss" in line] for record in lines)
    assert len(kept) == 4
    assert kept == given_back
