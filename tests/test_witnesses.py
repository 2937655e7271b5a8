"""No dead knob: every setting of the schema has a witness, which shows that changing it does what it says.

A witness is a small demonstration under the setting's name. A setting without one fails here, and so does a witness
whose setting is gone. To add a setting, add `@witness("its.key")`.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL
from layouts import write_cifar, write_stl10
from PIL import Image
from torch import Tensor, nn

from hjepa import checkpoint
from hjepa.build import create_hjepa_from_config, grid_of, run_path
from hjepa.config import Config, load_config
from hjepa.config.data import Augmentation
from hjepa.config.walk import leaves
from hjepa.console import Console
from hjepa.data import archives
from hjepa.data.loader import Batch, Batches
from hjepa.data.source import Source
from hjepa.data.sources import CachedSource, open_training
from hjepa.data.views import Views, center_views
from hjepa.data.workers import Loader
from hjepa.device import KINDS, autocasts, available
from hjepa.errors import ConfigError, DataError, DivergedError
from hjepa.evaluate import build_evaluator, probe
from hjepa.evaluation.evaluator import Evaluator
from hjepa.fabric import open_fabric
from hjepa.masks import BlockMasks
from hjepa.measure import Measured, measure_run
from hjepa.memory import synthetic_batch
from hjepa.model.hjepa import HJEPA, Output
from hjepa.objective import Losses, Objective, agreement, covariance, gaussianity, invariance, variance
from hjepa.optim import Schedules
from hjepa.run import Run, build
from hjepa.step import take_step
from hjepa.train import train

CPU = torch.device("cpu")
KEYS = [leaf.key for leaf in leaves()]
WITNESSES: dict[str, Callable[..., None]] = {}


def witness(key: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The function shows what the setting does; its parameters are fixtures."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        assert key not in WITNESSES, f"{key} has two witnesses"
        WITNESSES[key] = function
        return function

    return register


def test_every_setting_has_a_witness_and_every_witness_a_setting() -> None:
    assert sorted(set(KEYS) - set(WITNESSES)) == [], "settings that nothing shows to do anything"
    assert sorted(set(WITNESSES) - set(KEYS)) == [], "witnesses of settings that are gone"


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_does_what_it_says(key: str, request: pytest.FixtureRequest) -> None:
    assert key in WITNESSES, f"{key} has no witness"
    function = WITNESSES[key]
    function(**{name: request.getfixturevalue(name) for name in inspect.signature(function).parameters})


def deaf(section: Any, key: str) -> Any:
    """The same config in which this setting stays at its default, whatever was said."""
    name, _, rest = key.partition(".")
    if name.endswith("[]"):
        entries = getattr(section, name.removesuffix("[]"))
        return section.model_copy(update={name.removesuffix("[]"): tuple(deaf(entry, rest) for entry in entries)})
    if rest:
        return section.model_copy(update={name: deaf(getattr(section, name), rest)})
    field = type(section).model_fields[name]
    return section.model_copy(update={name: "shapes" if field.is_required() else field.default})


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_that_is_not_listened_to_is_noticed(
    key: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A witness that says the same of a dead setting shows nothing."""
    real = load_config
    monkeypatch.setitem(globals(), "load_config", lambda *args: deaf(real(*args), key))
    with pytest.raises((Exception, pytest.fail.Exception)):
        test_a_setting_does_what_it_says(key, request)


# Means


def config_of(*overrides: str) -> Config:
    """The small config of the tests, changed."""
    return load_config(None, (*SMALL, *overrides))


def model_of(*overrides: str) -> HJEPA:
    """Its model."""
    return create_hjepa_from_config(config_of(*overrides))


def inputs_of(*overrides: str) -> tuple[Any, ...]:
    """Noise and true masks, as its model takes them."""
    torch.manual_seed(0)
    return synthetic_batch(config_of(*overrides), 4, CPU)


def output_of(*overrides: str) -> Output:
    """What its model makes of `inputs_of`, in training mode."""
    output: Output = model_of(*overrides).train()(*inputs_of(*overrides))
    return output


@cache
def fixed_output() -> Output:
    """One output for all losses: embeddings of three views, two of them global."""
    embeddings = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.2
    return output_of()._replace(embeddings=embeddings, num_global=2)


def losses_of(*overrides: str, seed: int = 0, **fields: Any) -> Losses:
    """The losses of `fixed_output`, some of its fields changed."""
    config = config_of(*overrides)
    objective = Objective(config.loss, config.model.num_hierarchies, model_of().taps)
    return objective(fixed_output()._replace(**fields), seed)


def batches_of(*overrides: str) -> Batches:
    """Its batches, from its sources."""
    config = config_of(*overrides)
    masks = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    sources = open_training(config.data, config.experiment.seed)
    return Batches(config.data, sources, masks, config.experiment.seed, config.training.accumulation_steps)


RAW = ("data.augmentation.mean=[0,0,0]", "data.augmentation.std=[1,1,1]")


def views_of(*overrides: str, step: int = 0) -> Tensor:
    """The views of a batch as the model sees them; `RAW` leaves out the normalisation."""
    config = config_of(*overrides)
    return batches_of(*overrides)[step].render(Views(config.data.augmentation, config.data.image_size))


def drawn(field: str, *overrides: str) -> Tensor:
    """What was drawn for the views of 256 images."""
    large = ("data.datasets=[{name: shapes, length: 256}]", "data.batch_size=256")
    batch = batches_of(*large, *overrides)[0]
    values: Tensor = getattr(batch.views[0], field)
    return values


def schedules_of(*overrides: str) -> Schedules:
    """Its schedules, with 8 steps in an epoch and 4 epochs."""
    config = config_of(*overrides)
    return Schedules(config.training, config.model.ema, 8)


def built(*overrides: str) -> Run:
    """All of a run but its folder."""
    config = config_of("evaluation.eval_frequency=0", *overrides)
    run = build(config, *open_fabric(config), Console(enabled=False))
    run.schedules = Schedules(config.training, config.model.ema, run.batches.steps_per_epoch)
    return run


def step_of(run: Run, step: int = 0) -> Any:
    """Take one step."""
    loader = iter(Loader(run.batches, step, step + 1, False))
    assert run.schedules is not None
    return take_step(run, run.schedules, step, loader)


