"""What became of a value of the first H-JEPA project's configs, where that takes more than a new name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from hjepa.config.data import folder_section
from hjepa.config.legacy import DROPPED, LOSS_TYPES, READ, REFUSED, RENAMED
from hjepa.config.old import PREDICTIONS, Old, plain
from hjepa.config.schema import Config
from hjepa.config.walk import flat, general, leaves

KEYS = frozenset(leaf.key for leaf in leaves())
"""The settings there are."""

_DISTANCE = "loss.type says which distance; under combined and sigreg it is smooth L1"

_CLASS_FOLDERS = ("imagenet", "imagefolder")

# No interval of epochs was ever this long; it was meant in steps.
_STEPS = 100


class Became(NamedTuple):
    """What a setting turned into.

    Attributes:
        settings: new settings and their values, the one that holds its meaning first; none if it was dropped.
        note: what a reader should know; the reason where it was dropped.
    """

    settings: dict[str, Any]
    note: str = ""


def is_known(key: str) -> bool:
    """Whether a key is of the old or the new vocabulary."""
    name = plain(key)
    return general(key) in KEYS or name in RENAMED or name in DROPPED or name in _VALUES or is_refused(key, None)


def is_refused(key: str, value: Any) -> bool:
    """Whether a setting belongs to a world model with actions."""
    name = plain(key)
    section = name.partition(".")[0]
    if section in REFUSED:
        return True
    return name in REFUSED and (not REFUSED[name] or value in REFUSED[name])


def convert(key: str, value: Any, old: Old) -> Became | None:
    """What a setting turned into; None for a key of neither vocabulary.

    Raises:
        TypeError, ValueError, OverflowError: the value is not of the kind that the key took.
    """
    name = plain(key)
    if name == "data" and isinstance(value, str):
        return Became(dict(flat({name: folder_section(value)})))
    if value is None and name in _SECTIONS:
        return Became({}, "an empty section")
    if name.startswith("data.multicrop.") and old.no_local_crops:
        return Became({}, f"{old.no_local_crops} is false")
    if name in _VALUES:
        return _VALUES[name](key, value, old)
    if general(key) in KEYS:
        return Became({key: value})
    if name in RENAMED:
        return Became({RENAMED[name]: value})
    if name in DROPPED:
        return Became({}, DROPPED[name])
    # Left to the loader, which says what belongs into a section.
    return Became({key: value}) if name in _SECTIONS else None


def place(key: str) -> tuple[int, bool, int]:
    """Order among spellings of one setting: what the old program read, then today's name, then as in the table."""
    name = plain(key)
    read = READ.index(name) if name in READ else len(READ)
    return read, general(key) not in KEYS, _ORDER.get(name, len(_ORDER))


def _target(key: str) -> str:
    return RENAMED.get(plain(key), key)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(key: str, value: Any, old: Old) -> Became:
    if not isinstance(value, str):
        return Became({"experiment.name": value})
    fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", value).lstrip("._-")
    if not fitting:
        return Became({}, "a name holds letters, digits, dot, dash, underscore")
    return Became({"experiment.name": fitting}, "" if fitting == value else "a name is part of a path here")


def _checkpoint_dir(key: str, value: Any, old: Old) -> Became:
    if isinstance(value, str) and re.search(r"[^/]/checkpoints/*$", value):
        return Became({_target(key): re.sub(r"/checkpoints/*$", "", value)}, "checkpoints lie in its checkpoints/")
    return Became({_target(key): value or None}, "the folder of the whole run; checkpoints lie in its checkpoints/")


def _keep(key: str, value: Any, old: Old) -> Became:
    if _is_count(value) and value < 2:
        return Became({_target(key): 2}, "one to fall back on is always kept")
    return Became({_target(key): value})


def _save_frequency(key: str, value: Any, old: Old) -> Became:
    if float(value) >= _STEPS and float(value) > old.epochs:
        return Became({"checkpoint.save_frequency_steps": value}, "longer than the run in epochs, so it means steps")
    return Became({"checkpoint.save_frequency": value})


def _metric(key: str, value: Any, old: Old) -> Became:
    if value in ("knn", "linear", "loss", None):
        return Became({key: value})
    return Became({}, "nothing read it; knn, linear or loss keeps the best checkpoint here")


