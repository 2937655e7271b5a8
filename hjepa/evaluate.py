"""What a run's encoder is worth, beside what costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hjepa import checkpoint
from hjepa.build import create_hjepa_from_config, grid_of
from hjepa.config import Config, load_config
from hjepa.config.walk import differences
from hjepa.console import Console
from hjepa.data.sources import open_probe
from hjepa.device import autocasts, choose, precision
from hjepa.errors import ConfigError, DataError, StorageError
from hjepa.evaluation.chosen import skip_reason
from hjepa.evaluation.evaluator import Evaluator
from hjepa.facade import make_callable
from hjepa.model.hjepa import HJEPA
from hjepa.quarantine import Quarantine


def build_evaluator(config: Config, device: torch.device) -> Evaluator | str:
    """The probes of a run's data sets, or the reason in words why there is nothing to probe."""
    pairs = [open_probe(dataset, config.data, config.experiment.seed) for dataset in config.data.datasets]
    reason = skip_reason(pairs)
    seed = config.experiment.seed
    return reason or Evaluator(config.evaluation, config.data, seed, pairs, device, grid_of(config))


def probe(evaluator: Evaluator, model: HJEPA, config: Config) -> dict[str, float]:
    """All figures of an evaluation by name, the model's and the baselines'; leaves the model in eval mode."""
    target, online = _encoders(model, config)
    results = dict(evaluator.evaluate(target.embed, online.last if online else None))
    if evaluator.has_baselines:
        results |= dict(evaluator.baselines(target.last))
    else:
        random, start = _before(model, config)
        results |= dict(
            evaluator.baselines(random.last, random.patches, (start.last, start.patches) if start else None)
        )
    if evaluator.dense is not None:
        results |= dict(evaluator.dense(target.patches))
        if online is not None:
            results |= {f"{name}_online": value for name, value in evaluator.dense(online.patches)}
    return {f"eval/{name}": value for name, value in results.items()}


def probe_timing(evaluator: Evaluator, model: HJEPA, config: Config, seconds: float) -> tuple[float, float]:
    """Seconds of a `probe` and of the first one's baselines, see `Evaluator.timing`; leaves the model in eval mode."""
    target, online = _encoders(model, config)
    random, start = _before(model, config)
    return evaluator.timing(
        target.embed, online.last if online else None, random.last, start.last if start else None, seconds
    )


Arithmetic = Callable[[], AbstractContextManager[object]]


def arithmetic_of(config: Config, device: torch.device) -> Arithmetic:
    """The precision that the run's encoder is trained in."""
    enabled = autocasts(device.type, config.training.use_amp)
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)


class _Frozen:
    """An encoder of the model as the probes ask it, in the arithmetic that it is trained in."""

    def __init__(self, model: HJEPA, config: Config, online: bool = False) -> None:
        self.model, self.online = model.eval(), online
        self.arithmetic = arithmetic_of(config, next(model.parameters()).device)

    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """Every feature, see `HJEPA.embed`."""
        with self.arithmetic():
            return self.model.embed(images, self.online)

    def last(self, images: Tensor) -> dict[str, Tensor]:
        """The one that stands for the encoder: the mean of its final tokens."""
        return {"last": self.patches(images).mean(dim=1)}

    def patches(self, images: Tensor) -> Tensor:
        """The final tokens, see `HJEPA.patches`."""
        with self.arithmetic():
            return self.model.patches(images, self.online).float()


def _encoders(model: HJEPA, config: Config) -> tuple[_Frozen, _Frozen | None]:
    """The encoder that stands for the model and, where that is a slow average, the one that is trained."""
    return _Frozen(model, config), None if model.slow_encoder is None else _Frozen(model, config, online=True)


def _before(model: HJEPA, config: Config) -> tuple[_Frozen, _Frozen | None]:
    """The encoder as it was initialised and, where that is another one, as it was before its first step."""
    device = next(model.parameters()).device
    start = at_start(config)
    random = _Frozen(untrained(config).to(device), config)
    return random, None if start is None else _Frozen(start.to(device), config)


