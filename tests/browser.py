"""A headless Chromium for looking at pages, driven by its DevTools protocol over two pipes; no package is needed.

Debian's ``chromium-headless-shell`` or ``chromium``, Chrome or whatever ``CHROMIUM`` names.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
_SECONDS = 120.0
# The protocol is spoken on descriptors 3 and 4. Copies beyond these first, as the ends may have the numbers crosswise.
_WITH_PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The program, None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One tab, at a given width."""

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading = writing, reading
        self._rest = b""
        self._count = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Load a file from disk and wait until it has all of its pictures."""
        self.complaints.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        loaded = self._send("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in loaded, loaded
        until = time.monotonic() + _SECONDS
        while self.run("document.readyState") != "complete":
            assert time.monotonic() < until, "the page does not finish loading"
            time.sleep(0.05)
        self.run("Promise.all([...document.images].map(image => image.decode().catch(() => {}))).then(() => 0)")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            self._listen(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._reading, 1 << 16)
            assert data, "the browser has gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _listen(self, message: dict[str, Any]) -> None:
        """Keep whatever the page's console would show in red or yellow."""
        method, said = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])


@contextmanager
def open_browser(program: str) -> Iterator[Page]:
    """Start a browser that reaches no network and leaves nothing behind."""
    to_browser, from_here = os.pipe()
    from_browser, to_here = os.pipe()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        network = ("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND")
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _WITH_PIPES, str(to_browser), str(to_here)),
                *(program, *flags, *network, "--remote-debugging-pipe", f"--user-data-dir={profile}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_browser, to_here),
        )
        os.close(to_browser)
        os.close(to_here)
        try:
            yield Page(from_here, from_browser)
        finally:
            os.close(from_here)
            process.terminate()
            process.wait(timeout=60)
            os.close(from_browser)