def _dataset(key: str, value: Any, old: Old) -> Became:
    listed = key != "data.dataset"
    if listed != old.uses_list:
        return Became({}, "data.datasets says it" if old.uses_list else _why_single(old))
    entry = key.removesuffix(".name") if listed else "data.datasets[0]"
    name = value.lower() if isinstance(value, str) else value
    settings, notes = {f"{entry}.name": name}, []
    if name == "imagenet100":
        settings[f"{entry}.name"] = "imagefolder"
        notes.append("a folder of classes, read as it is: if all of ImageNet lies there, all of it is used")
    common = old.get("data.data_path")
    if settings[f"{entry}.name"] in _CLASS_FOLDERS and listed and common and not old.get(f"{entry}.path"):
        settings[f"{entry}.path"] = common
    if name == "stl10" and old.is_old:
        settings[f"{entry}.split"] = "train"
        notes.append("split: train, its 5000 labelled images, as there; without it the 100000 others are used too")
    return Became(settings, "; ".join(notes))


def _why_single(old: Old) -> str:
    if old.get("data.use_multi_dataset") is False:
        return "data.use_multi_dataset is false; data.dataset says it"
    return "data.dataset says it, as long as data.use_multi_dataset is not true"


def _dataset_part(key: str, value: Any, old: Old) -> Became:
    if not old.uses_list:
        return Became({}, _why_single(old))
    return Became({key: value}) if value != "" else Became({}, "empty; data.data_path is taken")


def _data_path(key: str, value: Any, old: Old) -> Became:
    if value == "":
        return Became({}, "empty; ./data is taken")
    single = old.has("data.dataset") and not old.uses_list
    return Became({"data.datasets[0].path" if single else key: value})


def _use_multi_dataset(key: str, value: Any, old: Old) -> Became:
    return Became({}, "data.datasets is what there is, for one data set too")


def _flip(key: str, value: Any, old: Old) -> Became:
    if isinstance(value, bool):
        return Became({_target(key): 0.5 if value else 0.0}, "a probability")
    return Became({_target(key): value})


def _random_crop(key: str, value: Any, old: Old) -> Became:
    if value is False:
        return Became({"data.augmentation.crop_scale": [1.0, 1.0]}, "a crop of everything")
    return Became({}, "every view is a random crop (data.augmentation.crop_scale)")


def _always_jittered(key: str, value: Any, old: Old) -> Became:
    return Became({_target(key): value, "data.augmentation.color_jitter_probability": 1.0}, "probability 1, as there")


def _local_crops(key: str, value: Any, old: Old) -> Became:
    if old.no_local_crops:
        return Became({"data.multicrop.num_local_crops": 0})
    return Became({}, "data.multicrop.num_local_crops above 0 switches them on")


def _batch_size(key: str, value: Any, old: Old) -> Became:
    passes = old.get("training.accumulation_steps")
    if not old.is_old or not _is_count(value) or not _is_count(passes) or passes == 1:
        return Became({key: value})
    return Became({key: value * passes}, f"images per optimizer step here, per accumulated pass there: {passes} passes")


def _ema_warmup(key: str, value: Any, old: Old) -> Became:
    if not float(value):
        return Became({"model.ema.momentum_warmup_epochs": 0.0}, "epochs here, steps there")
    steps = old.steps_per_epoch
    if steps is None:
        return Became({}, "counted in epochs here, and how many steps an epoch had is not known from the config")
    epochs = float(f"{float(value) / steps:.3g}")
    return Became({"model.ema.momentum_warmup_epochs": epochs}, f"epochs of {steps:.0f} steps here, steps there")


def _share_of_lr(key: str, value: Any, old: Old) -> Became:
    stated = ("training.lr", "training.learning_rate", "training.optimizer.lr")
    lr = next((float(old.get(name)) for name in stated if old.get(name) is not None), Config().training.lr)
    target = key.removesuffix("_ratio")
    return Became({target: float(value) * lr}, f"that share of training.lr {lr:g}")


def _loss_type(key: str, value: Any, old: Old) -> Became:
    kind, notes = old.loss_type, []
    if key != "loss.type" and old.get("loss.type"):
        return Became({}, _DISTANCE)
    if value == "cjepa":
        notes.append("combined is prediction with VICReg, as in C-JEPA")
    if isinstance(value, str) and LOSS_TYPES.get(value, value) in PREDICTIONS and kind not in PREDICTIONS:
        switch = "use_vicreg" if kind == "combined" else "use_sigreg"
        notes.append(f"as loss.{switch} is true; its distance is smooth L1")
    return Became({"loss.type": kind if isinstance(value, str) else value}, "; ".join(notes))


def _regulariser(kind: str) -> Callable[[str, Any, Old], Became]:
    def use(key: str, value: Any, old: Old) -> Became:
        if value is True and old.loss_type == kind:
            return Became({"loss.type": kind})
        return Became({}, f"loss.type says which regulariser; {kind} is the one with it")

    return use


def _use_smoothl1(key: str, value: Any, old: Old) -> Became:
    if value is True and old.loss_type == "smoothl1":
        return Became({"loss.type": "smoothl1"})
    return Became({}, _DISTANCE)


