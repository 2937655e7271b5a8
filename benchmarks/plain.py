"""The step of masked prediction as the field's reference code writes it, to measure ours against.

One target block after another goes through the predictor together with the whole context, attention is an explicit
softmax, the optimizer and the average of the weights walk over the parameters one by one, masks are drawn image by
image, and the loss is read at every step.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hjepa.build import grid_of
from hjepa.config import Config
from hjepa.config.sections import Masking
from hjepa.device import autocasts
from hjepa.grid import Grid, sine_positions
from hjepa.masks import Masks
from hjepa.model.backbone import build_backbone
from hjepa.rng import Int64


class ReferenceMasks:
    """Multi-block masks as I-JEPA's reference code draws them: one image after another.

    A block's corner is drawn so that it never reaches the last row or column, and contexts are cut to the shortest of
    the batch from the top of the image down.
    """

    def __init__(self, config: Masking, grid: Grid) -> None:
        self.config, self.grid = config, grid

    def sample(self, seed: int, step: int, stream: str, positions: Int64) -> Masks:
        """See `BlockMasks.sample`."""
        g = np.random.default_rng([seed, step, int(positions[0])])
        height, width = self.grid.height, self.grid.width

        def block(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
            area, ratio = height * width * g.uniform(*scale), g.uniform(*aspect)
            h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            return max(1, min(h, height - 1)), max(1, min(w, width - 1))

        h, w = block(self.config.mask_scale, self.config.aspect_ratio)
        context_side = block((0.85, 1.0), (1.0, 1.0))
        contexts, targets = [], []
        for _ in positions:
            while True:
                hidden = np.zeros((height, width), bool)
                blocks = []
                for _ in range(self.config.num_masks):
                    top, left = int(g.integers(0, height - h)), int(g.integers(0, width - w))
                    hidden[top : top + h, left : left + w] = True
                    rows, columns = np.arange(top, top + h)[:, None], np.arange(left, left + w)
                    blocks.append(rows * width + columns)
                seen = np.zeros((height, width), bool)
                top, left = (int(g.integers(0, n - c)) for n, c in zip((height, width), context_side, strict=True))
                seen[top : top + context_side[0], left : left + context_side[1]] = True
                context = np.flatnonzero(seen & ~hidden)
                if len(context) >= 4:
                    break
            contexts.append(context)
            targets.append(np.stack(blocks))
        shortest = min(map(len, contexts))
        kept = np.stack([context[:shortest] for context in contexts])
        return Masks(torch.from_numpy(kept), torch.from_numpy(np.stack(targets)))


def at(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens `[B, N, D]` at `[B, K]`."""
    return torch.gather(tokens, 1, indices.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))


def unfused(module: nn.Module) -> nn.Module:
    """The module with the explicit softmax."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]
    return module


class PlainEncoder(nn.Module):
    """A ViT whose hidden tokens are dropped after they were embedded."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vit = unfused(build_backbone(config.model, config.data.image_size).vit)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """`[B, 3, S, S]` -> `[B, K, D]`."""
        x = self.vit.patch_embed(images) + self.vit.pos_embed
        if keep is not None:
            x = at(x, keep)
        for block in self.vit.blocks:  # type: ignore[union-attr]
            x = block(x)
        tokens: Tensor = self.vit.norm(x)  # type: ignore[operator]
        return tokens


class PlainPredictor(nn.Module):
    """Every block of targets with a copy of the context of its own."""

    positions: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        grid, settings, wide = grid_of(config), config.model.predictor, config.model.shape.embed_dim
        dim = settings.embed_dim or wide // 2
        heads = settings.num_heads or config.model.shape.num_heads
        self.embed = nn.Linear(wide, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sine_positions(grid.coordinates(torch.arange(grid.size)), dim)[None])
        blocks = [Block(dim, heads, mlp_ratio=settings.mlp_ratio, qkv_bias=True) for _ in range(settings.depth)]
        self.blocks = unfused(nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, wide)

    def forward(self, context: Tensor, masks: Masks) -> Tensor:
        """`[B, Nc, D]` -> `[M B, h w, D]`, block by block."""
        batch, num_context, _ = context.shape
        positions = self.positions.repeat(batch, 1, 1)
        x = self.embed(context) + at(positions, masks.context)
        blocks = masks.targets.flatten(2).unbind(1)
        queries = torch.cat([at(positions, block) for block in blocks])
        queries = self.mask_token.repeat(*queries.shape[:2], 1) + queries
        x = torch.cat((x.repeat(len(blocks), 1, 1), queries), dim=1)
        for block in self.blocks:  # type: ignore[attr-defined]
            x = block(x)
        tokens: Tensor = self.head(self.norm(x)[:, num_context:])
        return tokens


class PlainStep:
    """One optimizer step on a batch of images that are ready."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.experiment.seed)
        self.masks = ReferenceMasks(config.masking, grid_of(config))
        self.encoder, self.predictor = PlainEncoder(config).to(device), PlainPredictor(config).to(device)
        self.target = deepcopy(self.encoder).requires_grad_(False)
        parameters = [*self.encoder.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False, fused=False)
        self.amp, self.device = autocasts(device.type, config.training.use_amp), device
        size, side = config.data.images_per_step, config.data.image_size
        self.images = torch.randn(size, 3, side, side, device=device)
        self.step = 0

    def __call__(self) -> float:
        """Take it; returns the loss."""
        self.step += 1
        masks = self.masks.sample(0, self.step, "view0", np.arange(len(self.images))).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            with torch.no_grad():
                target = self.target(self.images)
                target = F.layer_norm(target, target.shape[-1:])
                target = torch.cat([at(target, block) for block in masks.targets.flatten(2).unbind(1)])
            predicted = self.predictor(self.encoder(self.images, masks.context), masks)
            loss = F.smooth_l1_loss(predicted, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for fast, slow in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                slow.data.mul_(0.996).add_(0.004 * fast.detach().data)
        return float(loss.detach())
