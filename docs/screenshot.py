"""The example report of the docs and its picture: `make example-report` trains the quickstart, then calls this with its folder.

    python docs/screenshot.py        says so where there is no browser for it
    python docs/screenshot.py RUN    writes docs/example_report.html and docs/report.png

It needs Debian's chromium and playwright.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from qat.reporting.page.render import write_report

DOCS = Path(__file__).resolve().parent
SIZE = {"width": 1100, "height": 1500}


def main() -> None:
    """Write both files, if there is a run and a browser."""
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        missing = "playwright (pip install playwright)" if chromium else "chromium (apt-get install chromium)"
        sys.exit(f"docs/screenshot.py: the picture of a report needs {missing}")
    if len(sys.argv) == 2:
        write(Path(sys.argv[1]), chromium)


def write(run: Path, chromium: str) -> None:
    """The page of a run and its picture."""
    from playwright.sync_api import sync_playwright

    page_file = write_report(run, DOCS / "example_report.html")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=120_000)
        page.screenshot(path=DOCS / "report.png", timeout=300_000)
        browser.close()


if __name__ == "__main__":
    main()
