"""The page of `hjepa classify` in a real browser; skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
from test_classify import make_images
from test_report_browser import assert_whole_and_alone, browser, pytestmark, show  # noqa: F401

from hjepa.classify import classify


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = make_images(tmp_path_factory.mktemp("classify"))
    (images / "labelled" / "dark" / "copy0.png").rename(images / "labelled" / "light" / "copy0.png")
    odd = images / "photos" / "<b>a name & a half, which goes on for longer than any picture is wide.png"
    (images / "photos" / "09.png").rename(odd)
    classify(finished, images / "labelled", images / "photos", images / "p.csv", device="cpu")
    return images / "p.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_needs_nothing_else(browser: Any, page: Path, width: int) -> None:  # noqa: F811
    assert_whole_and_alone(browser, page, width)
    assert browser.find_elements("css selector", "b") == []  # a file's name is a name, not markup
    sides = "return [...document.querySelectorAll('.thumbs img')].map(i => i.getBoundingClientRect().width)"
    assert 80 < min(browser.execute_script(sides)) <= max(browser.execute_script(sides)) < 200


def test_pictures_stand_by_class_the_least_certain_first(browser: Any, page: Path) -> None:  # noqa: F811
    show(browser, page, 1280)
    sections = {
        section.find_element("css selector", "h2").text: [
            caption.text for caption in section.find_elements("css selector", "figcaption")
        ]
        for section in browser.find_elements("css selector", "section")
    }
    for name in ("dark", "light"):
        (title,) = (title for title in sections if title.startswith(name))
        shares = [float(caption.removeprefix(name).strip(" %")) for caption in sections[title]]
        assert shares == sorted(shares)
        assert len(shares) > 2
    assert len(sections["Label these next"]) == 12
    (doubtful,) = sections["Labels to look at again"]
    assert doubtful.startswith("dark ")
    assert "labelled light" in doubtful
    assert "deep/" in doubtful or ".png" in doubtful
