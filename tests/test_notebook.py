"""The notebook, from top to bottom."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own settings, so that a user's kernels and history are neither asked nor touched.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "trained encoder" in printed
    assert "level 1 (400," in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()


def test_what_is_committed_of_it_is_small_and_names_no_machine() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    assert "/tmp/" not in NOTEBOOK.read_text()
    assert "/home/" not in NOTEBOOK.read_text()
