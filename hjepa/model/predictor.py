"""The predictor: from visible tokens and the places of hidden cells to what the target encoder computes there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa.config.model import Model
from hjepa.grid import Grid, cells, pool, sine_positions
from hjepa.masks import Masks
from hjepa.model.backbone import Attention
from hjepa.model.pyramid import TopDown, spread_taps, taps_of_level


class CrossBlock(nn.Module):
    """A transformer block in which queries attend to a context that stays as it is."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries `[B, Nq, dim]`, keys and values `[B, heads, Nc, dim / heads]` -> `[B, Nq, dim]`."""
        query = self.query(self.norm1(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.fused_attn:
            found = F.scaled_dot_product_attention(query, keys, values)
        else:
            found = (query * query.shape[-1] ** -0.5 @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
        x = x + self.proj(found.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Predictor(nn.Module):
    """A narrow transformer; context tokens and the queries of all blocks and levels go through it in one pass.

    With `attention: cross` the context stays outside: the blocks' keys and values of it are one matrix product, and
    queries know nothing of each other.

    A query is a learned vector per level (which says the scale) plus the sine embedding of the cell's centre.
    """

    def __init__(self, config: Model, grid: Grid) -> None:
        super().__init__()
        self.positions: Tensor  # [N, dim] of the patches
        shape = config.shape
        num_taps = len(config.target_layers or spread_taps(shape.depth))
        dim = config.predictor.embed_dim or shape.embed_dim // 2
        self.grid = grid
        self.dim = dim
        self.target_dim = shape.embed_dim
        self.num_levels = config.num_hierarchies
        self.checkpointing = False
        self.embed = nn.Linear(shape.embed_dim, dim)
        self.queries = nn.Parameter(torch.empty(self.num_levels, dim))
        places = sine_positions(grid.coordinates(torch.arange(grid.size)), dim)
        self.register_buffer("positions", places, persistent=False)
        num_heads = config.predictor.num_heads or _heads(dim, shape.embed_dim // shape.num_heads)
        self.blocks = nn.ModuleList()
        for _ in range(config.predictor.depth):
            if config.predictor.attention == "cross":
                self.blocks.append(CrossBlock(dim, num_heads, config.predictor.mlp_ratio))
            else:
                self.blocks.append(Block(dim, num_heads, mlp_ratio=config.predictor.mlp_ratio, qkv_bias=True))
        self.num_heads = num_heads
        self.context_norm = self.context_keys = None
        if config.predictor.attention == "cross":
            self.context_norm = nn.LayerNorm(dim, eps=1e-6)
            self.context_keys = nn.Linear(dim, config.predictor.depth * 2 * dim)
        self.attention = Attention(self.blocks, config.use_flash_attention)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fpn = TopDown(config.fpn, dim, self.num_levels) if config.fpn.use_fpn else None
        head_dim = self.fpn.out_dim if self.fpn else dim
        taps = [len(range(num_taps)[taps_of_level(num_taps, level)]) for level in range(self.num_levels)]
        self.heads = nn.ModuleList(nn.Linear(head_dim, count * shape.embed_dim) for count in taps)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, context: Tensor, masks: Masks) -> list[Tensor]:
        """Predict every hidden cell of every level.

        Args:
            context: `[B, Nc, D]` the context encoder's tokens.
            masks: where they are, and the hidden blocks `[B, M, h, w]`.

        Returns:
            for each level `[B, M, h_l, w_l, T_l, D]`.
        """
        batch, num_masks = masks.targets.shape[:2]
        return [
            head(m).reshape(batch, num_masks, *m.shape[1:3], -1, self.target_dim)
            for head, m in zip(self.heads, self.maps(context, masks), strict=True)
        ]

    def maps(self, context: Tensor, masks: Masks) -> list[Tensor]:
        """What the heads read, for each level `[B M, h_l, w_l, K]`: refined by coarser levels where there is an FPN.

        Args:
            context, masks: as `forward` takes them.
        """
        self.attention.choose(context.device)
        batch = len(context)
        num_masks, h, w = masks.targets.shape[1:]
        seen = self.embed(context) + self.positions[masks.context]
        tokens = []
        places = self.grid.coordinates(masks.targets)
        for level in range(self.num_levels):
            if level == 0:
                centres = self.positions[masks.targets]
            else:
                centres = sine_positions(pool(places, level), self.dim)
            tokens.append(self.queries[level] + centres.flatten(1, 3))
        x = self.norm(self._transform(seen, torch.cat(tokens, dim=1)))

        sizes = [cells(h, w, level) for level in range(self.num_levels)]
        parts = x.split([num_masks * rows * columns for rows, columns in sizes], dim=1)
        maps = [part.reshape(batch * num_masks, *size, self.dim) for part, size in zip(parts, sizes, strict=True)]
        return maps if self.fpn is None else self.fpn(maps)

    def _transform(self, seen: Tensor, queries: Tensor) -> Tensor:
        """What the blocks make of the queries `[B, Nq, dim]`, given the context `[B, Nc, dim]`."""
        if self.context_norm is None or self.context_keys is None:
            x = torch.cat((seen, queries), dim=1)
            for block in self.blocks:
                x = self._block(block, x)
            return x[:, seen.shape[1] :]
        keys = self.context_keys(self.context_norm(seen))
        pairs = keys.unflatten(-1, (len(self.blocks), 2, self.num_heads, -1)).permute(2, 3, 0, 4, 1, 5)
        x = queries
        for block, (key, value) in zip(self.blocks, pairs, strict=True):
            x = self._block(block, x, key, value)
        return x

    def _block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        # What the last block keeps is used at once: to compute it twice would save nothing.
        recomputes = self.checkpointing and torch.is_grad_enabled() and block is not self.blocks[-1]
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False) if recomputes else block(*inputs)
        return out


def _heads(dim: int, head_width: int) -> int:
    """The number of heads nearest to the encoder's head width that divides the predictor's width."""
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    return min(divisors, key=lambda n: abs(dim / n - head_width))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_predictor(config: Model, grid: Grid) -> Predictor:
    """The predictor that belongs to an encoder on this grid."""
    return Predictor(config, grid)
