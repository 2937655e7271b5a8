"""What `hjepa eval` is asked for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from hjepa.errors import ConfigError

QUICK = ("knn", "linear", "few-shot", "clusters", "rankme", "dense")
TRAINED = ("sgd", "attentive", "finetune")
PROBES = ("knn", "linear", "logistic", "sgd", "attentive", "finetune", "few-shot", "clusters", "rankme", "dense")
FEATURES = ("last", "taps", "levels", "fpn")
ENCODERS = ("target", "online", "both")

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Request:
    """What is wanted of a run.

    Attributes:
        run: folder of a run or of a checkpoint.
        overrides: `key=value` of the sections evaluation and data, and device.
        data: folders of images in class folders, or names of sources; empty for the run's own.
        masks: folder of masks, for a single folder of images.
        probes: of `PROBES`; None for the quick ones, as far as they apply.
        features: of `FEATURES`.
        encoder: of `ENCODERS`.
        neighbours: numbers of neighbours beside evaluation.knn.k; None for `NEIGHBOURS`, as far as the bank goes.
        epochs: of the probes that are trained; None for each one's own.
        json: file for all figures.
    """

    run: Path
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    masks: Path | None = None
    probes: tuple[str, ...] | None = None
    features: tuple[str, ...] = ("last", "levels")
    encoder: str = "both"
    neighbours: tuple[int, ...] | None = None
    epochs: int | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be, by name.

        Raises:
            ConfigError: in one line.
        """
        for option, given, known in (
            ("--probes", self.probes or (), PROBES),
            ("--features", self.features, FEATURES),
            ("--encoder", (self.encoder,), ENCODERS),
        ):
            _known(option, given, known)
        for text in self.overrides:
            if "=" not in text:
                raise ConfigError(
                    f"{text!r}: an override has the form key=value; every folder needs a --data of its own"
                )
            if not text.startswith(("evaluation.", "data.", "device=")):
                raise ConfigError(f"{text!r}: an evaluation changes evaluation.*, data.* and device only")
            if self.data and text.startswith(("data.datasets", "data=")):
                raise ConfigError(f"{text!r}: --data names the images already; leave one of them out")
        if self.masks is not None:
            self._check_masks()
        if self.epochs is not None and not any(self.wants(probe) for probe in TRAINED):
            raise ConfigError(f"--epochs: none of the probes asked for is trained ({', '.join(TRAINED)} are)")
        if self.neighbours is not None and not self.wants("knn"):
            raise ConfigError("--k: k-NN is not among the probes asked for")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ConfigError(f"--json {self.json}: no such folder {self.json.absolute().parent}")

    def _check_masks(self) -> None:
        if len(self.data) != 1:
            raise ConfigError(f"--masks {self.masks}: belong to one folder of images; name it with --data")
        other = [probe for probe in self.probes or () if probe != "dense"]
        if other:
            raise ConfigError(f"--probes {other[0]}: images with --masks have no labels of their own; only dense looks")

    def wants(self, probe: str) -> bool:
        """Whether a probe is to be run where it can be."""
        if self.masks is not None:
            return probe == "dense"
        return probe in (QUICK if self.probes is None else self.probes)

    def insists(self, probe: str) -> bool:
        """Whether it was asked for by name, so that leaving it out is an error."""
        return self.probes is not None and set(self.probes) != set(PROBES) and probe in self.probes


def words(text: str, option: str, everything: Sequence[str]) -> tuple[str, ...]:
    """`a,b` or `all` -> names, each once.

    Raises:
        ConfigError: where there is none.
    """
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise ConfigError(f"{option}: names none; choose from {', '.join(everything)}, or all")
    return tuple(everything) if found == ("all",) else found


def numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,20` -> positive numbers, each once.

    Raises:
        ConfigError: naming what is none.
    """
    found = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise ConfigError(f"{option} {text}: {word.strip()!r} is no number of neighbours; write {option} 1,20,200")
        found.append(int(word))
    return tuple(sorted(set(found)))


def _known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for word in given:
        if word not in known:
            close = get_close_matches(word, known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise ConfigError(f"{option} {word}: there is no such choice; {advice}")