def untrained(config: Config) -> HJEPA:
    """A run's model with the random weights of its seed, whatever weights training started from."""
    return create_hjepa_from_config(config, continued=True)


def at_start(config: Config) -> HJEPA | None:
    """A run's model with the weights that `model.pretrained` names.

    None where it names none, and where they are gone: a run needs them once, and its figures never.
    """
    if not config.model.pretrained:
        return None
    try:
        return create_hjepa_from_config(config)
    except (ConfigError, StorageError):
        return None


def evaluate_run(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Probe the newest intact checkpoint of a run's folder and show the result; also `hjepa.evaluate`.

    Args:
        path: folder of the run.
        overrides: `key=value` for the sections `evaluation`, `data` and `device`.

    Returns:
        the figures by name, such as `eval/knn`, in percent.

    Raises:
        ConfigError: when there is no run, or an override would change the model.
        DataError: when nothing can be probed, saying why.
    """
    path, console = Path(path), Console()
    saved, warnings = checkpoint.load_newest(path / "checkpoints")
    for warning in warnings:
        console.warn(warning)
    if saved is None:
        raise ConfigError(f"{path}: no checkpoint here; give the folder of a run")
    for text in overrides:
        if not text.startswith(("evaluation.", "data.", "device=")):
            raise ConfigError(f"{text!r}: an evaluation changes evaluation.*, data.* and device only")
    config = load_config(path / "config.yaml", ["evaluation.eval_frequency=1", *overrides])
    changed = differences(saved.config, config.model_dump(mode="json"))
    differing = ", ".join(key for key in changed if key.startswith("model."))
    if differing:
        raise ConfigError(f"{path / 'config.yaml'}: {differing}: not what the checkpoint was trained with; put it back")
    kind = choose(config.device)
    precision(kind, config.training.use_amp)  # or a line that says why not
    device = torch.device(kind.name)
    model = create_hjepa_from_config(config, continued=True)
    model.load_state_dict(saved.weights)
    evaluator = build_evaluator(config, device)
    if isinstance(evaluator, str):
        raise DataError(evaluator)
    quarantine = Quarantine(None, console)
    quarantine.watch(evaluator.sources)
    results = probe(evaluator, model.to(device), config)
    quarantine.write(saved.step)
    for name in sorted(results):
        console.say(f"{name} = {results[name]:.2f}")
    console.say(f"Step {saved.step}")
    show_results(console, results, path)
    return results


def worth_in_words(results: dict[str, float]) -> str:
    """An evaluation in one line: k-NN accuracy beside what costs nothing."""
    own, pixels, untrained = (results[f"eval/knn{suffix}"] for suffix in ("", "_pixels", "_random"))
    return f"k-NN {own:.1f} %, raw pixels {pixels:.1f} %, untrained encoder {untrained:.1f} %"


def show_results(console: Console, results: dict[str, float], path: Path) -> None:
    """The last lines: what the encoder is worth, beside what costs nothing, and where it is."""
    if results:
        rows = []
        for label, suffix in (
            ("trained encoder", ""),
            ("  without averaging (online)", "_online"),
            ("raw pixels", "_pixels"),
            ("untrained encoder", "_random"),
            ("at the start (pretrained)", "_start"),
        ):
            if suffix == "_start" and "eval/knn_start" not in results:
                continue
            values = (results.get(f"eval/{probe}{suffix}") for probe in ("knn", "linear"))
            rows.append([label, *("-" if value is None else f"{value:.1f} %" for value in values)])
        console.table(["", "k-NN", "linear"], rows)
        own, *free = (results[f"eval/knn{suffix}"] for suffix in ("", "_pixels", "_random"))
        if own < max(free):
            console.say("Behind what costs nothing: train for longer, or by a recipe of configs/")
    console.say(f"Run: {path}")


make_callable(__name__, evaluate_run)
