"""H-JEPA: the context encoder sees part of a view, the predictor says what the target encoder makes of the rest.

Two parts can be left out. Without a target encoder, targets are what the context encoder itself computes, and
without prediction nothing but views of one image is compared; both together are LeJEPA (arXiv 2511.08544).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.model import Model, Projector
from hjepa.config.types import Blocks
from hjepa.distributed import gather_batch
from hjepa.grid import Grid
from hjepa.masks import Masks
from hjepa.model.backbone import Encoded, take
from hjepa.model.encoder import ContextEncoder, TargetEncoder, build_encoders
from hjepa.model.predictor import create_predictor
from hjepa.model.pyramid import level_targets, spread_taps


class Output(NamedTuple):
    """What the objective compares.

    Attributes:
        predictions: for each level `[V B', M, h_l, w_l, T_l, D]`; empty without prediction. B' is B, or less where
            not every image is predicted.
        targets: the same shapes, without gradient.
        embeddings: `[V + C, B, K]` projected pooled tokens, of the whole batch over all processes: the contexts of
            the V views, then the C local crops; None without an image level. With one view and no crop, the target
            encoder's embedding of it (no gradient) is the second, so that there is something to agree with.
        target_taps: `[V B', N, T, D]` raw outputs of the tapped blocks, without gradient, for the monitors; without
            prediction, the context's, averaged over its places (N = 1).
        target_tokens: `[V B', N, D]` the final tokens, likewise.
        num_global: how many of the embeddings are not of local crops.
    """

    predictions: list[Tensor]
    targets: list[Tensor]
    embeddings: Tensor | None
    target_taps: Tensor
    target_tokens: Tensor
    num_global: int


class HJEPA(nn.Module):
    """Encoder pair, predictor, and (for losses that act on it) a projector of the pooled embedding."""

    def __init__(
        self, config: Model, grid: Grid, image_level: bool = False, predicts: bool = True, every: int = 1
    ) -> None:
        """Build from the config's `model` section.

        Args:
            config: the section.
            grid: patches of a view.
            image_level: whether the loss compares pooled embeddings of views.
            predicts: whether the loss compares predictions with targets.
            every: in training, only every n-th image of a batch is predicted.
        """
        super().__init__()
        shape = config.shape
        self.grid = grid
        self.num_levels = config.num_hierarchies
        self.every = every
        self.compiled = False
        self.taps = tuple(config.target_layers or spread_taps(shape.depth))
        context, target = build_encoders(config, grid.height * shape.patch_size)
        self.context_encoder: ContextEncoder = context
        self.target_encoder: TargetEncoder | None = target if config.use_target_encoder else None
        # Moves as a target encoder does and is asked by probes alone.
        averages = config.use_weight_average and not config.use_target_encoder
        self.average_encoder: TargetEncoder | None = target if averages else None
        self.predictor = create_predictor(config, grid) if predicts else None
        self.projector = projector(config.projector, shape.embed_dim) if image_level else None

    def forward(self, images: Tensor, masks: Masks, crops: Tensor | None = None) -> Output:
        """Predict hidden targets and embed visible contexts.

        Args:
            images: `[V, B, 3, S, S]` normalised views.
            masks: `[V B, ...]`, view by view.
            crops: `[C, B, 3, s, s]` normalised local crops, if there are any.
        """
        num_views = images.shape[0]
        flat = images.flatten(0, 1)
        if self.predictor is None:
            context = self.context_encoder(flat, keep=masks.context, taps=self.taps)
            taps = torch.stack([tap.detach().mean(dim=1, keepdim=True) for tap in context.taps], dim=2)
            embeddings = self._embeddings(context.tokens, None, crops, num_views)
            return Output([], [], embeddings, taps, context.tokens.detach(), num_views)

        seen = self.context_encoder(flat, keep=masks.context).tokens

        def asked(rows: Tensor) -> Tensor:
            if self.every == 1:
                return rows
            by_view: Tensor = rows.unflatten(0, (num_views, -1))
            return by_view[:, :: self.every].flatten(0, 1)

        whole = self._targets(asked(flat))
        masks = Masks(asked(masks.context), asked(masks.targets))
        taps = torch.stack(whole.taps, dim=2)  # [V B', N, T, D]
        hidden = take(taps.flatten(2), masks.targets.flatten(1))
        maps = hidden.unflatten(1, masks.targets.shape[1:]).unflatten(-1, taps.shape[2:])
        return Output(
            self.predictor(asked(seen), masks),
            level_targets(maps, self.num_levels),
            self._embeddings(seen, whole.tokens, crops, num_views),
            taps,
            whole.tokens,
            2 if num_views == 1 and crops is None else num_views,
        )

    def _targets(self, images: Tensor) -> Encoded:
        """What is to be predicted: the whole view as the target encoder sees it, or the context encoder itself."""
        if self.target_encoder is not None:
            encoded: Encoded = self.target_encoder(images, taps=self.taps)
            return encoded
        training = self.context_encoder.training
        self.context_encoder.eval()
        with torch.no_grad():
            encoded = self.context_encoder(images, taps=self.taps)
        self.context_encoder.train(training)
        return encoded

    def _embeddings(self, seen: Tensor, whole: Tensor | None, crops: Tensor | None, num_views: int) -> Tensor | None:
        """Projected means of tokens, see `Output.embeddings`."""
        if self.projector is None:
            return None
        parts = list(seen.mean(dim=1).unflatten(0, (num_views, -1)))
        if crops is not None:
            of_crops = self.context_encoder(crops.flatten(0, 1)).tokens.mean(dim=1)
            parts += of_crops.unflatten(0, crops.shape[:2])
        alone = len(parts) == 1
        if alone:
            assert whole is not None
            parts.append(whole.mean(dim=1))
        # One call per view: batch norm must not mix the statistics of views.
        embeddings = [self.projector(view) for view in gather_batch(torch.stack(parts), dim=1)]
        if alone:
            embeddings[1] = embeddings[1].detach()
        return torch.stack(embeddings)

    def update_target(self, momentum: float | Tensor) -> None:
        """Move the slow encoder, if there is one, towards the context encoder; once per step, after it."""
        if self.slow_encoder is not None:
            self.slow_encoder.update(self.context_encoder, momentum)

    @property
    def slow_encoder(self) -> TargetEncoder | None:
        """The average of the context encoder's weights, whether it is the target or not."""
        return self.target_encoder or self.average_encoder

    def set_gradient_checkpointing(self, blocks: Blocks) -> None:
        """Recompute blocks of context encoder, predictor or both in the backward pass; gradients stay the same."""
        self.context_encoder.backbone.checkpointing = blocks in (True, "encoder")
        if self.predictor is not None:
            self.predictor.checkpointing = blocks in (True, "predictor")

    def compile_blocks(self) -> None:
        """Compile every transformer block where it stands; those of one shape share what is compiled.

        By block and not as a whole: 12 blocks take the time of one, and what lies between them (which patches are kept,
        which blocks are tapped or computed twice) stays plain Python.
        """
        # One for each shape, arithmetic and rate of dropped paths; what came after the eighth would stay as it is, with
        # no more than a warning.
        torch._dynamo.config.recompile_limit = 256
        # Among several processes torch would cut what it compiles where a bucket of gradients is full: within each
        # block, though between blocks there is room enough for sending.
        torch._dynamo.config.optimize_ddp = False
        self.compiled = True
        backbones = [encoder.backbone for encoder in (self.context_encoder, self.slow_encoder) if encoder is not None]
        for block in [block for backbone in backbones for block in backbone.vit.blocks]:
            block.compile()
        if self.predictor is not None:
            for block in self.predictor.blocks:
                block.compile()

    @torch.no_grad()
    def embed(self, images: Tensor, online: bool = False) -> dict[str, Tensor]:
        """Embeddings of whole images by the frozen encoder, for probes.

        Args:
            images: `[B, 3, S, S]` normalised.
            online: use the context encoder in place of its slow average (it is used anyway where there is none).

        Returns:
            `last` `[B, D]`: mean of the final tokens; `tap<k>` `[B, D]`: mean of the layer-normalised output of
            block k; `level<l>` `[B, T_l D]`: mean of the level's targets over the grid.
        """
        encoded = self._frozen(images, online)
        taps = torch.stack(encoded.taps, dim=2)  # [B, N, T, D]
        out = {"last": encoded.tokens.mean(dim=1)}
        means = F.layer_norm(taps.float(), taps.shape[-1:]).mean(dim=1)
        out |= {f"tap{tap}": means[:, i] for i, tap in enumerate(self.taps)}
        maps = taps.unflatten(1, (self.grid.height, self.grid.width))
        for level, targets in enumerate(level_targets(maps, self.num_levels)):
            out[f"level{level}"] = targets.mean(dim=(1, 2)).flatten(1)
        return out

    @torch.no_grad()
    def patches(self, images: Tensor, online: bool = False) -> Tensor:
        """Final tokens of whole images by the frozen encoder: `[B, 3, S, S]` -> `[B, N, D]`; see `embed`."""
        return self._frozen(images, online).tokens

    @torch.no_grad()
    def maps(self, images: Tensor, online: bool = False) -> dict[str, Tensor]:
        """Every feature of whole images as a map, by the frozen encoder.

        Args:
            images, online: see `embed`.

        Returns:
            `last` `[B, h, w, D]`: the final tokens; `level<l>` `[B, h_l, w_l, T_l D]`: the level's targets, at level 0
            the taps side by side; with an FPN `fpn` `[B, h, w, K]`: its finest map where the predictor is shown the
            whole image and asked for all of it.
        """
        encoded = self._frozen(images, online)
        size = (self.grid.height, self.grid.width)
        out = {"last": encoded.tokens.unflatten(1, size)}
        taps = torch.stack(encoded.taps, dim=2).unflatten(1, size)
        out |= {f"level{level}": m.flatten(-2) for level, m in enumerate(level_targets(taps, self.num_levels))}
        if self.predictor is not None and self.predictor.fpn is not None:
            every = torch.arange(self.grid.size, device=images.device).expand(len(images), -1)
            masks = Masks(every, every.unflatten(1, (1, *size)))
            with self._uncompiled():
                out["fpn"] = self.predictor.maps(encoded.tokens, masks)[0]
        return out

    def _frozen(self, images: Tensor, online: bool) -> Encoded:
        """Whole images as the encoder sees them that probes look at, with all taps."""
        encoder = self.context_encoder if online or self.slow_encoder is None else self.slow_encoder
        with self._uncompiled():
            encoded: Encoded = encoder(images, taps=self.taps)
        return encoded

    def _uncompiled(self) -> AbstractContextManager[object]:
        """For probes: their batches have shapes of their own, too few to be worth compiling."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()


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
