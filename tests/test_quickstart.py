"""The promise of `make train`, kept by running it."""

from pathlib import Path

import pytest

from hjepa.config import load_config
from hjepa.train import train

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_beats_pixels_and_an_untrained_encoder_by_twenty_points(tmp_path: Path) -> None:
    results = train(load_config(RECIPE, [f"experiment.output_dir={tmp_path / 'run'}"]))
    assert results["eval/knn_pixels"] < 40
    assert results["eval/knn"] > results["eval/knn_pixels"] + 20
    assert results["eval/knn"] > results["eval/knn_random"] + 20
    assert results["eval/linear"] > results["eval/linear_pixels"] + 20
