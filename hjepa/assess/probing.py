"""The probes of `hjepa eval`, one after another, on what was gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hjepa.assess.gather import Key, Tokens
from hjepa.assess.pictures import Pictures
from hjepa.assess.request import NEIGHBOURS, Request
from hjepa.assess.scenes import Segmented
from hjepa.assess.subjects import Subject
from hjepa.config.sections import Evaluation
from hjepa.errors import ConfigError
from hjepa.evaluate import Arithmetic
from hjepa.evaluation import finetune as fine_tuning
from hjepa.evaluation import trained
from hjepa.evaluation.clusters import clusters
from hjepa.evaluation.dense import DenseProbe
from hjepa.evaluation.few_shot import few_shot
from hjepa.evaluation.logistic import logistic
from hjepa.evaluation.probes import accuracy, linear_probe, nearest, vote
from hjepa.evaluation.segmentation import segment
from hjepa.evaluation.task import Figure, Task
from hjepa.grid import Grid
from hjepa.monitor import rankme

# Of training images: what the singular values of wider or longer matrices cost is not worth more digits.
RANKME_ROWS = 2048

Figures = Iterator[tuple[str, Figure]]


def neighbours_of(request: Request, bank: int) -> tuple[int, ...]:
    """The numbers of neighbours to ask for beside the config's own.

    Raises:
        ConfigError: for one that the bank cannot give.
    """
    if request.neighbours is None:
        return tuple(k for k in NEIGHBOURS if k <= bank)
    if request.neighbours[-1] > bank:
        raise ConfigError(f"--k {request.neighbours[-1]}: there are only {bank} training images")
    return request.neighbours


def pooled_probes(task: Task[Tensor], config: Evaluation, request: Request) -> Figures:
    """Every probe of single vectors that was asked for.

    Args:
        task: features without the mean of train.
        config: the settings of k-NN and of the linear probe.
        request: which probes.

    Yields:
        `knn` (with the config's k), `knn@<k>`, `linear`, `logistic`, `sgd`, `shot<k>`, `nmi`, `rankme`; nan where
        features are not finite.
    """
    finite = bool(task.train.isfinite().all() and task.test.isfinite().all())
    for name, figure in _pooled(task if finite else _zeros(task), config, request):
        yield name, figure if finite else Figure(math.nan)


def _zeros(task: Task[Tensor]) -> Task[Tensor]:
    """The same questions without answers, so that every name is there."""
    return task._replace(train=torch.zeros_like(task.train), test=torch.zeros_like(task.test))


def _pooled(task: Task[Tensor], config: Evaluation, request: Request) -> Figures:
    train, train_labels, test, test_labels, num_classes, seed = task
    if request.wants("knn"):
        yield from _neighbours(task, config, request)
    if request.wants("linear") and (config.linear or request.insists("linear")):
        found = linear_probe(
            train, train_labels, test, test_labels, l2=config.linear_l2, num_classes=num_classes, seed=seed
        )
        yield "linear", Figure(found.accuracy, chosen={"l2": found.l2})
    if request.wants("logistic"):
        yield "logistic", logistic(task)
    if request.wants("sgd"):
        recipe = _with_epochs(trained.SGD, request)
        yield "sgd", trained.sgd_linear(task, recipe)
    if request.wants("few-shot"):
        yield from few_shot(task)
    if request.wants("clusters"):
        yield "nmi", clusters(task)
    if request.wants("rankme"):
        # The mean of these rows is not that of all; rankme takes its own away.
        yield "rankme", Figure(float(rankme(train[:: -(-len(train) // RANKME_ROWS)])))


def _neighbours(task: Task[Tensor], config: Evaluation, request: Request) -> Figures:
    knn, bank = config.knn, len(task.train)
    wanted = neighbours_of(request, bank)
    similarity, index = nearest(task.train, task.test, max(knn.k, *wanted))
    for name, k in (("knn", knn.k), *((f"knn@{k}", k) for k in wanted)):
        predicted = vote(
            similarity[:, :k],
            index[:, :k],
            task.train_labels,
            temperature=knn.temperature,
            num_classes=task.num_classes,
        )
        yield name, Figure(accuracy(predicted, task.test_labels))


def _with_epochs(recipe: trained.Recipe, request: Request) -> trained.Recipe:
    return recipe if request.epochs is None else replace(recipe, epochs=request.epochs)


def attentive_probe(
    subject: Subject,
    feature: str,
    sides: tuple[Pictures, Pictures],
    num_classes: int,
    seed: int,
    config: Evaluation,
    request: Request,
) -> Figure:
    """Attentive pooling of a subject's tokens."""
    train, test = (Tokens(side, subject, feature, config.batch_size) for side in sides)
    recipe = _with_epochs(trained.ATTENTIVE, request)
    return trained.attentive(Task(train, sides[0].labels, test, sides[1].labels, num_classes, seed), recipe)


def fine_tuned(
    subject: Subject,
    sides: tuple[Pictures, Pictures],
    num_classes: int,
    seed: int,
    arithmetic: Arithmetic,
    request: Request,
) -> Figure:
    """The subject's encoder after supervised training on the run's own views."""
    assert subject.backbone is not None
    recipe = fine_tuning.Recipe()
    if request.epochs is not None:
        recipe = replace(recipe, epochs=request.epochs)
    train, test = sides
    task: Task[fine_tuning.Images] = Task(train, train.labels, test, test.labels, num_classes, seed)
    return fine_tuning.finetune(subject.backbone, task, arithmetic, recipe)


def patch_probes(
    subject: Subject,
    feature: str,
    segmented: Segmented,
    dense: DenseProbe | None,
    grid: Grid,
    config: Evaluation,
    seed: int,
    device: torch.device,
) -> Figures:
    """Probes of single patches: `miou`, `patch_accuracy` and, of a source with one object each, the run's own two."""

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        return subject.maps(images)[feature].flatten(1, 2)

    if dense is not None:
        yield from ((name, Figure(value)) for name, value in dense(tokens))
    yield from segment(
        tokens,
        segmented.train,
        segmented.test,
        grid=grid,
        num_classes=segmented.num_classes,
        l2=config.linear_l2,
        batch_size=config.batch_size,
        seed=seed,
        device=device,
    )


def task_of(
    features: tuple[dict[Key, Tensor], dict[Key, Tensor]],
    key: Key,
    sides: tuple[Pictures, Pictures],
    num_classes: int,
    seed: int,
    device: torch.device,
) -> Task[Tensor]:
    """Features of a subject as its probes take them; they are let go where they were gathered."""
    train, test = (found.pop(key).to(device).float() for found in features)
    mean = train.mean(0)
    labels = [side.labels.to(device) for side in sides]
    return Task(train - mean, labels[0], test - mean, labels[1], num_classes, seed)