def _sigreg_mix(key: str, value: Any, old: Old) -> Became:
    if old.has("loss.sigreg_weight") and old.has("loss.sigreg_invariance_weight"):
        weights = [old.number(f"loss.sigreg_{name}weight", 0) for name in ("invariance_", "")]
        if sum(weights) > 0:
            note = f"SIGReg's share of both ({weights[0]:g} and {weights[1]:g}); loss.sigreg.weight weighs the whole"
            return Became({"loss.sigreg.mix": weights[1] / sum(weights)}, note)
    elif key == "loss.sigreg_weight":
        return Became({"loss.sigreg.weight": value})
    return Became({}, "it says something only beside loss.sigreg_weight (loss.sigreg.mix)")


def _regularization_weight(key: str, value: Any, old: Old) -> Became:
    section = {"combined": "vicreg", "sigreg": "sigreg"}.get(old.loss_type or "")
    return Became({f"loss.{section}.weight": value}) if section else Became({}, "loss.type has no regulariser")


def _eval_frequency(key: str, value: Any, old: Old) -> Became:
    if old.probes_off:
        return Became({}, "k-NN and the linear probe are both off, so there is nothing to evaluate")
    if not old.is_old or float(value) < _STEPS or float(value) <= old.epochs:
        return Became({_target(key): value})
    steps = old.steps_per_epoch
    if steps is None:
        return Became({}, "longer than the run in epochs, so it means steps; epochs are counted here")
    return Became({_target(key): max(1, round(value / steps))}, f"epochs of {steps:.0f} steps here, steps there")


def _eval_knn(key: str, value: Any, old: Old) -> Became:
    if value is False and old.probes_off:
        return Became({"evaluation.eval_frequency": 0}, "both probes are off; eval_frequency above 0 brings back k-NN")
    rest = "" if value else "; evaluation.eval_frequency: 0 switches all of it off"
    return Became({}, f"k-NN belongs to every evaluation{rest}")


def _k_values(key: str, value: Any, old: Old) -> Became:
    if not isinstance(value, list) or not value:
        return Became({"evaluation.knn.k": value})
    chosen = 20 if 20 in value else value[-1]
    rest = ", ".join(str(k) for k in value if k != chosen)
    return Became({"evaluation.knn.k": chosen}, f"one k here; not used: {rest}" if rest else "")


_VALUES: dict[str, Callable[[str, Any, Old], Became]] = {
    "experiment.name": _name,
    "logging.experiment_name": _name,
    "checkpoint.checkpoint_dir": _checkpoint_dir,
    "checkpoint.keep_last_k": _keep,
    "checkpoint.max_checkpoints": _keep,
    "training.keep_last_n": _keep,
    "logging.save_frequency": _save_frequency,
    "checkpoint.metric": _metric,
    "data.dataset": _dataset,
    "data.datasets.name": _dataset,
    "data.datasets.path": _dataset_part,
    "data.datasets.weight": _dataset_part,
    "data.data_path": _data_path,
    "data.use_multi_dataset": _use_multi_dataset,
    "data.batch_size": _batch_size,
    "data.augmentation.horizontal_flip": _flip,
    "data.transforms.horizontal_flip": _flip,
    "data.augmentation.random_crop": _random_crop,
    "data.transforms.train.ColorJitter.brightness": _always_jittered,
    "data.use_multicrop": _local_crops,
    "data.multi_crop.enabled": _local_crops,
    "training.ema_momentum_schedule.warmup_steps": _ema_warmup,
    "training.min_lr_ratio": _share_of_lr,
    "training.warmup_lr_ratio": _share_of_lr,
    "loss.type": _loss_type,
    "loss.prediction_loss_type": _loss_type,
    "loss.jepa_loss_type": _loss_type,
    "loss.use_vicreg": _regulariser("combined"),
    "loss.use_sigreg": _regulariser("sigreg"),
    "loss.use_smoothl1": _use_smoothl1,
    "loss.sigreg_weight": _sigreg_mix,
    "loss.sigreg_invariance_weight": _sigreg_mix,
    "loss.regularization_weight": _regularization_weight,
    "evaluation.eval_frequency": _eval_frequency,
    "experiment.eval_frequency": _eval_frequency,
    "evaluation.knn.frequency": _eval_frequency,
    "logging.eval_freq": _eval_frequency,
    "evaluation.eval_knn": _eval_knn,
    "evaluation.knn.enabled": _eval_knn,
    "evaluation.knn.k_values": _k_values,
}

_ORDER = {name: index for index, name in enumerate(dict.fromkeys((*RENAMED, *_VALUES)))}
_SECTIONS = {
    name[: dot.start()]
    for name in (*map(plain, KEYS), *RENAMED, *DROPPED, *_VALUES)
    for dot in re.finditer(r"\.", name)
}