class Left(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    lines: list[dict[str, Any]]
    said: str

    @property
    def saved(self) -> list[int]:
        """Steps of the checkpoints that are kept, newest first."""
        return [int(path.name.removeprefix("step-")) for path in checkpoint.find(self.folder / "checkpoints")]

    @property
    def steps(self) -> list[int]:
        """Steps that were written down."""
        return [line["step"] for line in self.lines if "loss" in line]

    @property
    def evaluated(self) -> list[int]:
        """Steps after which the encoder was probed."""
        return [line["step"] for line in self.lines if "eval/knn" in line]


# Two steps in an epoch.
SHORT = ("data.epoch_size=16", "evaluation.eval_frequency=0", "evaluation.linear=false")


def run_of(folder: Path, *overrides: str) -> Left:
    """Train in this folder."""
    said = StringIO()
    with redirect_stdout(said):
        train(config_of(*SHORT, f"experiment.output_dir={folder}", *overrides))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Left(folder, lines, said.getvalue())


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Outputs of these modules, as they are called."""
    seen: list[Any] = []
    hooks = [module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


# The run


@witness("experiment.name")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_path(config_of("experiment.name=other")) == Path("runs/other")
    train(config_of(*SHORT, "experiment.name=mine", "training.max_steps=1"))
    assert checkpoint.find(tmp_path / "runs" / "mine" / "checkpoints")


@witness("experiment.seed")
def _() -> None:
    one, same, other = (f"experiment.seed={seed}" for seed in (1, 1, 2))
    for what in (
        lambda seed: model_of(seed).predictor.queries,  # type: ignore[union-attr]
        lambda seed: torch.from_numpy(batches_of(seed).locate(np.arange(32))[1]),
        lambda seed: torch.from_numpy(batches_of(seed).sources[0].images(np.arange(2))),
        lambda seed: batches_of(seed)[0].views[0].box,
        lambda seed: batches_of(seed)[0].masks.context,
    ):
        assert torch.equal(what(one), what(same))
        assert what(one).shape != what(other).shape or not torch.equal(what(one), what(other))


@witness("experiment.output_dir")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = run_of(Path("there/deep"), "training.max_steps=1")
    assert left.saved == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@witness("device")
def _() -> None:
    for name in ("cuda", "mps", "cpu"):
        if available(name):
            fabric, kind = open_fabric(config_of(f"device={name}"))
            assert (fabric.device.type, kind.name) == (name, name)
        else:
            with pytest.raises(ConfigError, match=f"device: {name} was asked for and this machine has none"):
                open_fabric(config_of(f"device={name}"))
    best = next(name for name in ("cuda", "mps", "cpu") if available(name))
    assert open_fabric(config_of("device=auto"))[0].device.type == best


# The encoder

NAMED = ("model.patch_size=null", "model.embed_dim=null", "model.depth=null", "model.num_heads=null")


def encoder_of(*overrides: str) -> Any:
    """The timm model in the context encoder."""
    return model_of(*overrides).context_encoder.backbone.vit


@witness("model.encoder_type")
def _() -> None:
    vit = encoder_of(*NAMED, "model.encoder_type=vit_tiny_patch16_224", "data.image_size=128")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=128, class_token=False, global_pool="avg")
    assert {n: p.shape for n, p in vit.named_parameters() if "head" not in n and not n.startswith("norm.")}.items() <= {
        n: p.shape for n, p in theirs.named_parameters()
    }.items()
    assert (len(vit.blocks), vit.blocks[0].attn.num_heads) == (12, 3)


@witness("model.patch_size")
def _() -> None:
    for size in (4, 8):
        backbone = model_of(f"model.patch_size={size}").context_encoder.backbone
        assert backbone.vit.patch_embed.proj.kernel_size == backbone.vit.patch_embed.proj.stride == (size, size)
        assert backbone(torch.zeros(1, 3, 64, 64)).tokens.shape[1] == (64 // size) ** 2


@witness("model.embed_dim")
def _() -> None:
    assert [output_of(f"model.embed_dim={dim}").target_tokens.shape[-1] for dim in (32, 48)] == [32, 48]


@witness("model.depth")
def _() -> None:
    for depth in (3, 5):
        model = model_of(f"model.depth={depth}")
        with calls_of(list(model.context_encoder.backbone.vit.blocks)) as calls:
            model(*inputs_of())
        assert len(calls) == depth


@witness("model.num_heads")
def _() -> None:
    for heads in (2, 4):
        assert {block.attn.num_heads for block in encoder_of(f"model.num_heads={heads}").blocks} == {heads}
        assert {block.attn.head_dim for block in encoder_of(f"model.num_heads={heads}").blocks} == {32 // heads}


@witness("model.pretrained")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_tiny_patch16_224"
    donor = timm.create_model(name, img_size=128, num_classes=0)
    asked: list[Any] = []
    released = lambda *args, **kwargs: asked.append((*args, kwargs["pretrained"])) or donor  # noqa: E731
    monkeypatch.setattr("hjepa.model.backbone.timm.create_model", released)
    settings = (*NAMED, f"model.encoder_type={name}", "data.image_size=128")
    own = encoder_of(*settings)
    assert asked == []
    theirs = model_of(*settings, "model.pretrained=true")
    assert asked == [(name, True)]
    for encoder in (theirs.context_encoder, theirs.target_encoder):
        torch.testing.assert_close(encoder.backbone.vit.blocks[7].attn.qkv.weight, donor.blocks[7].attn.qkv.weight)
    assert not torch.equal(own.blocks[7].attn.qkv.weight, donor.blocks[7].attn.qkv.weight)


@witness("model.drop_path_rate")
def _() -> None:
    model = model_of("model.drop_path_rate=0.6").train()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.context_encoder.backbone.vit.blocks]
    assert rates == pytest.approx([0, 0.3, 0.6])
    images, keep = torch.randn(256, 3, 64, 64), torch.arange(4).expand(256, -1)
    entry = torch.zeros(256, 4, 32)
    last = model.context_encoder.backbone.vit.blocks[2]
    nn.init.ones_(last.attn.proj.bias)
    dropped = (last.drop_path1(last.attn(last.norm1(entry))).abs().sum(dim=(1, 2)) == 0).float().mean()
    assert dropped == pytest.approx(0.6, abs=0.15)
    assert model.target_encoder is not None
    twice = [model.target_encoder(images, keep).tokens for _ in range(2)]
    assert torch.equal(*twice)


@witness("model.use_flash_attention")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    for rope in ("model.rope.use_rope=false", "model.rope.use_rope=true"):
        settings = {name: (rope, f"model.use_flash_attention={name}") for name in ("true", "false")}
        for name, setting in settings.items():
            flags = [m.fused_attn for m in model_of(*setting).modules() if hasattr(m, "fused_attn")]
            assert flags == [name == "true"] * (3 + 3 + 1)  # context encoder, target encoder, predictor
        fused, explicit = (output_of(*setting) for setting in settings.values())
        for a, b in zip([*fused.predictions, *fused.targets], [*explicit.predictions, *explicit.targets], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    calls: list[int] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    for name, count in (("false", 0), ("true", 7), ("auto", 7)):
        calls.clear()
        output_of(f"model.use_flash_attention={name}")
        assert len(calls) == count
    # bfloat16 on a CPU is what auto has its own opinion of.
    for name, count in (("false", 0), ("true", 7), ("auto", 0)):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            output_of(f"model.use_flash_attention={name}")
        assert len(calls) == count


@witness("model.use_layerscale")
def _() -> None:
    for rope in ("model.rope.use_rope=false", "model.rope.use_rope=true"):
        names = {name for name, _ in encoder_of(rope).named_parameters()}
        scaled = {name for name, _ in encoder_of(rope, "model.use_layerscale=true").named_parameters()}
        assert len(scaled - names) == 6  # two branches of three blocks
        # A branch that is scaled by nothing leaves a block that does nothing.
        model = model_of(rope, "model.use_layerscale=true", "model.layerscale_init=1e-30").eval()
        backbone = model.context_encoder.backbone
        images = inputs_of()[0][0]
        torch.testing.assert_close(backbone(images, taps=(3,)).taps[0], backbone.embed(images, None)[0])


@witness("model.layerscale_init")
def _() -> None:
    for rope in ("model.rope.use_rope=false", "model.rope.use_rope=true"):
        vit = encoder_of(rope, "model.use_layerscale=true", "model.layerscale_init=0.125")
        scales = [p for name, p in vit.named_parameters() if "gamma" in name]
        assert len(scales) == 6
        assert all((scale == 0.125).all() for scale in scales)


@witness("model.num_hierarchies")
def _() -> None:
    for levels in (1, 2, 3):
        output = output_of(f"model.num_hierarchies={levels}", "masking.mask_scale=[0.25,0.3]", "masking.num_masks=2")
        assert len(output.predictions) == len(output.targets) == levels
        h, w = output.targets[0].shape[2:4]
        assert [t.shape[2:4] for t in output.targets] == [(h >> level, w >> level) for level in range(levels)]


@witness("model.target_layers")
def _() -> None:
    assert model_of().taps == (1, 2, 3)
    setting = "model.target_layers=[1,3]"
    model, (images, masks, _) = model_of(setting), inputs_of()
    output = model(images, masks)
    assert model.taps == (1, 3)
    assert [p.shape[4] for p in output.predictions] == [2, 1]
    with calls_of(list(model.target_encoder.backbone.vit.blocks)) as blocks:  # type: ignore[union-attr]
        model(images, masks)
    assert torch.equal(output.target_taps, torch.stack([blocks[0], blocks[2]], dim=2))


@witness("model.whiten_patches")
def _() -> None:
    for wanted in (False, True):
        run = built(f"model.whiten_patches={str(wanted).lower()}", "data.datasets=[{name: shapes, length: 512}]")
        plain = Views(Augmentation(), 64)
        images = run.batches.sources[0].images(np.arange(256))
        views = plain(torch.from_numpy(images), center_views(np.full((256, 2), 64, np.float32)))
        for encoder in (run.model.context_encoder, run.model.target_encoder):
            assert encoder is not None
            with torch.no_grad():
                out = encoder.backbone.vit.patch_embed(views).flatten(0, 1)
            apart = torch.corrcoef(out.T).abs().fill_diagonal_(0).mean().item()
            assert (apart < 0.15) is wanted  # random filters all see brightness first


@witness("model.use_weight_average")
def _() -> None:
    none, averaged = "model.use_target_encoder=false", "model.ema.momentum=0.9"
    images = torch.randn(2, 3, 64, 64)
    for wanted in (False, True):
        run = built(none, f"model.use_weight_average={str(wanted).lower()}", *([averaged] if wanted else []))
        assert run.model.target_encoder is None
        for step in range(2):
            step_of(run, step)
        run.model.eval()
        apart = run.model.embed(images)["last"] - run.model.embed(images, online=True)["last"]
        assert bool(apart.abs().max() > 0) is wanted


@witness("model.use_target_encoder")
def _() -> None:
    with_, without = model_of(), model_of("model.use_target_encoder=false")
    assert with_.target_encoder is not None
    assert without.target_encoder is None
    for model in (with_, without):
        with torch.no_grad():
            for p in model.context_encoder.parameters():
                p.mul_(1.5)
    before, after = (model(*inputs_of()).targets[0] for model in (with_, without))
    assert torch.equal(before, output_of().targets[0])  # the average stays until it is moved
    assert not torch.allclose(after, before)  # the encoder itself has moved


def constant_images(*overrides: str) -> Tensor:
    """Tokens `[64, 32]` of an image that is the same everywhere, each patch seen alone."""
    images, keep = torch.full((64, 3, 64, 64), 0.5), torch.arange(64)[:, None]
    tokens: Tensor = model_of(*overrides).eval().context_encoder(images, keep).tokens[:, 0]
    return tokens


@witness("model.rope.use_rope")
def _() -> None:
    # Rotary positions are relative: a patch that is alone cannot tell where it is. Learned ones are absolute.
    rotary, learned = (constant_images(f"model.rope.use_rope={name}") for name in ("true", "false"))
    assert (rotary - rotary[0]).abs().max() < 1e-5
    assert (learned - learned[0]).abs().max() > 1e-3
    assert not any("pos_embed" in name for name, _ in encoder_of("model.rope.use_rope=true").named_parameters())


@witness("model.rope.theta")
def _() -> None:
    for theta in (100.0, 10000.0):
        backbone = model_of("model.rope.use_rope=true", f"model.rope.theta={theta}").context_encoder.backbone
        sine, cosine = backbone.embed(torch.zeros(1, 3, 64, 64), None)[1].chunk(2, dim=-1)
        angles = torch.atan2(sine, cosine)[1]  # one patch to the right
        slowest = angles[angles > 1e-9].min()
        assert slowest.item() == pytest.approx(theta ** (-3 / 4), rel=1e-3)  # a head of 16 has 4 frequencies


# The levels


@witness("model.fpn.use_fpn")
def _() -> None:
    for name in ("true", "false"):
        model = model_of(f"model.fpn.use_fpn={name}")
        model.predictor.blocks = nn.ModuleList()  # type: ignore[union-attr]  # attention would join the levels too
        fine = model(*inputs_of()).predictions[0]
        (gradient,) = torch.autograd.grad(fine.square().sum(), model.predictor.queries)  # type: ignore[union-attr]
        assert (gradient[1].abs().max() > 0) == (name == "true")  # of the coarse level's query


@witness("model.fpn.feature_dim")
def _() -> None:
    for dim, setting in ((16, "null"), (24, "24")):
        predictor = model_of("model.fpn.use_fpn=true", f"model.fpn.feature_dim={setting}").predictor
        assert {lateral.out_features for lateral in predictor.fpn.lateral} == {dim}
        assert {head.in_features for head in predictor.heads} == {dim}


@witness("model.fpn.fusion_method")
def _() -> None:
    maps = [torch.randn(2, 4, 4, 16), torch.randn(2, 2, 2, 16)]
    above = lambda fpn: F.interpolate(fpn.lateral[1](maps[1]).permute(0, 3, 1, 2), size=(4, 4), mode="bilinear")  # noqa: E731
    for method in ("add", "concat"):
        fpn = model_of("model.fpn.use_fpn=true", f"model.fpn.fusion_method={method}").predictor.fpn
        here, up = fpn.lateral[0](maps[0]), above(fpn).permute(0, 2, 3, 1)
        fused = here + up if method == "add" else fpn.fuse[0](torch.cat((here, up), dim=-1))
        torch.testing.assert_close(fpn(maps)[0], fused)


# The predictor and the projector


@witness("model.predictor.embed_dim")
def _() -> None:
    for dim, setting in ((16, "null"), (24, "24")):
        predictor = model_of(f"model.predictor.embed_dim={setting}").predictor
        assert (predictor.embed.out_features, predictor.queries.shape[1]) == (dim, dim)


@witness("model.predictor.depth")
def _() -> None:
    for depth in (1, 3):
        model = model_of(f"model.predictor.depth={depth}")
        with calls_of(list(model.predictor.blocks)) as calls:  # type: ignore[union-attr]
            model(*inputs_of())
        assert len(calls) == depth


@witness("model.predictor.num_heads")
def _() -> None:
    found = [model_of(f"model.predictor.num_heads={n}").predictor.blocks[0].attn.num_heads for n in ("null", 2, 4)]
    assert found == [1, 2, 4]  # the encoder's head width is 16, all of the predictor's


@witness("model.predictor.mlp_ratio")
def _() -> None:
    found = [model_of(f"model.predictor.mlp_ratio={r}").predictor.blocks[0].mlp.fc1.out_features for r in (4, 1.5)]
    assert found == [64, 24]


@witness("model.predictor.attention")
def _() -> None:
    images, masks, _ = inputs_of()
    fewer = masks._replace(targets=masks.targets[:, :2])
    for attention, knows in (("self", True), ("cross", False)):
        outputs = {}
        for fused in ("true", "false"):
            model = model_of(f"model.predictor.attention={attention}", f"model.use_flash_attention={fused}").eval()
            for parameter in model.predictor.parameters():  # type: ignore[union-attr]
                nn.init.normal_(parameter, std=0.3)  # as it starts, attention hardly matters
            context = model.context_encoder(images.flatten(0, 1), keep=masks.context).tokens
            outputs[fused] = model.predictor(context, masks)[0]  # type: ignore[misc]
            alone = model.predictor(context, fewer)[0]  # type: ignore[misc]
            # Whether the prediction of a block depends on which others are asked for.
            assert bool((alone - outputs[fused][:, :2]).abs().max() > 1e-5) == knows
            other = model.predictor(context + torch.randn_like(context), masks)[0]  # type: ignore[misc]
            assert (other - outputs[fused]).abs().max() > 1e-4
        torch.testing.assert_close(outputs["true"], outputs["false"], rtol=1e-3, atol=1e-3)


def linears(*overrides: str) -> list[tuple[int, int]]:
    """Widths of the projector's linear maps."""
    layers = model_of("loss.type=sigreg", *overrides).projector
    return [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]


@witness("model.projector.depth")
def _() -> None:
    assert linears("model.projector.depth=0") == [(32, 8)]
    assert linears("model.projector.depth=3") == [(32, 16), (16, 16), (16, 16), (16, 8)]


@witness("model.projector.hidden_dim")
def _() -> None:
    assert linears("model.projector.hidden_dim=24") == [(32, 24), (24, 24), (24, 8)]


@witness("model.projector.output_dim")
def _() -> None:
    settings = ("loss.type=sigreg", "model.projector.output_dim=12")
    assert linears("model.projector.output_dim=12")[-1] == (16, 12)
    assert output_of(*settings).embeddings.shape[-1] == 12  # type: ignore[union-attr]


# The target encoder's momentum


def gap_after_a_step(*overrides: str) -> float:
    """Distance of the target encoder to the context encoder after one step, in units of the step."""
    run = built("training.warmup_epochs=0", *overrides)
    before = [p.detach().clone() for p in run.model.context_encoder.parameters()]
    step_of(run)
    now, target = run.model.context_encoder.parameters(), run.model.target_encoder.parameters()  # type: ignore[union-attr]
    pairs = [((n - t).norm(), (n - b).norm()) for n, t, b in zip(now, target, before, strict=True)]
    return (torch.stack([a for a, _ in pairs]).norm() / torch.stack([b for _, b in pairs]).norm()).item()


@witness("model.ema.momentum")
def _() -> None:
    assert schedules_of("model.ema.momentum=0.5").momentum(0) == 0.5
    assert schedules_of().momentum(0) == 0.9  # 1 - 100/32, at least 0.9
    assert gap_after_a_step("model.ema.momentum=0.25") == pytest.approx(0.25, abs=1e-3)
    assert gap_after_a_step("model.ema.momentum=0.75") == pytest.approx(0.75, abs=1e-3)


@witness("model.ema.momentum_end")
def _() -> None:
    schedule = schedules_of("model.ema.momentum=0.5", "model.ema.momentum_end=0.7")
    assert [schedule.momentum(step) for step in (0, 15.5, 31)] == pytest.approx([0.5, 0.6, 0.7])
    assert schedules_of("training.epochs=100").momentum(799) == pytest.approx(1 - 10 / 800)


@witness("model.ema.momentum_warmup_epochs")
def _() -> None:
    flat = ("model.ema.momentum=0.9", "model.ema.momentum_end=0.9")
    warm = schedules_of(*flat, "model.ema.momentum_warmup_epochs=2")
    # The horizon 1 / (1 - momentum) grows from 1 to 10 steps over 16 steps.
    assert [1 / (1 - warm.momentum(step)) for step in (0, 8, 16, 31)] == pytest.approx([1, 5.5, 10, 10])
    assert schedules_of(*flat).momentum(0) == 0.9
    assert gap_after_a_step(*flat, "model.ema.momentum_warmup_epochs=2") == pytest.approx(0, abs=1e-3)


# Which images


def photos(folder: Path, count: int = 3, size: tuple[int, int] = (40, 30)) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (i, i, i)).save(folder / f"{i}.png")
    return folder


