"""H-JEPA: the context encoder sees part of a view, the predictor says what the target encoder makes of the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.schema import Model, Projector
from hjepa.distributed import gather_batch
from hjepa.grid import Grid
from hjepa.masks import Masks
from hjepa.model.encoder import ContextEncoder, TargetEncoder, build_encoders, take
from hjepa.model.predictor import create_predictor
from hjepa.model.pyramid import level_targets, spread_taps


class Output(NamedTuple):
    """What the objective compares.

    Attributes:
        predictions: for each level `[V B, M, h_l, w_l, T_l, D]`.
        targets: the same shapes, without gradient.
        embeddings: `[V, B, K]` projected pooled context tokens of each view, of the whole batch over all processes;
            None without an image level. With one view, the target encoder's embedding of it (no gradient) is the
            second, so that there is something to agree with.
        target_taps: `[V B, N, T, D]` raw outputs of the tapped blocks, for the monitors.
        target_tokens: `[V B, N, D]` the target encoder's final tokens, likewise.
    """

    predictions: list[Tensor]
    targets: list[Tensor]
    embeddings: Tensor | None
    target_taps: Tensor
    target_tokens: Tensor


class HJEPA(nn.Module):
    """Encoder pair, predictor, and (for losses that act on it) a projector of the pooled embedding."""

    def __init__(self, config: Model, grid: Grid, image_level: bool = False) -> None:
        """Build from the config's `model` section.

        Args:
            config: the section.
            grid: patches of a view.
            image_level: whether the loss compares pooled embeddings of views.
        """
        super().__init__()
        shape = config.shape
        self.grid = grid
        self.num_levels = config.num_hierarchies
        self.taps = tuple(config.target_layers or spread_taps(shape.depth))
        self.context_encoder: ContextEncoder
        self.target_encoder: TargetEncoder
        self.context_encoder, self.target_encoder = build_encoders(config, grid.height * shape.patch_size)
        self.predictor = create_predictor(config, grid)
        self.projector = projector(config.projector, shape.embed_dim) if image_level else None

    def forward(self, images: Tensor, masks: Masks) -> Output:
        """Predict hidden targets and embed visible contexts.

        Args:
            images: `[V, B, 3, S, S]` normalised views.
            masks: `[V B, ...]`, view by view.
        """
        num_views = images.shape[0]
        flat = images.flatten(0, 1)
        whole = self.target_encoder(flat, taps=self.taps)
        seen = self.context_encoder(flat, keep=masks.context).tokens

        taps = torch.stack(whole.taps, dim=2)  # [V B, N, T, D]
        hidden = take(taps.flatten(2), masks.targets.flatten(1))
        maps = hidden.unflatten(1, masks.targets.shape[1:]).unflatten(-1, taps.shape[2:])
        embeddings = None
        if self.projector is not None:
            pooled = seen.mean(dim=1).unflatten(0, (num_views, -1))
            if num_views == 1:
                pooled = torch.cat((pooled, whole.tokens.mean(dim=1).unsqueeze(0)))
            pooled = gather_batch(pooled, dim=1)
            # One call per view: batch norm must not mix the statistics of views.
            embeddings = torch.stack([self.projector(view) for view in pooled])
            if num_views == 1:
                embeddings = torch.stack((embeddings[0], embeddings[1].detach()))
        return Output(self.predictor(seen, masks), level_targets(maps, self.num_levels), embeddings, taps, whole.tokens)

    def update_target(self, momentum: float | Tensor) -> None:
        """Move the target encoder towards the context encoder; once per optimizer step, after it."""
        self.target_encoder.update(self.context_encoder, momentum)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks of context encoder and predictor in the backward pass; gradients stay the same."""
        self.context_encoder.backbone.checkpointing = enabled
        self.predictor.checkpointing = enabled

    @torch.no_grad()
    def embed(self, images: Tensor, online: bool = False) -> dict[str, Tensor]:
        """Embeddings of whole images by the frozen encoder, for probes.

        Args:
            images: `[B, 3, S, S]` normalised.
            online: use the context encoder in place of its slow average.

        Returns:
            `last` `[B, D]`: mean of the final tokens; `tap<k>` `[B, D]`: mean of the layer-normalised output of
            block k; `level<l>` `[B, T_l D]`: mean of the level's targets over the grid.
        """
        encoder = self.context_encoder if online else self.target_encoder
        encoded = encoder(images, taps=self.taps)
        taps = torch.stack(encoded.taps, dim=2)  # [B, N, T, D]
        out = {"last": encoded.tokens.mean(dim=1)}
        means = F.layer_norm(taps.float(), taps.shape[-1:]).mean(dim=1)
        out |= {f"tap{tap}": means[:, i] for i, tap in enumerate(self.taps)}
        maps = taps.unflatten(1, (self.grid.height, self.grid.width))
        for level, targets in enumerate(level_targets(maps, self.num_levels)):
            out[f"level{level}"] = targets.mean(dim=(1, 2)).flatten(1)
        return out


def projector(config: Projector, dim: int) -> nn.Sequential:
    """MLP with batch norm on batch statistics: `[B, D]` -> `[B, K]`.

    It is only ever used in training and on the whole batch, so running statistics have no reader.
    """
    layers: list[nn.Module] = []
    for _ in range(config.depth):
        layers += [
            nn.Linear(dim, config.hidden_dim, bias=False),
            nn.BatchNorm1d(config.hidden_dim, track_running_stats=False),
            nn.ReLU(inplace=True),
        ]
        dim = config.hidden_dim
    return nn.Sequential(*layers, nn.Linear(dim, config.output_dim))
