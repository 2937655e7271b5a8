"""Is the run going well? A verdict in words, from what is written down of every few steps.

The thresholds were set on runs that were broken on purpose and on healthy ones (docs/results.md, entry 6); they leave a
margin on the healthy side, so silence is no proof, but a finding is worth a look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import NamedTuple

from hjepa.config import Config

# Below: the targets of a level hardly depend on the image, or only little. Healthy runs keep 0.6 to 0.95.
COLLAPSED_STD, WEAK_STD = 0.1, 0.3
# A batch of embeddings that lies along fewer directions than this. Healthy runs keep 4 to 28.
COLLAPSED_RANK = 2.0
# Both regularisers want 1; healthy runs keep 0.35 to 0.9, runs without a regulariser fall below 0.02.
COLLAPSED_EMBEDDING = 0.1
# The largest step of the last block between two lines, relative to its weights. Healthy: up to 0.06.
LARGE_UPDATE = 0.1
# Predictions worse than the mean target by this share of its variance.
WORSE_THAN_MEAN = -0.1

# Diverged: so many lines in a row whose loss is above this multiple of the median of so many lines before.
SPIKE, SPIKE_LINES, SPIKE_WINDOW = 3.0, 3, 20


class Spikes:
    """Whether the loss has left where it was, for good."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._above = 0
        self._good = 0

    def read(self, step: int, loss: float) -> int | None:
        """Take in a line of the record; the last step before the loss left, once it stays away."""
        full = len(self._usual) == SPIKE_WINDOW
        if full and not loss <= SPIKE * median(self._usual):
            self._above += 1
            return self._good if self._above == SPIKE_LINES else None
        self._above, self._good = 0, step
        self._usual.append(loss)
        return None


class Sign(NamedTuple):
    """Something wrong in one line of the record.

    Attributes:
        name: what it is called; the same at each line.
        what: the figure that says so, and what to change.
        lines: how many lines in a row make it a finding.
        lasting: whether it stays in the verdict when later lines do not show it.
    """

    name: str
    what: str
    lines: int = 3
    lasting: bool = False


def signs(values: Mapping[str, float | None], config: Config) -> Iterator[Sign]:
    """What one line of `metrics.jsonl` says against a run."""

    def below(name: str, limit: float) -> bool:
        value = values.get(name)
        return value is not None and value < limit

    training, loss = config.training, config.loss
    for level in range(config.model.num_hierarchies):
        std = f"std/level{level}"
        if below(std, WEAK_STD):
            name = f"{'collapse' if below(std, COLLAPSED_STD) else 'partial collapse'} at level {level}"
            what = f"its targets hardly depend on the image (std {values[std]:.2g})"
            yield Sign(name, f"{what}; {_against_collapse(config)}")
        if below(f"explained/level{level}", WORSE_THAN_MEAN) and (values.get("step") or 0) > 100:
            share = values[f"explained/level{level}"]
            yield Sign(
                f"no prediction at level {level}",
                f"the predictions are worse than the mean target (explained {share:.2g}); lower training.lr "
                f"({training.lr:g}) or hide less (masking.mask_scale)",
                lines=5,
            )
    if below("rankme", COLLAPSED_RANK):
        yield Sign(
            "collapse of the embedding",
            f"all images lie along {values['rankme']:.2g} direction(s) (rankme); {_against_collapse(config)}",
        )
    if below("std/embedding", COLLAPSED_EMBEDDING):
        key = "loss.sigreg.mix" if loss.type == "sigreg" else "loss.vicreg.variance_weight"
        weight = loss.sigreg.mix if loss.type == "sigreg" else loss.vicreg.variance_weight
        yield Sign(
            "collapse of the image level",
            f"all images are projected to one point (std/embedding {values['std/embedding']:.2g} where 1 is wanted); "
            f"raise {key} ({weight:g})",
        )
    drift, update = values.get("drift"), values.get("update")
    if drift is not None and update and drift < update / 10:
        yield Sign(
            "no target encoder to speak of",
            f"it follows the context encoder at once (drift {drift:.2g}), so predictions chase themselves; raise "
            "model.ema.momentum, or leave it out for the default",
        )
    if update is not None and update > LARGE_UPDATE:
        yield Sign(
            "too large steps",
            f"the last block's weights moved by {100 * update:.0f} % in one step; lower training.lr ({training.lr:g}) "
            "or warm up for longer (training.warmup_epochs)",
            lines=1,
            lasting=True,
        )
    if values.get("bad_steps"):
        yield Sign(
            "steps that were not finite",
            f"{values['bad_steps']:.0f} were skipped; lower training.lr ({training.lr:g}) if there are more",
            lines=1,
            lasting=True,
        )


def _against_collapse(config: Config) -> str:
    if not config.loss.has_image_level:
        return "set loss.type=sigreg with data.num_views=2, or lower training.lr"
    weight = config.loss.sigreg.weight if config.loss.type == "sigreg" else config.loss.vicreg.weight
    key = "sigreg" if config.loss.type == "sigreg" else "vicreg"
    return f"raise loss.{key}.weight ({weight:g}) or lower training.lr ({config.training.lr:g})"


class Finding(NamedTuple):
    """A sign that has shown itself in enough lines.

    Attributes:
        since: step of the first of these lines.
        sign: that of the newest line.
    """

    since: int
    sign: Sign


class Diagnosis:
    """Reads the record line by line.

    Attributes:
        findings: by name, those that stand.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.findings: dict[str, Finding] = {}
        self._streaks: dict[str, tuple[int, int]] = {}  # first step, number of lines

    def read(self, step: int, values: Mapping[str, float | None]) -> list[str]:
        """Take a line in.

        Args:
            step: optimizer steps done.
            values: what is written down of it; evaluations, which have no loss, say nothing.

        Returns:
            findings that are new, in words.
        """
        if "loss" not in values:
            return []
        new = []
        shown = {sign.name: sign for sign in signs({**values, "step": step}, self.config)}
        for name in [n for n in self._streaks if n not in shown]:
            del self._streaks[name]
            if name in self.findings and not self.findings[name].sign.lasting:
                del self.findings[name]
        for name, sign in shown.items():
            first, count = self._streaks.get(name, (step, 0))
            self._streaks[name] = first, count + 1
            known = name in self.findings
            if count + 1 < sign.lines or (sign.lasting and known):
                continue
            self.findings[name] = Finding(first, sign)
            if not known:
                new.append(self._words(name))
        return new

    @property
    def verdict(self) -> str:
        """`healthy`, or all that stands against the run, one line each."""
        return "\n".join(map(self._words, self.findings)) or "healthy"

    def _words(self, name: str) -> str:
        finding = self.findings[name]
        return f"{name} since step {finding.since}: {finding.sign.what}"