def sources_of(*overrides: str) -> list[Source]:
    config = config_of(*overrides)
    return open_training(config.data, config.experiment.seed)


@witness("data.datasets[].name")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar = write_cifar(tmp_path, "cifar10", monkeypatch)
    write_stl10(tmp_path)
    photos(tmp_path / "photos")
    entries = [f"{{name: {name}, path: {tmp_path}}}" for name in ("cifar10", "stl10")]
    entries += [f"{{name: folder, path: {tmp_path / 'photos'}}}", "{name: shapes, length: 5}"]
    sources = sources_of(f"data.datasets=[{', '.join(entries)}]")
    assert [(source.name, len(source)) for source in sources] == [
        ("cifar10", 20),
        ("stl10", 7),
        ("folder", 3),
        ("shapes", 5),
    ]
    assert (sources[0].images(np.arange(20)) == cifar["train"]).all()


@witness("data.datasets[].path")
def _(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 5)):
        (source,) = sources_of(f"data.datasets=[{{name: folder, path: {photos(tmp_path / name, count)}}}]")
        assert len(source) == count


@witness("data.datasets[].weight")
def _() -> None:
    two = "[{name: shapes, length: 64, weight: %d}, {name: shapes, length: 64, weight: 1}]"
    for weight in (1, 3, 7):
        batches = batches_of(f"data.datasets={two % weight}", "data.sampling_strategy=weighted")
        source, _ = batches.locate(np.arange(128))
        assert (source == 0).sum() == 128 * weight // (weight + 1)


