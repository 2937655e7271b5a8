"""docs/reliability.md names tests; they exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_page_names_exists() -> None:
    page = (HERE.parent / "docs" / "reliability.md").read_text()
    files = {path.name: path.read_text() for path in HERE.rglob("test_*.py")}
    named = set(re.findall(r"`(?:tests/)?(?:\w+/)*(test_\w+\.py)(?:::(test_\w+))?`", page))
    assert len(named) > 40
    missing = [(file, test) for file, test in named if f"def {test or 'test_'}" not in files.get(file, "")]
    alone = set(re.findall(r"`(test_\w+)`", page))
    missing += [("", test) for test in alone if not any(f"def {test}(" in text for text in files.values())]
    assert not missing
