"""Random edits of valid configs end in a run of two steps or in a message, never in a traceback."""

import copy
import itertools
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hjepa.config import load_config
from hjepa.config.walk import leaves
from hjepa.errors import UserError
from hjepa.train import train

VARIANTS = (
    (),
    ("loss.type=sigreg", "data.num_views=2", "model.rope.use_rope=true", "training.accumulation_steps=2"),
    ("loss.type=combined", "model.fpn.use_fpn=true", "model.use_layerscale=true", "data.augmentation.color_jitter=0.4"),
    (
        "loss.type=sigreg",
        "loss.hierarchy_weights=[0,0]",
        "model.use_target_encoder=false",
        "data.num_views=2",
        "data.multicrop.num_local_crops=1",
    ),
)
KEYS = [leaf.key.replace("[]", ".0") for leaf in leaves()]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 16, 64, 10**12]),
    st.sampled_from([-0.5, 0.0, 1e-12, 0.1, 0.5, 0.99, 1.0, 1.5, 3.7, 1e30, float("nan"), float("inf")]),
    st.sampled_from(
        ["", "auto", "no", "1e-5", "8h", "0s", "sigreg", "mse", "cpu", "folder", "test", "x" * 70, "\u00e9"]
    ),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=2, max_size=2),
    st.dictionaries(st.sampled_from(["name", "lr", "weight", "x"]), SCALARS, max_size=2),
)
EDITS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(KEYS), VALUES),
    st.tuples(st.just("set"), st.sampled_from(sorted({key.rpartition(".")[0] for key in KEYS} - {""})), VALUES),
    st.tuples(st.just("delete"), st.sampled_from(KEYS), st.none()),
    st.tuples(st.just("misspell"), st.sampled_from(KEYS), st.integers(0, 20)),
    st.tuples(st.just("cut"), st.just(""), st.integers(0, 4000)),
    st.tuples(st.just("repeat line"), st.just(""), st.integers(0, 150)),
)


def edited(config: dict[str, Any], edit: tuple[str, str, Any]) -> dict[str, Any]:
    """One edit of the nested settings; those that do not apply change nothing."""
    kind, key, value = edit
    *way, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    here: Any = config
    for part in way:
        if not (part in here if isinstance(here, dict) else isinstance(here, list) and here and part == 0):
            return config
        here = here[part]
    if isinstance(here, dict):
        old = here.pop(last, None) if kind in ("delete", "misspell") else None
        if kind == "set":
            here[last] = value
        elif kind == "misspell":
            word = str(last)
            here[word[: value % len(word)] + word[value % len(word) + 1 :] or "x"] = old
    return config


def edited_text(text: str, edit: tuple[str, str, Any]) -> str:
    """One edit of the file's characters."""
    kind, _, place = edit
    lines = text.splitlines(keepends=True)
    if kind == "cut" and text:
        return text[: place % len(text)] + text[place % len(text) + 1 :]
    if kind == "repeat line" and lines:
        lines.insert(place % len(lines), lines[place % len(lines)])
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_edits(tmp_path: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    bases = []
    for variant in VARIANTS:
        config = load_config(None, (*small, "data.datasets=[{name: shapes, length: 16}]", *variant))
        bases.append(config.model_dump(mode="json"))
    numbers = itertools.count()
    ended = {"run": 0, "message": 0}
    failures: list[str] = []

    @settings(
        max_examples=2000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(base=st.sampled_from(bases), edits=st.one_of(st.tuples(EDITS), st.lists(EDITS, min_size=2, max_size=3)))
    def check(base: dict[str, Any], edits: Sequence[tuple[str, str, Any]]) -> None:
        config = copy.deepcopy(base)
        for edit in edits:
            config = edited(config, edit)
        text = yaml.safe_dump(config, sort_keys=False)
        for edit in edits:
            text = edited_text(text, edit)
        Path("c.yaml").write_text(text, encoding="utf-8")
        # Where it runs and for how long is not the config's to say here.
        config_folder = f"run{next(numbers)}"
        kept = [f"experiment.output_dir={config_folder}", "training.max_steps=2", "data.download=false"]
        kept += ["device=cpu", "logging.wandb.enabled=false"]
        try:
            train(load_config("c.yaml", kept))
        except UserError as error:
            message = str(error)
            assert message.strip()
            assert "Traceback" not in message
            ended["message"] += 1
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{edits}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})")
        else:
            ended["run"] += 1
        shutil.rmtree(config_folder, ignore_errors=True)

    check()
    assert not failures, "\n".join(failures)
    # Edits of both kinds were drawn, or this test shows nothing.
    assert ended["run"] > 100, ended
    assert ended["message"] > 100, ended
