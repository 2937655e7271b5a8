"""The whole of a config.

Every setting has a type, a range, a default and one line of meaning, in the section that holds it (`model.py`,
`data.py`, `sections.py`). What must hold within a section is said by that section (`conflicts`), what must hold between
sections by `checks.py`. A constructor takes its section, so no setting is written down twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from hjepa.config.checks import cross_checks, metric_checks, picture_checks
from hjepa.config.data import Data
from hjepa.config.model import Model
from hjepa.config.sections import Checkpoint, Evaluation, Experiment, Logging, Loss, Masking, Training
from hjepa.config.types import Conflict, Section


class Config(Section):
    """The whole of a run."""

    experiment: Experiment = Experiment()
    model: Model = Model()
    data: Data = Data()
    masking: Masking = Masking()
    loss: Loss = Loss()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto takes cuda, then mps, then cpu; a device asked for and absent is an error"
    )

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        yield from cross_checks(self.model, self.data, self.masking, self.loss, self.training)
        yield from metric_checks(self.checkpoint, self.evaluation, self.data)
        yield from picture_checks(self.evaluation, self.logging)
