"""The example report of the docs and its picture: `make example-report` trains the quickstart, then calls this with its folder.

    python docs/screenshot.py RUN    writes docs/example_report.html and docs/report.png

It needs Debian's chromium and playwright.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from qat.reporting.page.render import write_report

DOCS = Path(__file__).resolve().parent
SIZE = {"width": 1100, "height": 1500}


def main() -> None:
    """Write both files."""
    page_file = write_report(Path(sys.argv[1]), DOCS / "example_report.html")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=120_000)
        page.screenshot(path=DOCS / "report.png", timeout=300_000)
        browser.close()


if __name__ == "__main__":
    main()
