"""A linear classifier of a run's embeddings as a file, and what is said when it does not belong to the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hjepa.errors import DataError, StorageError
from hjepa.evaluation.few_labels import Accuracy, Linear
from hjepa.replacing import replacing
from hjepa.use.frozen import Encoder, Origin

_KEY = "hjepa"


@dataclass(frozen=True)
class Classifier:
    """What `hjepa classify` learned from labelled images.

    Attributes:
        origin: the encoder whose embeddings it takes.
        classes: names, in the order of its columns.
        counts: labelled images of each class that it was fitted to.
        linear: the classifier.
        accuracies: by cross-validation when it was fitted: of `encoder`, `pixels` and `untrained`.
        most_frequent: accuracy of always naming the most frequent class of the same images, in percent.
    """

    origin: Origin
    classes: list[str]
    counts: list[int]
    linear: Linear
    accuracies: dict[str, Accuracy]
    most_frequent: float

    def save(self, path: Path) -> None:
        """Write `weight` `[D, C]` and `bias` `[C]` float32, the rest as JSON in the file's metadata.

        Raises:
            StorageError: when the disk refuses.
        """
        said = {
            **asdict(self.origin),
            "classes": self.classes,
            "counts": self.counts,
            "accuracies": {name: asdict(accuracy) for name, accuracy in self.accuracies.items()},
            "most_frequent": self.most_frequent,
        }
        tensors = {name: tensor.float().contiguous() for name, tensor in self.linear._asdict().items()}
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, {_KEY: json.dumps(said)})
            except SafetensorError as error:
                raise OSError(str(error)) from None

    def check(self, path: Path, encoder: Encoder) -> None:
        """Refuse an encoder that it was not fitted to.

        Raises:
            StorageError: saying whose it is.
        """
        mine, other = self.origin, encoder.origin
        if (mine.sha256, mine.online) != (other.sha256, other.online):
            raise StorageError(
                f"{path}: made with other weights than these ({_named(mine)}; here {_named(other)}); name its "
                f"checkpoint ({mine.checkpoint}), or fit it again"
            )


def load_classifier(path: Path) -> Classifier:
    """Read a classifier back.

    Raises:
        DataError: when it is missing, damaged, or nobody's that `hjepa classify` made.
    """
    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()[_KEY])
            linear = Linear(*(file.get_tensor(name).double() for name in Linear._fields))
        origin = Origin(**{field.name: said[field.name] for field in fields(Origin)})
        classes, counts = [str(name) for name in said["classes"]], [int(count) for count in said["counts"]]
        accuracies = {name: Accuracy(**values) for name, values in said["accuracies"].items()}
        found = Classifier(origin, classes, counts, linear, accuracies, float(said["most_frequent"]))
        if linear.weight.shape[1:] != linear.bias.shape or linear.bias.shape != (len(classes),):
            raise ValueError(f"{len(classes)} classes, but weights {list(linear.weight.shape)}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in linear):
            raise ValueError("its weights are not finite")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; hjepa classify RUN LABELLED makes it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a classifier made by hjepa classify ({reason})") from None
    return found


def _named(origin: Origin) -> str:
    return f"step {origin.step} of {origin.run}{', the online encoder' if origin.online else ''}"
