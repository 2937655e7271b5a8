"""`hjepa eval`, from the words of the command line to the last table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hjepa.assess import probing
from hjepa.assess.gather import pooled_features
from hjepa.assess.outcome import Outcome
from hjepa.assess.pictures import Pictures
from hjepa.assess.request import PROBES, TRAINED, Request
from hjepa.assess.scenes import Segmented, of_folders, of_source
from hjepa.assess.sources import datasets_of, open_labelled
from hjepa.assess.subjects import Subject, build_subjects, feature_names, title
from hjepa.build import grid_of
from hjepa.config import Config, resolve
from hjepa.console import Console
from hjepa.data.views import plain_views
from hjepa.device import choose, precision
from hjepa.environment import environment
from hjepa.errors import ConfigError
from hjepa.evaluate import arithmetic_of
from hjepa.evaluation.chosen import Probe, choose_sides, with_masks
from hjepa.evaluation.dense import DenseProbe
from hjepa.evaluation.few_shot import SHOTS, too_few
from hjepa.evaluation.segmentation import MOST_PATCHES
from hjepa.quarantine import Quarantine
from hjepa.weights import Weights, find_weights


def assess(request: Request) -> Outcome:
    """Probe the encoder of a run, show what it is worth, and write it down where that was asked for.

    Raises:
        ConfigError, DataError, StorageError: in one line, for everything that the user can mend.
    """
    console = Console()
    saved = find_weights(request.run, console.warn)
    outcome = _Assessment(request, saved, console).outcome()
    outcome.show(console)
    if request.json is not None:
        outcome.write(request.json)
        console.say(f"Figures: {request.json}")
    return outcome


class _Assessment:
    """What one evaluation works with."""

    def __init__(self, request: Request, saved: Weights, console: Console) -> None:
        self.request, self.saved, self.console = request, saved, console
        self.config = _config_of(saved, request)
        kind = choose(self.config.device)
        precision(kind, self.config.training.use_amp)  # or a line that says why not
        self.device = torch.device(kind.name)
        # Half of the probes are float64, which mps lacks.
        self.probe_device = torch.device("cpu") if kind.name == "mps" else self.device
        self.seed, self.grid = self.config.experiment.seed, grid_of(self.config)
        self.names = feature_names(self.config, request.features)
        self.quarantine = Quarantine(None, console)
        self.result = Outcome(self._about())

    def outcome(self) -> Outcome:
        """Run everything that was asked for."""
        if self.request.masks is not None:
            segmented = self._with_masks(Path(self.request.data[0]), self.request.masks)
            self._probe_patches(self._subjects(), segmented, None)
        else:
            datasets = datasets_of(self.request.data, self.config.data.datasets)
            self.result.about["data"] = [d.model_dump(mode="json", exclude_defaults=True) for d in datasets]
            pairs, notes = open_labelled(datasets, self.config.data, self.seed)
            self.result.notes += notes
            self.quarantine.watch([source for pair in pairs for source in pair])
            self._probe_images(pairs)
        self.quarantine.write(self.saved.step)
        return self.result

    def _probe_images(self, pairs: list[Probe]) -> None:
        """Everything that is asked of labelled images."""
        evaluation, request = self.config.evaluation, self.request
        masked = with_masks(pairs)
        if masked is None and request.insists("dense"):
            raise ConfigError(
                "--probes dense: none of the sources has masks (shapes has); or name --data IMAGES --masks MASKS"
            )
        num_classes = sum(bank.num_classes for bank, _ in pairs)
        train, test = (
            Pictures(part, self.config.data, self.seed, self.device)
            for part in choose_sides(pairs, evaluation.max_train, evaluation.max_test, self.seed)
        )
        if request.wants("knn"):
            probing.neighbours_of(request, len(train))
        self.result.about |= {"images": {"train": len(train), "test": len(test)}, "classes": num_classes}
        self.console.say(f"Images: {len(train)} to learn from, {len(test)} to ask, {num_classes} classes")
        subjects = self._subjects()
        if any(request.wants(probe) for probe in PROBES if probe != "dense"):
            self._probe_features(subjects, (train, test), num_classes)
        if masked is not None and request.wants("dense") and (evaluation.dense or request.insists("dense")):
            views = plain_views(self.config.data.augmentation, self.config.data.image_size).to(self.device)
            dense = DenseProbe(evaluation, self.grid, masked, views, self.seed, self.device, self.probe_device)
            self._probe_patches(subjects, of_source(masked, self.config.data, self.seed, self.device), dense)

    def _probe_features(self, subjects: list[Subject], sides: tuple[Pictures, Pictures], num_classes: int) -> None:
        evaluation, request, add = self.config.evaluation, self.request, self.result.add
        if request.wants("finetune") or request.wants("attentive"):
            for side in sides:
                side.hold(self.config.data.cache_gb * 1e9 / len(sides))
        bar = self.console.bar("Features", sum(len(side) for side in sides))
        with self.console:
            train = pooled_features(sides[0], subjects, evaluation.batch_size, bar.update)
            test = pooled_features(
                sides[1], subjects, evaluation.batch_size, lambda done: bar.update(len(sides[0]) + done)
            )
            bar.close()
        if request.wants("few-shot"):
            told = {k: too_few(sides[0].labels, num_classes, k) for k in SHOTS}
            self.result.notes += [f"few-shot with {k} per class left out: {why}" for k, why in told.items() if why]
        arithmetic = arithmetic_of(self.config, self.device)
        for key in list(train):
            self._tell(*key)
            subject = next(one for one in subjects if one.name == key[0])
            task = probing.task_of((train, test), key, sides, num_classes, self.seed, self.probe_device)
            for name, figure in probing.pooled_probes(task, evaluation, request):
                add(*key, name, figure)
            if request.wants("attentive"):
                figure = probing.attentive_probe(subject, key[1], sides, num_classes, self.seed, evaluation, request)
                add(*key, "attentive", figure)
        for subject in subjects:
            if request.wants("finetune") and subject.backbone is not None:
                self._tell(subject.name, "last", "fine-tuning")
                figure = probing.fine_tuned(subject, sides, num_classes, self.seed, arithmetic, request)
                add(subject.name, "last", "finetune", figure)

    def _tell(self, subject: str, feature: str, what: str = "probing") -> None:
        """Where it is, for whoever waits for probes that take minutes."""
        if any(self.request.wants(probe) for probe in TRAINED):
            self.console.say(f"{what.capitalize()}: {title(subject, feature)}")

    def _probe_patches(self, subjects: list[Subject], segmented: Segmented, dense: DenseProbe | None) -> None:
        """Features whose map has a cell for every patch."""
        evaluation = self.config.evaluation
        for subject in subjects:
            for feature in ["last"] if subject.name == "pixels" else self.names:
                if feature not in ("last", "level0", "fpn"):
                    continue
                for name, figure in probing.patch_probes(
                    subject, feature, segmented, dense, self.grid, evaluation, self.seed, self.probe_device
                ):
                    self.result.add(subject.name, feature, name, figure)

    def _with_masks(self, images: Path, masks: Path) -> Segmented:
        evaluation = self.config.evaluation
        most = min(evaluation.max_train, max(1, MOST_PATCHES // self.grid.size)), evaluation.max_test
        segmented = of_folders(images, masks, self.config.data, self.seed, self.device, most)
        self.quarantine.watch(segmented.sources)
        counts = segmented.train.size, segmented.test.size
        self.result.about |= {
            "data": {"images": str(images), "masks": str(masks)},
            "images": {"train": counts[0], "test": counts[1]},
            "classes": segmented.num_classes,
        }
        self.console.say(
            f"Images: {counts[0]} to learn from, {counts[1]} to ask, {segmented.num_classes} classes of pixels"
        )
        return segmented

    def _subjects(self) -> list[Subject]:
        subjects = build_subjects(self.config, self.saved, self.names, self.request.encoder, self.device)
        if self.config.model.pretrained and subjects[-1].name != "start":
            self.result.notes.append(
                f"model.pretrained={self.config.model.pretrained} cannot be read any more: no row of the weights that "
                "training started from"
            )
        return subjects

    def _about(self) -> dict[str, Any]:
        evaluation = self.config.evaluation.model_dump(mode="json", exclude={"eval_frequency"})
        return {
            "run": str(self.request.run),
            "name": self.config.experiment.name,
            "checkpoint": str(self.saved.path.absolute()),
            "step": self.saved.step,
            "sha256": self.saved.sha256,
            "environment": environment(self.device),
            "settings": {"seed": self.seed, "encoder": self.request.encoder, "evaluation": evaluation},
        }


def _config_of(saved: Weights, request: Request) -> Config:
    """The config that the checkpoint was trained with, and what the command line says of data and evaluation."""
    # eval_frequency=0 is for runs that are not evaluated; this one is.
    words = ["evaluation.eval_frequency=1", *request.overrides]
    return resolve(saved.config, words, f"config of {saved.path}")
