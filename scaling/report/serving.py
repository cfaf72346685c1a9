"""Shows a page on the loopback address, and has the browser load it again whenever it was written anew."""

import re
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from scaling import storage
from scaling.report import provisional

HOST = "127.0.0.1"
# Of the server's time at most this share goes into writing the page again: a sweep may train beside it.
SHARE = 0.02
ASK_EVERY_SECONDS = 3
RECORD = re.compile(r"/(runs/[0-9a-f]{12}\.json)")
RELOAD = """<script>
setInterval(async () => {{
  try {{
    if (await (await fetch("/version")).text() !== "{version}") location.reload();
  }} catch {{}}  // the server has ended: the page stays as it is
}}, {every});
</script>
"""


class Server(ThreadingHTTPServer):
    """Serves the report of ``folder`` and the records it links to, to this machine alone."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        if storage.is_remote(folder):
            raise ValueError(f"--serve {folder}: a page is served from a disk: copy the folder here")
        self.folder, self._lock, self._next = folder, Lock(), 0.0
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> Path:
        """The page, written again where what it is of is newer, but seldom (``SHARE``)."""
        path = self.folder / "report.html"
        with self._lock:
            begun = time.monotonic()
            if begun >= self._next and self._is_stale(path):
                provisional.renew(self.folder)
                self._next = time.monotonic() + (time.monotonic() - begun) / SHARE
        return path

    def _is_stale(self, path: Path) -> bool:
        if not path.exists():
            return True
        names = ("fit.json", "forecast.json", "sweep.json")
        # A folder is as new as the newest file that was renamed into it.
        of = [self.folder / "runs", *(self.folder / name for name in names)]
        return max(p.stat().st_mtime_ns for p in of if p.exists()) > path.stat().st_mtime_ns

    def version(self) -> str:
        return str(self.page().stat().st_mtime_ns)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # as http.server names it
        # Another site's name that points here would read the page in a browser (DNS rebinding).
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            return self.send_error(HTTPStatus.FORBIDDEN)
        path, record = self.path.partition("?")[0], RECORD.fullmatch(self.path)
        try:
            if path in ("/", "/report.html"):
                version = self.server.version()
                reload = RELOAD.format(version=version, every=1000 * ASK_EVERY_SECONDS)
                text = (self.server.folder / "report.html").read_text(encoding="utf-8")
                return self._answer(text.replace("</body>", f"{reload}</body>"), "text/html; charset=utf-8")
            if path == "/version":
                return self._answer(self.server.version(), "text/plain")
            if record and (self.server.folder / record[1]).is_file():
                return self._answer((self.server.folder / record[1]).read_text(encoding="utf-8"), "application/json")
        except (ValueError, OSError) as e:  # a record half way between two places: the browser asks again
            return self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, storage.first_line(e))
        return self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # as http.server names it
        """Says nothing: a browser asks every few seconds."""
