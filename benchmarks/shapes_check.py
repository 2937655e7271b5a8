"""How hard is the built-in `shapes` source? Run by hand after any change to hjepa/data/shapes.py.

    python benchmarks/shapes_check.py                    # baselines, then supervised training, about 4 minutes
    python benchmarks/shapes_check.py --minutes 3        # and a small self-supervised run (two views, SIGReg)

A good set is hard for pixels and for a random network, and easy for a network that is told the classes: then a
self-supervised encoder has something to win, and wins it quickly.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hjepa.data.shapes import Shapes

BANK, QUERIES = 5000, 1000


def encoder(num_classes: int = 0) -> VisionTransformer:
    return VisionTransformer(
        img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=num_classes,
        class_token=False, global_pool="avg", fc_norm=False,
    )  # fmt: skip


def to_input(images: np.ndarray) -> Tensor:
    """`[n, 3, 64, 64]` uint8 -> float32 around zero."""
    return torch.from_numpy(images).float().div_(255).sub_(0.5).div_(0.25)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20) -> float:
    """Weighted k-NN, in percent: cosine of centred features, weights exp(similarity / 0.07)."""
    mean = bank.mean(0)
    bank, queries = F.normalize(bank - mean, dim=1), F.normalize(queries - mean, dim=1)
    similarity, nearest = (queries @ bank.T).topk(k)
    votes = F.one_hot(bank_labels[nearest], 10) * (similarity / 0.07).exp()[..., None]
    return float((votes.sum(1).argmax(1) == labels).float().mean()) * 100


@torch.no_grad()
def features(model: VisionTransformer, images: np.ndarray) -> Tensor:
    model.eval()
    pooled = [model.forward_features(to_input(part)).mean(1) for part in np.split(images, len(images) // 250)]
    model.train()
    return torch.cat(pooled)


def supervised(data: Shapes, images_seen: int, test: np.ndarray, test_labels: Tensor, batch: int = 32) -> float:
    model = encoder(num_classes=10)
    steps = images_seen // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    started = time.time()
    for step in range(steps):
        indices = np.arange(step * batch, (step + 1) * batch)
        loss = F.cross_entropy(model(to_input(data.images(indices))), torch.from_numpy(data.labels[indices]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                accuracy = float((model(to_input(test)).argmax(1) == test_labels).float().mean()) * 100
            model.train()
            seen = (step + 1) * batch
            print(f"  {seen:6d} images, {time.time() - started:4.0f} s: test {accuracy:.1f} %", flush=True)
    return accuracy


def view(images: Tensor) -> Tensor:
    """One random view per image `[n, 3, 64, 64]` in [0, 1]: crop of 30-100 % of the area, flip, colour jitter."""
    n = len(images)

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high)

    area, aspect = draw(0.3, 1.0), draw(-0.2877, 0.2877).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 2] = width * flip, (1 - width) * draw(-1, 1)
    matrix[:, 1, 1], matrix[:, 1, 2] = height, (1 - height) * draw(-1, 1)
    grid = F.affine_grid(matrix, [n, 3, 64, 64], align_corners=False)
    out = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")

    # Hue and saturation: turn and scale the part of each pixel that is not grey, about the grey axis.
    angle, saturation = draw(-1.26, 1.26), draw(0.4, 1.6) * (torch.rand(n) > 0.2)
    cos, sin = torch.cos(angle) * saturation, torch.sin(angle) * saturation / 3**0.5
    third = (1 - cos) / 3
    row = torch.stack([third + cos, third - sin, third + sin], dim=1)
    turn = torch.stack([row.roll(shift, dims=1) for shift in range(3)], dim=1)
    out = torch.einsum("nij,njhw->nihw", turn, out) * draw(0.6, 1.4)[:, None, None, None]
    mean = out.mean((1, 2, 3), keepdim=True)
    return ((out - mean) * draw(0.6, 1.4)[:, None, None, None] + mean).clamp(0, 1).sub(0.5).div(0.25)


def sigreg(z: Tensor, directions: int = 256, points: int = 17) -> Tensor:
    """Distance of random projections of `[n, d]` from a standard normal, by characteristic functions."""
    t = torch.linspace(0, 3, points)
    along = F.normalize(torch.randn(z.shape[1], directions), dim=0)
    phase = (z @ along)[..., None] * t
    normal = torch.exp(-0.5 * t**2)
    error = (phase.cos().mean(0) - normal) ** 2 + phase.sin().mean(0) ** 2
    return torch.trapezoid(error * normal, t).mean() * len(z)


def self_supervised(data: Shapes, minutes: float, evaluate, weight: float, batch: int) -> None:
    model = encoder()
    projector = nn.Sequential(
        nn.Linear(128, 512), nn.BatchNorm1d(512), nn.GELU(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.GELU(),
        nn.Linear(512, 32),
    )  # fmt: skip
    parameters = [*model.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    pool = data.images(np.arange(len(data)))
    spent, step, told = 0.0, 0, 0.0  # seconds of training: the k-NN figures on the way do not count
    while spent < 60 * minutes:
        started = time.time()
        progress = spent / (60 * minutes)
        lr = 1e-3 * min(1, progress / 0.05 + 0.01) * (0.505 + 0.495 * np.cos(np.pi * progress))
        optimizer.param_groups[0]["lr"] = lr
        images = torch.from_numpy(pool[np.random.randint(len(pool), size=batch)]).float() / 255
        tokens = model.forward_features(torch.cat([view(images), view(images)]))
        z = projector(tokens.mean(1)).unflatten(0, (2, batch))
        agree = (z - z.mean(0)).square().mean()
        spread = (sigreg(z[0]) + sigreg(z[1])) / 2
        loss = (1 - weight) * agree + weight * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        spent += time.time() - started
        if spent >= told + 60 or spent >= 60 * minutes:
            told = spent
            print(
                f"  {spent:4.0f} s, {step} steps: agree {agree:.3f} spread {spread:.3f} k-NN {evaluate(model):.1f} %",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--supervised-images", type=int, default=30_000, help="0 leaves this part out")
    parser.add_argument("--minutes", type=float, default=0.0, help="of self-supervised training; 0 leaves it out")
    parser.add_argument("--pool", type=int, default=20_000, help="images of the self-supervised run")
    parser.add_argument("--sigreg", type=float, default=0.05, help="weight of SIGReg against agreement")
    parser.add_argument("--batch", type=int, default=64, help="images of the self-supervised run's steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)

    train = Shapes(max(BANK, args.pool, args.supervised_images), args.seed, "train")
    test = Shapes(QUERIES, args.seed, "test")
    started = time.time()
    bank, queries = train.images(np.arange(BANK)), test.images(np.arange(QUERIES))
    print(f"rendering: {(BANK + QUERIES) / (time.time() - started):.0f} images/s", flush=True)
    labels = torch.from_numpy(train.labels[:BANK]), torch.from_numpy(test.labels)

    def evaluate(model: VisionTransformer) -> float:
        return knn_accuracy(features(model, bank), labels[0], features(model, queries), labels[1])

    pixels = knn_accuracy(to_input(bank).flatten(1), labels[0], to_input(queries).flatten(1), labels[1])
    print(f"k-NN on raw pixels: {pixels:.1f} % (must be below 40)", flush=True)
    untrained = [evaluate(encoder()) for _ in range(3)]
    print(f"k-NN on untrained ViTs: {', '.join(f'{x:.1f}' for x in untrained)} % (must be below 35)")
    if args.supervised_images:
        print("supervised ViT (must pass 95):")
        supervised(train, args.supervised_images, queries, labels[1])
    if args.minutes:
        print("self-supervised ViT, two views, agreement + SIGReg:")
        self_supervised(train, args.minutes, evaluate, args.sigreg, args.batch)


if __name__ == "__main__":
    main()
