"""The page that travels with an exported encoder: what it is, what it was measured to be worth, how it is used."""

from __future__ import annotations

from pathlib import Path

from hjepa.runfolder import METRICS, Values, read_metrics
from hjepa.use.frozen import Encoder

_ROWS = (("this encoder", ""), ("raw pixels", "_pixels"), ("untrained encoder", "_random"))


def figures(checkpoint: Path, step: int) -> tuple[int, Values] | None:
    """The newest evaluation of a run up to a step, and its step; None where no record lies beside the checkpoint."""
    _, evaluations, _ = read_metrics(checkpoint.parent.parent / METRICS)
    found = [at for at, values in evaluations.items() if at <= step and values.get("knn") is not None]
    return (max(found), evaluations[max(found)]) if found else None


def card(encoder: Encoder, name: str) -> str:
    """A model card in Markdown, with the metadata that the hub reads at its top.

    Args:
        encoder: what was exported.
        name: of its folder.
    """
    origin, shape, grid = encoder.origin, encoder.model.shape, encoder.grid
    size, preprocess = encoder.image_size, encoder.preprocess
    sources = ", ".join(dataset.name for dataset in encoder.data.datasets)
    positions = (
        f"rotary positions (theta {encoder.model.rope.theta:g})"
        if encoder.model.rope.use_rope
        else ("learned positions")
    )
    kind = "context encoder" if origin.online or not _has_average(encoder) else "slow average of the context encoder"
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [timm, transformers, hjepa, self-supervised]
---

# {name}

A Vision Transformer pretrained without labels by `hjepa` (Hierarchical Joint-Embedding Predictive Architecture):
the {kind} of the run `{origin.run}` after {origin.step} steps.

| | |
| --- | --- |
| encoder | width {shape.embed_dim}, {shape.depth} blocks, {shape.num_heads} heads, {positions}, no class token |
| images | {size} x {size} pixels, patches of {shape.patch_size}, a grid of {grid.height} x {grid.width} |
| embedding | mean of the final tokens, {encoder.embed_dim} numbers |
| trained on | {sources} |
| preprocessing | shorter side to {size} (bilinear), the square in the middle, mean {list(preprocess.mean)}, \
std {list(preprocess.std)} |
| sha256 of the run's weights | `{origin.sha256}` |

## What it is worth

{_measured(Path(origin.checkpoint), origin.step, origin.online)}

## Use

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}").eval()
embedding = model(**processor(image)).pooler_output  # [1, {encoder.embed_dim}]
```
"""


def _has_average(encoder: Encoder) -> bool:
    return encoder.model.use_target_encoder or encoder.model.use_weight_average


def _measured(checkpoint: Path, step: int, online: bool) -> str:
    found = figures(checkpoint, step)
    if found is None:
        return "No evaluation lay beside the checkpoint it was exported from, so nothing is claimed."
    at, values = found
    lines = ["| | k-NN | linear |", "| --- | --- | --- |"]
    for label, suffix in _ROWS:
        own = "_online" if online and not suffix and values.get("knn_online") is not None else suffix
        cells = (values.get(probe + own) for probe in ("knn", "linear"))
        lines.append(f"| {label} | {' | '.join('-' if cell is None else f'{cell:.1f} %' for cell in cells)} |")
    when = "" if at == step else f", which was before it ended ({step})"
    return (
        f"Accuracy of frozen features on the labelled part of the run's own data, measured by it at step {at}{when}:"
        "\n\n" + "\n".join(lines)
    )
