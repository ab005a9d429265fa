"""The page of a run that trains: served on 127.0.0.1, made anew at each look, until Ctrl-C.

The open page asks for itself every few seconds and puts what is new in place, so that it neither flashes nor scrolls.
"""

from __future__ import annotations

from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qat.reporting.page.reading import read_run
from qat.reporting.page.render import report

SECONDS = 5


class _Page(BaseHTTPRequestHandler):
    """Serves one page, and the same without plotly's code for one that has it."""

    def __init__(self, folder: Path, *args: Any) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        """The page."""
        if self.path not in ("/", "/live"):
            return self.send_error(404)
        run = read_run(self.folder)
        live = SECONDS if not run.done and not run.result.status.startswith("failed") else None
        text = report(run, live, bundle=self.path == "/").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing: a line every few seconds would say nothing."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the run's page, bound and not yet serving; port 0: any that is free.

    Raises:
        ValueError: the folder holds no run, or the port is taken or not allowed.
    """
    read_run(folder)
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port {port} is not allowed; it must be in 0 to 65535")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Page, folder))
    except OSError as error:
        raise ValueError(f"port {port} cannot be had ({error.strerror}); choose another with --port, or 0 for any") from None


def watch(folder: Path, port: int) -> None:
    """Serve until Ctrl-C.

    Raises:
        ValueError: as `server`.
    """
    with server(folder, port) as one:
        print(f"http://127.0.0.1:{one.server_address[1]}/ shows {folder} as it trains; Ctrl-C ends this", flush=True)
        one.serve_forever()