@witness("data.datasets[].split")
def _(tmp_path: Path) -> None:
    images = write_stl10(tmp_path)
    for split, count in (("train", 3), ("test", 2), ("unlabeled", 4), ("train+unlabeled", 7)):
        (source,) = sources_of(f"data.datasets=[{{name: stl10, path: {tmp_path}, split: {split}}}]")
        assert len(source) == count
    assert (source.images(np.arange(3)) == images["train"]).all()


@witness("data.datasets[].length")
def _() -> None:
    assert [len(sources_of(f"data.datasets=[{{name: shapes, length: {n}}}]")[0]) for n in (7, 30)] == [7, 30]


@witness("data.data_path")
def _(tmp_path: Path) -> None:
    write_stl10(tmp_path / "here")
    settings = ("data.datasets=[{name: stl10}]", "data.download=false")
    assert len(sources_of(*settings, f"data.data_path={tmp_path / 'here'}")[0]) == 7
    with pytest.raises(DataError, match=str(tmp_path / "elsewhere")):
        sources_of(*settings, f"data.data_path={tmp_path / 'elsewhere'}")


@witness("data.download")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def network(url: str, root: str, filename: str, checksum: str) -> None:
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(archives, "download_url", network)
    settings = ("data.datasets=[{name: cifar10}]", f"data.data_path={tmp_path}")
    with pytest.raises(DataError, match=r"cifar10: .* data\.download is false"):
        sources_of(*settings, "data.download=false")
    assert asked == []
    with pytest.raises(DataError, match=r"cifar10: .* the download failed \(no route to host\)"):
        sources_of(*settings, "data.download=true")
    assert [url.rpartition("/")[2] for url in asked] == ["cifar-10-python.tar.gz"]


@witness("data.sampling_strategy")
def _() -> None:
    two = "data.datasets=[{name: shapes, length: 96, weight: 1}, {name: shapes, length: 32, weight: 7}]"
    for strategy, first in (("concat", 96), ("balanced", 64), ("weighted", 16)):
        source, _ = batches_of(two, f"data.sampling_strategy={strategy}").locate(np.arange(128))
        assert (source == 0).sum() == first


@witness("data.epoch_size")
def _() -> None:
    assert batches_of().steps_per_epoch == 8
    batches = batches_of("data.epoch_size=24")
    assert batches.steps_per_epoch == 3
    seen = [batches.locate(np.arange(24 * e, 24 * e + 24))[1] for e in range(8)]
    assert len(set(seen[0].tolist())) == 24
    assert np.bincount(np.concatenate(seen)).tolist() == [3] * 64  # what one epoch leaves out the next ones take


# How many at once, how they are shown


@witness("data.image_size")
def _() -> None:
    assert [views_of(f"data.image_size={size}").shape[-2:] for size in (64, 96)] == [(64, 64), (96, 96)]
    assert output_of("data.image_size=96").target_tokens.shape[1] == 144


@witness("data.batch_size")
def _() -> None:
    assert [len(batches_of(f"data.batch_size={size}")[0].positions) for size in (8, 16)] == [8, 16]
    assert batches_of("data.batch_size=16").steps_per_epoch == 4
    assert built("data.batch_size=auto", "data.global_batch_size=4").batches.batch_size == 4


@witness("data.global_batch_size")
def _(tmp_path: Path) -> None:
    auto = ("data.batch_size=auto", "data.global_batch_size=16", "training.max_steps=1")
    left = run_of(tmp_path / "run", *auto)
    written = load_config(left.folder / "config.yaml")
    assert written.data.batch_size == 16
    assert written.training.accumulation_steps in (1, 2, 4, 8, 16)
    assert f"Batch: 16 images a step, computed in {written.training.accumulation_steps} part(s)" in left.said


@witness("data.num_views")
def _() -> None:
    for views in (1, 3):
        settings = (f"data.num_views={views}", "loss.type=sigreg")
        images = views_of(*settings)
        assert images.shape[0] == views
        assert len({view.sum().item() for view in images}) == views
        assert output_of(*settings).embeddings.shape[0] == max(views, 2)  # type: ignore[union-attr]


@witness("data.num_workers")
def _() -> None:
    for workers in (0, 2):
        before = len(torch.multiprocessing.active_children())
        loader = iter(Loader(batches_of(f"data.num_workers={workers}"), 0, 4, False))
        next(loader)
        assert len(torch.multiprocessing.active_children()) - before == workers
        del loader


@witness("data.max_bad_fraction")
def _(tmp_path: Path) -> None:
    (photos(tmp_path / "photos", 10) / "0.png").write_bytes(b"")
    folder = f"data.datasets=[{{name: folder, path: {tmp_path / 'photos'}}}]"
    (source,) = sources_of(folder, "data.max_bad_fraction=0.1")
    assert source.read(np.arange(10)).images.any(axis=(1, 2, 3)).all()
    (source,) = sources_of(folder, "data.max_bad_fraction=0.09")
    with pytest.raises(DataError, match=r"1 of 10 files cannot be read, more than data\.max_bad_fraction=0\.09"):
        source.read(np.arange(10))


@witness("data.timeout")
def _() -> None:
    for seconds in (3, 0):
        assert Loader(batches_of(f"data.timeout={seconds}", "data.num_workers=1"), 0, 1, False).patience == seconds


@witness("data.pin_memory")
def _() -> None:
    for name in ("true", "false"):
        batches = batches_of(f"data.pin_memory={name}")
        assert Loader(batches, 0, 1, KINDS["cuda"].pin_memory).pin_memory == (name == "true")
        assert not Loader(batches, 0, 1, KINDS["cpu"].pin_memory).pin_memory


@witness("data.decode_size")
def _(tmp_path: Path) -> None:
    folder = f"data.datasets=[{{name: folder, path: {photos(tmp_path / 'photos')}}}]"
    for setting, side in (("null", 80), ("33", 33)):  # 8/7 of 64, in whole eighths
        (source,) = sources_of(folder, f"data.decode_size={setting}")
        assert source.images(np.arange(1)).shape == (1, 3, side, side)


@witness("data.cache_gb")
def _() -> None:
    size = sources_of()[0].nbytes
    for gigabytes, kept in ((size / 1e9, True), (0.9 * size / 1e9, False), (0, False)):
        assert isinstance(built(f"data.cache_gb={gigabytes}").batches.sources[0], CachedSource) is kept


# Augmentation


@witness("data.augmentation.crop_scale")
def _() -> None:
    for low, high in ((0.3, 0.5), (0.8, 0.9)):
        box = drawn("box", f"data.augmentation.crop_scale=[{low},{high}]")
        area = box[:, 2] * box[:, 3]
        assert low - 1e-5 <= area.min() < low + 0.02
        assert high - 0.02 < area.max() <= high + 1e-5


@witness("data.augmentation.crop_ratio")
def _() -> None:
    for low, high in ((0.5, 0.6), (1.5, 2.0)):
        box = drawn("box", f"data.augmentation.crop_ratio=[{low},{high}]", "data.augmentation.crop_scale=[0.2,0.3]")
        ratio = box[:, 3] / box[:, 2]  # width over height; shapes are square
        assert low - 1e-4 <= ratio.min() < low + 0.05
        assert high - 0.05 < ratio.max() <= high + 1e-4


@witness("data.augmentation.horizontal_flip")
def _() -> None:
    never, always = (views_of(f"data.augmentation.horizontal_flip={p}") for p in (0, 1))
    torch.testing.assert_close(always, never.flip(-1), rtol=0, atol=1e-5)
    assert drawn("flip", "data.augmentation.horizontal_flip=0.25").float().mean() == pytest.approx(0.25, abs=0.08)


ALWAYS = "data.augmentation.color_jitter_probability=1"


