"""The page in a real browser; skipped where there is none."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from hjepa.config import load_config
from hjepa.report import write_report
from hjepa.train import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium with chromedriver here")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run and of two; the runs."""
    folder = tmp_path_factory.mktemp("browser")
    for name, *overrides in (
        ("first", "loss.type=sigreg", "data.num_views=2", "evaluation.eval_frequency=1"),
        ("second", "training.lr=1e-3"),
    ):
        settings = (*SMALL, f"experiment.output_dir={folder / name}", "training.max_steps=16", *overrides)
        train(load_config(None, settings))
    runs = [folder / "first", folder / "second"]
    return {
        "run": write_report(runs[:1]),
        "runs": write_report(runs, folder / "comparison.html"),
        "first": runs[0],
        "second": runs[1],
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def assert_whole_and_alone(browser: Any, page: Path, width: int) -> None:
    """It fits its window, says nothing to the console, shows all of its pictures and fetches nothing."""
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
    assert browser.execute_script(broken) == 0
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def chart(browser: Any, title: str) -> Any:
    return browser.find_element("xpath", f"//figure[contains(@class, 'chart')][.//h3[text() = '{title}']]")


@pytest.mark.parametrize("name", ["run", "runs"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_says_nothing_to_the_console(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    assert_whole_and_alone(browser, pages[name], width)
    # Labels lie inside the window, and none on another of its chart.
    covered = """
        const bad = [];
        for (const chart of document.querySelectorAll('.chart')) {
            const boxes = [...chart.querySelectorAll('.end')].map(e => e.getBoundingClientRect());
            boxes.forEach((a, i) => {
                if (a.right > innerWidth + 0.5) bad.push('outside');
                for (const b of boxes.slice(i + 1))
                    if (a.top < b.bottom - 2 && b.top < a.bottom - 2) bad.push('over');
            });
        }
        return bad;"""
    assert browser.execute_script(covered) == []


def test_every_curve_is_drawn(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["run"], 1280)
    for title, count in (("Loss", 1), ("Loss by level", 2), ("Explained variance", 3), ("k-NN accuracy", 4)):
        found = chart(browser, title).find_elements("css selector", "path.line")
        assert len(found) == count, title
        assert all(path.size["width"] > 40 for path in found), title
    lengths = "return [...document.querySelectorAll('path.line')].map(p => p.getTotalLength())"
    assert min(browser.execute_script(lengths)) > 10
    show(browser, pages["runs"], 1280)
    assert len(chart(browser, "Loss").find_elements("css selector", "path.line")) == 2


@pytest.mark.parametrize("width", [1280, 390])
def test_pointing_at_a_curve_reads_it(browser: Any, pages: dict[str, Path], width: int) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    show(browser, pages["run"], width)
    record = losses(pages["first"])
    figure = chart(browser, "Loss")
    plot, value = (figure.find_element("css selector", name) for name in (".plot", ".value"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    resting = value.text
    assert float(resting) == pytest.approx(record[-1][1], rel=1e-3)
    for at in (3, 10):
        step, loss = record[at]
        # The axis begins at 0; offsets count from the middle.
        offset = round((step / record[-1][0] - 0.5) * plot.size["width"])
        ActionChains(browser).move_to_element_with_offset(plot, offset, 0).perform()
        assert figure.find_element("css selector", ".step").text == f"step {step}"
        assert float(value.text) == pytest.approx(loss, rel=1e-3)
    ActionChains(browser).move_to_element(browser.find_element("css selector", "footer")).perform()
    assert value.text == resting
    assert figure.find_element("css selector", ".step").text == ""


def test_arrow_keys_read_a_curve_too(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["runs"], 1280)
    figure = chart(browser, "Loss")
    plot = figure.find_element("css selector", ".plot")
    plot.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    step = int(figure.find_element("css selector", ".step").text.removeprefix("step "))
    shown = [float(element.text) for element in figure.find_elements("css selector", ".value")]
    assert step == losses(pages["first"])[-2][0]
    assert shown == pytest.approx([dict(losses(pages[name]))[step] for name in ("first", "second")], rel=1e-3)


def test_light_and_dark_follow_the_reader(browser: Any, pages: dict[str, Path]) -> None:
    colours = []
    for scheme in ("light", "dark"):
        show(browser, pages["run"], 1280, scheme)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        colours.append(browser.execute_script(style))
    assert colours[0] != colours[1]
    brightness = [[sum(map(int, colour[4:-1].split(","))) for colour in pair] for pair in colours]
    assert brightness[0][0] > 700 > brightness[0][1]
    assert brightness[1][0] < 120 < brightness[1][1]
