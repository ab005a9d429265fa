"""The pages in a real browser: nothing is asked of a network, charts are drawn and answer, in light and dark, on any width."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import ROWS, with_trained, write_run

from qat.reporting.page.compare import compare
from qat.reporting.page.render import write_report

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, file: Path, said: list[str], **options: Any) -> Any:
    """The page once its charts are drawn; what it logs or asks for is in `said`."""
    page = browser.new_page(**options)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=120_000)
    return page


def test_a_report_is_drawn_fits_and_answers(browser: Any, tmp_path: Path) -> None:
    file, said = write_report(write_run(tmp_path)), list[str]()
    page = opened(browser, file, said, viewport={"width": 1200, "height": 900}, color_scheme="light")
    charts = page.locator(".chart").count()
    assert charts >= 2 and page.locator(".chart svg.main-svg .scatterlayer .trace").count() >= charts
    for width in (1200, 768, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1200, "height": 900})
    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".chart .hoverlayer text", timeout=10_000)
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('.chart .xtick text').style.fill"
    before = page.evaluate(ground), page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 60  # the page's policy forbids the waiting of playwright's own, which evaluates code
    while page.evaluate(ink) == before[1] and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert page.evaluate(ink) != before[1] and page.evaluate(ground) != before[0] and said == []
    page.close()


def test_a_comparison_is_drawn(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), with_trained(5.0 - i / 4, 100_000 + i), ROWS, lr=0.001 * (i + 1)) for i in range(3)]
    compare(runs, tmp_path / "out.html")
    said = list[str]()
    page = opened(browser, tmp_path / "out.html", said, viewport={"width": 390, "height": 900}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".parcoords .axis-heading").count() >= 2 and said == []
    page.close()


def test_the_example_without_a_browser_is_one_line(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "screenshot.py"
    done = subprocess.run([sys.executable, script], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "needs chromium" in done.stderr
