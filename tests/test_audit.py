"""What `make audit` makes of the tool's answers; the tool itself is a script that gives them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit.py"
FINE = {"name": "numpy", "version": "2.0", "vulns": []}
SKIPPED = {"name": "numpy", "skip_reason": "Dependency not found and could not be audited"}
WRONG = {"name": "pillow", "version": "9.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["10.0"]}]}


@pytest.mark.parametrize(
    ("packages", "said_besides", "code", "said"),
    [
        ([FINE], "", 0, "audit: 1 packages looked up, 0 known vulnerabilities"),
        ([FINE, WRONG, SKIPPED], "Found 1 known vulnerability", 1, "audit: pillow 9.0: PYSEC-1, fixed in 10.0"),
        ([SKIPPED], "", 0, "could not be reached (it knows none of the packages)"),
        (None, "requests.exceptions.ConnectionError: refused", 0, "could not be reached (requests.exceptions."),
        (None, "No solution found when resolving tool dependencies", 0, "could not be reached"),
        (None, "error: unrecognized arguments: --path", 1, "failed: error: unrecognized arguments"),
    ],
    ids=["nothing known", "one known", "packages alone", "no network", "no tool", "another fault"],
)
def test_what_is_known_fails_and_what_cannot_be_asked_does_not(
    tmp_path: Path, packages: list[dict[str, object]] | None, said_besides: str, code: int, said: str
) -> None:
    answer = "" if packages is None else json.dumps({"dependencies": packages})
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "answer").write_text(answer)
    (tmp_path / "besides").write_text(said_besides)
    (tmp_path / "uv").write_text(f"#!/bin/sh\ncat {tmp_path}/answer; cat {tmp_path}/besides >&2; exit {bool(code):d}\n")
    (tmp_path / "uv").chmod(0o755)
    done = subprocess.run(
        [str(tmp_path / "python"), str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