@witness("data.augmentation.color_jitter")
def _() -> None:
    for strength in (0.2, 0.8):
        jitter = drawn("jitter", f"data.augmentation.color_jitter={strength}", ALWAYS)
        for values, reach, middle in zip(jitter.T, [strength] * 3 + [strength / 4], (1, 1, 1, 0), strict=True):
            assert 0.95 * reach < (values - middle).abs().max() <= reach + 1e-6
    plain, jittered = (views_of(f"data.augmentation.color_jitter={s}") for s in (0, 0.8))
    assert (plain - jittered).abs().mean() > 0.1


@witness("data.augmentation.hue_jitter")
def _() -> None:
    jitter = drawn("jitter", "data.augmentation.hue_jitter=0.5", ALWAYS)
    assert 0.48 < jitter[:, 3].abs().max() <= 0.5
    assert (jitter[:, :3] == 1).all()
    assert (
        drawn("jitter", "data.augmentation.hue_jitter=0", "data.augmentation.color_jitter=0.4")[:, 3].abs().max() == 0
    )
    plain, turned = (views_of(f"data.augmentation.hue_jitter={h}", *RAW) for h in (0, 0.5))
    torch.testing.assert_close(plain.amax(dim=2), turned.amax(dim=2), rtol=0, atol=1e-4)  # hue leaves the value
    assert (plain - turned).abs().mean() > 0.02


@witness("data.augmentation.color_jitter_probability")
def _() -> None:
    for probability in (0.0, 0.3, 1.0):
        setting = f"data.augmentation.color_jitter_probability={probability}"
        jitter = drawn("jitter", "data.augmentation.color_jitter=0.4", setting)
        assert (jitter[:, 0] != 1).float().mean() == pytest.approx(probability, abs=0.08)


@witness("data.augmentation.grayscale")
def _() -> None:
    coloured, grey = (views_of(f"data.augmentation.grayscale={p}", *RAW) for p in (0, 1))
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(grey, (coloured * weights).sum(dim=2, keepdim=True).expand_as(grey))
    assert (coloured[:, :, 0] - coloured[:, :, 1]).abs().max() > 0.1
    assert drawn("grayscale", "data.augmentation.grayscale=0.25").float().mean() == pytest.approx(0.25, abs=0.08)


@witness("data.augmentation.gaussian_blur")
def _() -> None:
    sharp, blurred = (
        views_of(f"data.augmentation.gaussian_blur={p}", "data.augmentation.blur_sigma=[2,2]") for p in (0, 1)
    )
    assert blurred.diff(dim=-1).abs().mean() < 0.7 * sharp.diff(dim=-1).abs().mean()
    torch.testing.assert_close(blurred.mean(), sharp.mean(), rtol=0, atol=0.02)
    sigma = drawn("blur_sigma", "data.augmentation.gaussian_blur=0.25")
    assert (sigma > 0).float().mean() == pytest.approx(0.25, abs=0.08)


@witness("data.augmentation.blur_sigma")
def _() -> None:
    sigma = drawn("blur_sigma", "data.augmentation.gaussian_blur=1", "data.augmentation.blur_sigma=[0.5,1.5]")
    assert 0.5 <= sigma.min() < 0.55
    assert 1.45 < sigma.max() <= 1.5
    edges = [
        views_of("data.augmentation.gaussian_blur=1", f"data.augmentation.blur_sigma=[{s},{s}]")
        .diff(dim=-1)
        .abs()
        .mean()
        for s in (0.1, 1, 3)
    ]
    assert edges[0] > edges[1] > edges[2]


@witness("data.augmentation.solarization")
def _() -> None:
    plain, solarized = (views_of(f"data.augmentation.solarization={p}", *RAW) for p in (0, 1))
    torch.testing.assert_close(solarized, torch.where(plain >= 0.5, 1 - plain, plain))
    assert plain.max() > 0.6
    assert drawn("solarize", "data.augmentation.solarization=0.25").float().mean() == pytest.approx(0.25, abs=0.08)


@witness("data.augmentation.mean")
def _() -> None:
    raw, shifted = (views_of(f"data.augmentation.mean={mean}", RAW[1]) for mean in ("[0,0,0]", "[0.1,0.2,0.3]"))
    difference = (raw - shifted).mean(dim=(0, 1, 3, 4))
    torch.testing.assert_close(difference, torch.tensor([0.1, 0.2, 0.3]), rtol=0, atol=1e-5)


@witness("data.augmentation.std")
def _() -> None:
    raw, scaled = (views_of(RAW[0], f"data.augmentation.std={std}") for std in ("[1,1,1]", "[0.1,0.5,2]"))
    torch.testing.assert_close(scaled * torch.tensor([0.1, 0.5, 2]).view(3, 1, 1), raw, rtol=0, atol=1e-5)


# Local crops


@witness("data.multicrop.num_local_crops")
def _() -> None:
    for count in (0, 1, 3):
        settings = ("loss.type=sigreg", "data.num_views=2", f"data.multicrop.num_local_crops={count}")
        assert len(batches_of(*settings)[0].crops) == count
        output = output_of(*settings)
        assert output.embeddings is not None
        assert (output.embeddings.shape[0], output.num_global) == (2 + count, 2)


CROPS = ("loss.type=sigreg", "data.multicrop.num_local_crops=2")


@witness("data.multicrop.local_crop_size")
def _() -> None:
    for setting, side in (("null", 24), ("16", 16), ("40", 40)):  # 3/7 of 64 in whole patches of 8
        run = built(*CROPS, f"data.multicrop.local_crop_size={setting}")
        crops = run.batches[0].render_crops(run.crops)
        assert crops is not None
        assert crops.shape == (2, 8, 3, side, side)
        with calls_of([run.model.context_encoder]) as calls:
            step_of(run)
        assert calls[-1].tokens.shape[1] == (side // 8) ** 2


@witness("data.multicrop.local_crop_scale")
def _() -> None:
    many = ("data.datasets=[{name: shapes, length: 256}]", "data.batch_size=256")
    for low, high in ((0.05, 0.1), (0.3, 0.4)):
        batch = batches_of(*CROPS, *many, f"data.multicrop.local_crop_scale=[{low},{high}]")[0]
        area = batch.crops[0].box[:, 2] * batch.crops[0].box[:, 3]
        assert low - 1e-5 <= area.min() < low + 0.01
        assert high - 0.01 < area.max() <= high + 1e-5


# What is hidden


@witness("masking.num_masks")
def _() -> None:
    for count in (1, 3):
        output = output_of(f"masking.num_masks={count}")
        assert {t.shape[1] for t in (*output.targets, *output.predictions)} == {count}


def blocks_of(*overrides: str) -> set[tuple[int, int]]:
    """Sizes of the hidden blocks over 40 steps, of a grid of 16 x 16."""
    batches = batches_of("model.patch_size=4", "model.num_hierarchies=1", "masking.num_masks=1", *overrides)
    return {tuple(batches[step].masks.targets.shape[2:]) for step in range(40)}


@witness("masking.mask_scale")
def _() -> None:
    for low, high in ((0.1, 0.15), (0.3, 0.4)):
        shares = [h * w / 256 for h, w in blocks_of(f"masking.mask_scale=[{low},{high}]")]
        assert low <= min(shares) < max(shares) <= high


@witness("masking.aspect_ratio")
def _() -> None:
    for low, high in ((0.4, 0.6), (1.8, 2.5)):
        ratios = [h / w for h, w in blocks_of(f"masking.aspect_ratio=[{low},{high}]")]
        assert low <= min(ratios) <= max(ratios) <= high


@witness("masking.context_scale")
def _() -> None:
    for scale in (0.25, 0.5, 1.0):
        batches = batches_of(f"masking.context_scale=[{scale},{scale}]")
        masks = batches[0].masks
        rest = 64 - 4 * masks.targets.shape[2] * masks.targets.shape[3]
        assert masks.context.shape[1] == round(scale * rest)
    varying = batches_of("masking.context_scale=[0.5,1.0]", "masking.mask_scale=[0.18,0.19]")
    assert len({varying[step].masks.context.shape[1] for step in range(20)}) > 3


# The losses


@witness("loss.type")
def _() -> None:
    names = {kind: {n.partition("/")[0] for n in losses_of(f"loss.type={kind}", **none).terms} for kind, none in (
        ("mse", {"embeddings": None}),
        ("smoothl1", {"embeddings": None}),
        ("combined", {}),
        ("sigreg", {}),
    )}  # fmt: skip
    levels = {"level0", "level1"}
    assert names == {"mse": levels, "smoothl1": levels, "combined": levels | {"vicreg"}, "sigreg": levels | {"sigreg"}}
    prediction, target = fixed_output().predictions[0], fixed_output().targets[0]
    for kind, distance in (("mse", F.mse_loss), ("smoothl1", F.smooth_l1_loss)):
        losses = losses_of(f"loss.type={kind}", embeddings=None)
        torch.testing.assert_close(losses.terms["level0"], distance(prediction, target).detach())
    assert [model_of(f"loss.type={kind}").projector is None for kind in names] == [True, True, False, False]


@witness("loss.hierarchy_weights")
def _() -> None:
    for weights in ((1.0, 0.5), (0.0, 3.0), (2.0, 0.25)):
        losses = losses_of(f"loss.hierarchy_weights={list(weights)}", embeddings=None)
        expected = weights[0] * losses.terms["level0"] + weights[1] * losses.terms["level1"]
        torch.testing.assert_close(losses.total.detach(), expected)
    alone = ("loss.hierarchy_weights=[0,0]", "loss.type=sigreg", "data.num_views=2")
    assert model_of(*alone).predictor is None
    assert output_of(*alone).predictions == []


@witness("loss.predict_every")
def _() -> None:
    two = ("loss.type=sigreg", "data.num_views=2", "data.batch_size=8")
    whole, part = output_of(*two), output_of(*two, "loss.predict_every=3")
    torch.testing.assert_close(whole.embeddings, part.embeddings)
    rows = [0, 3, 4, 7]  # of two views of four images
    for level in range(2):
        torch.testing.assert_close(whole.targets[level][rows], part.targets[level])
        torch.testing.assert_close(whole.predictions[level][rows], part.predictions[level])


@witness("loss.smoothl1_beta")
def _() -> None:
    prediction, target = fixed_output().predictions[0], fixed_output().targets[0]
    for beta in (0.1, 1.0, 3.0):
        found = losses_of(f"loss.smoothl1_beta={beta}", embeddings=None).terms["level0"]
        torch.testing.assert_close(found, F.smooth_l1_loss(prediction, target, beta=beta).detach())


def contribution(kind: str, **weights: float) -> Tensor:
    """What the image level adds to the total under these weights; those not given are 0, the whole's is 1."""
    section = {"combined": "vicreg", "sigreg": "sigreg"}[kind]
    zero = {"vicreg": ("invariance_weight", "variance_weight", "covariance_weight"), "sigreg": ()}[section]
    given = {"weight": 1.0} | dict.fromkeys(zero, 0.0) | weights
    settings = [f"loss.{section}.{name}={value}" for name, value in given.items()]
    return (losses_of(f"loss.type={kind}", *settings).total - losses_of(embeddings=None).total).detach()


def views() -> Tensor:
    """The embeddings that these losses are of: [3, 16, 8]."""
    embeddings = fixed_output().embeddings
    assert embeddings is not None
    return embeddings


@witness("loss.vicreg.weight")
def _() -> None:
    one = contribution("combined", variance_weight=1.0, covariance_weight=1.0)
    assert one > 0
    for weight in (0.0, 0.1, 3.0):
        found = contribution("combined", weight=weight, variance_weight=1.0, covariance_weight=1.0)
        torch.testing.assert_close(found, weight * one, rtol=1e-3, atol=1e-5)


@witness("loss.vicreg.invariance_weight")
def _() -> None:
    for weight in (0.0, 2.0, 25.0):
        expected = weight * invariance(views())
        found = contribution("combined", invariance_weight=weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@witness("loss.vicreg.variance_weight")
def _() -> None:
    for weight in (0.0, 2.0, 25.0):
        expected = weight * variance(views())
        torch.testing.assert_close(contribution("combined", variance_weight=weight), expected, rtol=1e-4, atol=1e-5)


@witness("loss.vicreg.covariance_weight")
def _() -> None:
    for weight in (0.0, 2.0, 25.0):
        expected = weight * covariance(views())
        found = contribution("combined", covariance_weight=weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@witness("loss.sigreg.weight")
def _() -> None:
    one = contribution("sigreg", weight=1.0)
    assert one > 0
    for weight in (0.0, 0.1, 3.0):
        torch.testing.assert_close(contribution("sigreg", weight=weight), weight * one, rtol=1e-3, atol=1e-5)


@witness("loss.sigreg.mix")
def _() -> None:
    near, normal = agreement(views(), 2), gaussianity(views(), config_of().loss.sigreg, 0)
    for mix in (0.0, 0.3, 1.0):
        expected = (1 - mix) * near + mix * normal
        torch.testing.assert_close(contribution("sigreg", mix=mix), expected, rtol=1e-4, atol=1e-5)


def statistic(embeddings: Tensor, *overrides: str, seed: int = 0) -> float:
    losses = losses_of("loss.type=sigreg", *overrides, embeddings=embeddings, seed=seed)
    return losses.terms["sigreg/sigreg"].item()


@witness("loss.sigreg.num_slices")
def _() -> None:
    # The mean over more random directions depends less on which they are: by the root of their number.
    embeddings = torch.randn(2, 64, 8) * torch.linspace(0.2, 3, 8)
    spread = {
        n: np.std([statistic(embeddings, f"loss.sigreg.num_slices={n}", seed=seed) for seed in range(30)])
        for n in (1, 64)
    }
    assert 4 < spread[1] / spread[64] < 16


@witness("loss.sigreg.num_knots")
def _() -> None:
    # A finer quadrature of the same integral.
    embeddings = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)) * 3
    found = {n: statistic(embeddings, f"loss.sigreg.num_knots={n}") for n in (3, 5, 33, 501)}
    errors = [abs(found[n] - found[501]) for n in (3, 5, 33)]
    assert errors[0] > errors[1] > 10 * errors[2]


@witness("loss.sigreg.t_max")
def _() -> None:
    # A collapsed embedding has the characteristic function 1: B times the integral over [-t_max, t_max].
    for end in (1.0, 3.0, 6.0):
        t = torch.linspace(-end, end, 20001, dtype=torch.float64)
        window = torch.exp(-(t**2) / 2)
        expected = 16 * torch.trapezoid((1 - window) ** 2 * window, t).item()
        found = statistic(torch.zeros(2, 16, 8), f"loss.sigreg.t_max={end}", "loss.sigreg.num_knots=301")
        assert found == pytest.approx(expected, rel=1e-3)


# The loop


@witness("training.epochs")
def _(tmp_path: Path) -> None:
    for epochs in (1, 3):
        left = run_of(tmp_path / str(epochs), f"training.epochs={epochs}")
        assert left.steps == list(range(1, 2 * epochs + 1))
        assert f"Epoch {epochs}/{epochs}: " in left.said
        assert left.lines[-1]["lr"] == pytest.approx(1e-6)


@witness("training.max_time")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_100_seconds_a_step(run: Run) -> Measured:
        return replace(measure_run(run, 0.1), seconds_per_step=100.0)

    monkeypatch.setattr("hjepa.train.measure_run", at_100_seconds_a_step)
    left = run_of(tmp_path / "run", "training.epochs=10", "training.max_time=10m")
    assert left.steps == [1, 2, 3, 4, 5]  # of 20
    assert left.lines[-1]["lr"] == pytest.approx(1e-6)
    assert "within 10m" in left.said


@witness("training.max_steps")
def _(tmp_path: Path) -> None:
    left = run_of(tmp_path / "run", "training.max_steps=3")
    assert (left.steps, left.saved[0]) == ([1, 2, 3], 3)
    # The schedule is that of all 8 steps.
    assert left.lines[-1]["lr"] == pytest.approx(Schedules(config_of().training, config_of().model.ema, 2).lr(2))
    assert left.lines[-1]["lr"] > 1e-4


@witness("training.warmup_epochs")
def _() -> None:
    for epochs in (0, 1, 2):
        schedule = schedules_of(f"training.warmup_epochs={epochs}")
        rates = [schedule.lr(step) for step in range(32)]
        assert rates.index(max(rates)) == 8 * epochs
        assert rates[: 8 * epochs] == pytest.approx([5e-4 * (s + 1) / (8 * epochs + 1) for s in range(8 * epochs)])
    assert schedules_of().warmup == pytest.approx(0.05 * 32)


@witness("training.lr")
def _() -> None:
    for peak in (1e-4, 1e-2):
        run = built(f"training.lr={peak}", "training.warmup_epochs=0", "training.weight_decay=0")
        before = run.model.predictor.embed.weight.detach().clone()  # type: ignore[union-attr]
        step_of(run)
        moved = (run.model.predictor.embed.weight.detach() - before).abs().max()  # type: ignore[union-attr]
        assert moved.item() == pytest.approx(peak, rel=0.01)  # Adam's first step is as long as the rate


@witness("training.warmup_lr")
def _() -> None:
    schedule = schedules_of("training.warmup_epochs=1", "training.warmup_lr=1e-4", "training.lr=1e-3")
    assert [schedule.lr(step) for step in (0, 4, 8)] == pytest.approx([2e-4, 6e-4, 1e-3])
    assert schedules_of("training.warmup_epochs=1", "training.lr=9e-3").lr(0) == pytest.approx(1e-3)


@witness("training.optimizer")
def _() -> None:
    for name in ("adamw", "muon"):
        run = built(f"training.optimizer={name}", "training.lr=0.01", "training.weight_decay=0", "training.eps=1")
        matrix = run.model.context_encoder.backbone.last_block.mlp.fc1.weight  # type: ignore[union-attr]
        before = matrix.detach().clone()
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        matrix.grad = torch.outer(torch.ones(matrix.shape[0]), torch.linspace(1, 2, matrix.shape[1]))
        for optimizer in run.optimizers:
            optimizer.step()
        moved = (matrix.detach() - before).norm().item()
        # Muon moves as far whatever the gradient's size, and by the spectrum: here it has one direction.
        expected = 0.01 * 0.2 * max(matrix.shape) ** 0.5 if name == "muon" else None
        assert len(run.optimizers) == (2 if name == "muon" else 1)
        assert expected is None or moved == pytest.approx(expected, rel=0.35)


@witness("training.muon_momentum")
def _() -> None:
    for momentum in (0.5, 0.9):
        run = built("training.optimizer=muon", f"training.muon_momentum={momentum}")
        matrix = run.model.context_encoder.backbone.last_block.mlp.fc1.weight  # type: ignore[union-attr]
        matrix.grad = torch.ones_like(matrix)
        run.optimizers[1].step()
        average = run.optimizers[1].optimizer.state[matrix]["momentum_buffer"]
        assert average[0, 0].item() == pytest.approx(1 - momentum, rel=1e-5)


@witness("training.min_lr")
def _() -> None:
    assert [schedules_of(f"training.min_lr={low}").lr(31) for low in (0, 1e-5)] == pytest.approx([0, 1e-5])


@witness("training.weight_decay")
def _() -> None:
    for decay in (0.0, 0.1):
        run = built(f"training.weight_decay={decay}", "training.lr=0.01")
        weight, bias = run.model.predictor.embed.weight, run.model.predictor.embed.bias  # type: ignore[union-attr]
        nn.init.ones_(bias)
        before = weight.detach().clone()
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        run.optimizers[0].step()
        torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * decay))
        assert (bias == 1).all()


def moments_after_two_steps(*overrides: str) -> tuple[Tensor, Tensor]:
    """Adam's averages of a parameter whose gradient was 1 and then 0."""
    run = built(*overrides)
    parameter = run.model.predictor.embed.bias  # type: ignore[union-attr]
    for gradient in (1.0, 0.0):
        parameter.grad = torch.full_like(parameter, gradient)
        run.optimizers[0].step()
    state = run.optimizers[0].optimizer.state[parameter]
    return state["exp_avg"][0], state["exp_avg_sq"][0]


@witness("training.betas")
def _() -> None:
    for first, second in ((0.9, 0.95), (0.5, 0.999)):
        mean, square = moments_after_two_steps(f"training.betas=[{first},{second}]")
        assert mean.item() == pytest.approx(first * (1 - first), rel=1e-4)
        assert square.item() == pytest.approx(second * (1 - second), rel=1e-3)


@witness("training.eps")
def _() -> None:
    for eps in (1e-8, 1.0, 3.0):
        run = built(f"training.eps={eps}", "training.lr=0.1")
        bias = run.model.predictor.embed.bias  # type: ignore[union-attr]
        bias.grad = torch.full_like(bias, 2.0)
        run.optimizers[0].step()
        assert bias[0].item() == pytest.approx(-0.1 * 2 / (2 + eps), rel=1e-4)


@witness("training.clip_grad")
def _() -> None:
    norms, told = [], []
    for limit in ("null", "1e-3", "1e-2"):
        run = built(f"training.clip_grad={limit}")

        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            gradients = [
                p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            norms.append(torch.stack(gradients).norm().item())

        run.optimizers[0].optimizer.register_step_pre_hook(note)
        told.append(step_of(run).norm.item())
    assert norms == pytest.approx([told[0], 1e-3, 1e-2], rel=1e-3)
    assert told[0] > 1e-2
    assert told[1] == told[2] == told[0]  # what is written down is the norm before


@witness("training.accumulation_steps")
def _() -> None:
    norms = []
    for parts in (1, 4):
        run = built(f"training.accumulation_steps={parts}", "training.warmup_epochs=0")
        with calls_of([run.model.context_encoder]) as calls:
            norms.append(step_of(run).norm.item())
        assert [call.tokens.shape[0] for call in calls] == [8 // parts] * parts
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@witness("training.use_amp")
def _() -> None:
    here = torch.bfloat16 if autocasts("cpu", "auto") else torch.float32
    for name, dtype in (("false", torch.float32), ("true", torch.bfloat16), ("auto", here)):
        run = built(f"training.use_amp={name}")
        linear = (run.model.context_encoder.backbone.vit.blocks[0].mlp.fc1, run.model.predictor.blocks[0].mlp.fc1)  # type: ignore[union-attr]
        with calls_of(list(linear)) as calls:
            losses = step_of(run).losses
        assert [call.dtype for call in calls] == [dtype, dtype]
        assert losses.total.dtype == torch.float32
        evaluator = build_evaluator(run.config, CPU)
        assert isinstance(evaluator, Evaluator)
        with calls_of([linear[0]]) as calls:
            figures = probe(evaluator, run.model, run.config)
        assert {call.dtype for call in calls} == {dtype}
        assert all(0 <= value <= 100 for value in figures.values())
        assert all(p.dtype == torch.float32 for p in run.model.parameters())


@witness("training.use_gradient_checkpointing")
def _() -> None:
    gradients = []
    for name, *times in (("false", 1, 1), ("encoder", 2, 1), ("predictor", 1, 2), ("true", 2, 2)):
        model = model_of(f"training.use_gradient_checkpointing={name}", "model.drop_path_rate=0.2").train()
        parts = (model.context_encoder.backbone.vit.blocks, model.predictor.blocks)  # type: ignore[union-attr]
        for blocks, count in zip(parts, times, strict=True):
            torch.manual_seed(0)
            model.zero_grad()
            started: list[nn.Module] = []
            hooks = [
                block.register_forward_pre_hook(lambda block, _, seen=started: seen.append(block)) for block in blocks
            ]
            sum(p.square().mean() for p in model(*inputs_of()).predictions).backward()
            last = 1 if blocks is model.predictor.blocks else count  # type: ignore[union-attr]
            assert [started.count(block) for block in blocks] == [count] * (len(blocks) - 1) + [last]
            for hook in hooks:
                hook.remove()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, *others in zip(*gradients, strict=True):
        assert all(torch.equal(a, b) for b in others)


@witness("training.use_compile")
def _(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"training\.use_compile: .* on this cpu .*no-such-compiler.*; install"):
        run_of(tmp_path, "training.use_compile=true")


@witness("training.max_bad_steps")
def _(tmp_path: Path) -> None:
    infinite = "data.augmentation.std=[1e-45,1e-45,1e-45]"
    for count in (1, 4):
        folder = tmp_path / str(count)
        with pytest.raises(DivergedError, match=f"in {count} steps in a row, the last at step {count};"):
            run_of(folder, infinite, f"training.max_bad_steps={count}")
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == count - 1


@witness("training.on_divergence")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Batch.render

    def broken_later(self: Batch, views: Views) -> Tensor:
        return render(self, views) * (float("inf") if int(self.positions.min()) > 31 else 1.0)

    monkeypatch.setattr(Batch, "render", broken_later)
    settings = ("training.max_bad_steps=1", "checkpoint.save_frequency_steps=1")
    for what, rollbacks in (("stop", 0), ("rollback", 3)):
        with pytest.raises(DivergedError):
            run_of(tmp_path / what, *settings, f"training.on_divergence={what}")
        record = tmp_path / what / "rollbacks.jsonl"
        assert len(record.read_text().splitlines() if record.exists() else []) == rollbacks


# What is kept


@witness("checkpoint.metric")
def _(tmp_path: Path) -> None:
    for metric, kept in (("null", 0), ("loss", 1)):
        run_of(tmp_path / metric, f"checkpoint.metric={metric}")
        assert len(list((tmp_path / metric / "checkpoints").glob("best-*"))) == kept


@witness("checkpoint.save_frequency")
def _(tmp_path: Path) -> None:
    for every, saved in ((0, [8]), (1, [8, 6, 4, 2]), (3, [8, 6])):
        settings = (f"checkpoint.save_frequency={every}", "checkpoint.keep_last_k=9")
        assert run_of(tmp_path / str(every), *settings).saved == saved


@witness("checkpoint.save_frequency_steps")
def _(tmp_path: Path) -> None:
    for every, saved in ((0, [8]), (3, [8, 6, 3])):
        settings = (
            f"checkpoint.save_frequency_steps={every}",
            "checkpoint.save_frequency=0",
            "checkpoint.keep_last_k=9",
        )
        assert run_of(tmp_path / str(every), *settings).saved == saved


@witness("checkpoint.keep_last_k")
def _(tmp_path: Path) -> None:
    for keep, saved in ((2, [8, 7]), (4, [8, 7, 6, 5])):
        settings = ("checkpoint.save_frequency_steps=1", f"checkpoint.keep_last_k={keep}")
        assert run_of(tmp_path / str(keep), *settings).saved == saved


# Evaluation


class Dials(Source):
    """Images of one grey each, `degrees` of 360; their features are points on a circle."""

    def __init__(self, degrees: list[float], labels: list[int]) -> None:
        self.name, self.size, self.num_classes = "dials", (8, 8), 2
        self.labels = np.asarray(labels, np.int64)
        self.values = np.round(np.asarray(degrees) / 360 * 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.values)

    def images(self, indices: Any) -> Any:
        return np.broadcast_to(self.values[indices][:, None, None, None], (len(indices), 3, 8, 8)).copy()


BATCHES: list[int] = []


def on_a_circle(images: Tensor) -> dict[str, Tensor]:
    BATCHES.append(len(images))
    angle = images.mean(dim=(1, 2, 3)) * 2 * math.pi
    return {"last": torch.stack((angle.cos(), angle.sin()), dim=1)}


def evaluator_of(bank: Source, test: Source, *overrides: str) -> Evaluator:
    config = config_of(*RAW, "data.image_size=8", "model.patch_size=1", *overrides)
    return Evaluator(config.evaluation, config.data, 0, [(bank, test)], CPU)


def probed(bank: Source, test: Source, *overrides: str) -> dict[str, float]:
    """Accuracies of the probes of the points on the circle."""
    return dict(evaluator_of(bank, test, *overrides).evaluate(on_a_circle))


@witness("evaluation.eval_frequency")
def _(tmp_path: Path) -> None:
    for every, evaluated in ((0, []), (1, [2, 4, 6, 8]), (3, [6, 8]), (9, [8])):
        assert run_of(tmp_path / str(every), f"evaluation.eval_frequency={every}").evaluated == evaluated


# One neighbour of class 0 at 40 degrees, three of class 1 farther away; what is asked stands at 42. As many stand on
# the other side, so that the mean, which is subtracted, is in the middle.
CLOSE, ASKED = Dials([40, 60, 60, 60, 220, 240, 240, 240], [0, 1, 1, 1, 0, 0, 0, 0]), Dials([42], [0])


@witness("evaluation.knn.k")
def _() -> None:
    settings = ("evaluation.knn.temperature=100", "evaluation.linear=false")
    assert probed(CLOSE, ASKED, *settings, "evaluation.knn.k=1") == {"knn": 100.0}
    assert probed(CLOSE, ASKED, *settings, "evaluation.knn.k=4") == {"knn": 0.0}


@witness("evaluation.knn.temperature")
def _() -> None:
    # Three votes at cosine 0.95 against one at 0.999: at a low temperature the near one has more weight.
    settings = ("evaluation.knn.k=4", "evaluation.linear=false")
    assert probed(CLOSE, ASKED, *settings, "evaluation.knn.temperature=0.01") == {"knn": 100.0}
    assert probed(CLOSE, ASKED, *settings, "evaluation.knn.temperature=1") == {"knn": 0.0}


@witness("evaluation.linear")
def _() -> None:
    assert probed(CLOSE, ASKED, "evaluation.linear=true").keys() == {"knn", "linear"}
    assert probed(CLOSE, ASKED, "evaluation.linear=false").keys() == {"knn"}


@witness("evaluation.linear_l2")
def _() -> None:
    # Under a regularisation that leaves no weights, the more frequent class is all there is to say.
    bank, test = Dials([10] * 10 + [80] * 30, [0] * 10 + [1] * 30), Dials([10, 12], [0, 0])
    assert probed(bank, test, "evaluation.linear_l2=[1e-3]")["linear"] == 100.0
    assert probed(bank, test, "evaluation.linear_l2=[1e9]")["linear"] == 0.0
    assert probed(bank, test, "evaluation.linear_l2=[1e9,1e-3]")["linear"] == 100.0  # the better one is chosen


def looked_at(*overrides: str) -> list[int]:
    """Sizes of the batches that an evaluation of 40 and 20 images looks at."""
    BATCHES.clear()
    many = [Dials([i % 90 for i in range(n)], [i % 2 for i in range(n)]) for n in (40, 20)]
    probed(*many, "evaluation.linear=false", *overrides)
    return list(BATCHES)


@witness("evaluation.dense")
def _() -> None:
    for dense in (True, False):
        config = config_of(f"evaluation.dense={str(dense).lower()}")
        evaluator = build_evaluator(config, torch.device("cpu"))
        assert isinstance(evaluator, Evaluator)
        found = probe(evaluator, create_hjepa_from_config(config), config)
        assert ("eval/patch_where" in found) is dense


@witness("evaluation.max_train")
def _() -> None:
    assert [looked_at(f"evaluation.max_train={n}")[0] for n in (10, 30, 100)] == [10, 30, 40]


@witness("evaluation.max_test")
def _() -> None:
    assert [looked_at(f"evaluation.max_test={n}")[-1] for n in (5, 100)] == [5, 20]


@witness("evaluation.batch_size")
def _() -> None:
    assert looked_at("evaluation.batch_size=15") == [15, 15, 10, 15, 5]
    assert looked_at("evaluation.batch_size=256") == [40, 20]


# Logging


@witness("logging.log_frequency")
def _(tmp_path: Path) -> None:
    for every, steps in ((1, list(range(1, 9))), (3, [3, 6, 8])):
        assert run_of(tmp_path / str(every), f"logging.log_frequency={every}").steps == steps


@witness("logging.use_tensorboard")
def _(tmp_path: Path) -> None:
    for name in ("true", "false"):
        left = run_of(tmp_path / name, f"logging.use_tensorboard={name}", "training.max_steps=1")
        assert (left.folder / "tensorboard").exists() == (name == "true")
    (events,) = (tmp_path / "true" / "tensorboard").iterdir()
    assert b"loss/level0" in events.read_bytes()


@witness("logging.use_report")
def _(tmp_path: Path) -> None:
    for name in ("true", "false"):
        left = run_of(tmp_path / name, f"logging.use_report={name}", "training.max_steps=1")
        assert (left.folder / "report.html").exists() == (name == "true")


@witness("logging.use_pictures")
def _(tmp_path: Path, wandb: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on = ("logging.use_tensorboard=true", "evaluation.eval_frequency=1", "training.epochs=2")
    names = {"views", "neighbours", "features/Image", "features/Level 0"}
    for name in ("true", "false"):
        left = run_of(tmp_path / name, *on, "logging.wandb.enabled=true", f"logging.use_pictures={name}")
        found = EventAccumulator(str(left.folder / "tensorboard"), {"images": 0}).Reload()
        shown = set(found.Tags()["images"])
        assert (names <= shown) == (name == "true"), shown
        assert all([event.step for event in found.Images(tag)] == [2, 4] for tag in shown)
        sent = {key: step for kind, step, keys in wandb.calls[1:-1] if kind == "log" for key in keys}
        assert {"views", "neighbours"} <= sent.keys() if name == "true" else "views" not in sent
        wandb.calls.clear()
    with pytest.raises(ConfigError, match=r"logging\.use_pictures: pictures go where curves go"):
        load_config(None, ["logging.use_pictures=true", "logging.use_tensorboard=false"])
    with pytest.raises(ConfigError, match=r"evaluation\.eval_frequency is 0"):
        load_config(None, ["logging.use_pictures=true", "evaluation.eval_frequency=0"])


STAND_IN = """
calls = []
class Image:
    def __init__(self, pixels): assert pixels.shape[2] == 3
class Run:
    def log(self, values, step): calls.append(("log", step, sorted(values)))
    def finish(self, **options): calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that passes for Weights & Biases and remembers how it was called."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    import wandb as module  # type: ignore[import-not-found,unused-ignore]

    yield module
    sys.modules.pop("wandb", None)


@witness("logging.wandb.enabled")
def _(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    on = ("logging.wandb.enabled=true", "training.max_steps=2")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match=r"logging\.wandb\.enabled: wandb is not installed; pip install"):
            run_of(tmp_path / "refused", *on)
        assert not (tmp_path / "refused").exists()
    wandb = request.getfixturevalue("wandb")
    run_of(tmp_path / "off", "training.max_steps=2")
    assert wandb.calls == []
    left = run_of(tmp_path / "on", *on)
    assert [call[0] for call in wandb.calls] == ["init", "log", "log", "finish"]
    logged = {"step", "epoch", *wandb.calls[1][2]}
    assert (wandb.calls[1][1], logged) == (1, set(left.lines[0]))


@witness("logging.wandb.project")
def _(tmp_path: Path, wandb: Any) -> None:
    on = ("logging.wandb.enabled=true", "training.max_steps=1", "experiment.name=mine")
    run_of(tmp_path / "run", *on, "logging.wandb.project=ours")
    assert (wandb.calls[0][1]["project"], wandb.calls[0][1]["name"]) == ("ours", "mine")


@witness("logging.wandb.tags")
def _(tmp_path: Path, wandb: Any) -> None:
    run_of(tmp_path / "run", "logging.wandb.enabled=true", "training.max_steps=1", "logging.wandb.tags=[a, night]")
    assert wandb.calls[0][1]["tags"] == ["a", "night"]
