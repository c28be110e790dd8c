"""A report as a reader sees it: opened from disk in headless Chromium, at the widths of a phone and a desktop.

Chromium's debugging pipe (NUL-ended JSON on file descriptors 3 and 4) drives the browser: no driver, no port.
``assert_report_is_readable(path)`` is the whole check; ``Browser`` also takes screenshots for a person to judge.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

PHONE, DESKTOP = (390, 844), (1280, 900)
EXPECTED_PLOTS = ("loss-by-round", "loss-by-bytes", "sampled", "time")

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--remote-debugging-pipe"),
)

_MEASURE = """(() => {
  const box = element => { const b = element.getBoundingClientRect(); return [b.width, b.height]; };
  return {
    title: document.title,
    headings: [...document.querySelectorAll("h1, h2")].map(h => h.textContent),
    width: document.scrollingElement.scrollWidth,
    inner: window.innerWidth,
    smallest_text: Math.min(...[...document.querySelectorAll("body *:not(svg *)")]
      .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()))
      .map(e => parseFloat(getComputedStyle(e).fontSize))),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    dangling: [...document.querySelectorAll("use")].filter(u =>
      !document.getElementById((u.getAttribute("href") || u.getAttribute("xlink:href")).slice(1))).length,
    scripts: document.scripts.length,
    plots: Object.fromEntries([...document.querySelectorAll("figure")].map(f => {
      const svg = f.querySelector("svg");
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return [f.id.replace("plot-", ""), {
        box: box(svg),
        label: svg.getAttribute("aria-label"),
        colours: [...new Set([...svg.querySelectorAll("text, path, use")].flatMap(p =>
          [getComputedStyle(p).fill, getComputedStyle(p).stroke])
          .filter(c => c.startsWith("rgb(") && c != "rgb(0, 0, 0)"))],  // black: the default of lines without a fill
        drawn: [...svg.querySelectorAll("path, use")].filter(p => {
          const b = p.getBBox(), style = getComputedStyle(p);
          return b.width + b.height > 0 && (style.fill != "none" || style.stroke != "none");
        }).length,
        text: Math.min(...[...svg.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize) * scale)),
      }];
    })),
  };
})()"""


def chromium() -> str:
    """The browser's path. Without a browser the test is skipped, but in CI it fails."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        reason = "no Chromium: install Debian's package `chromium`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class Browser:
    """One headless Chromium with one page and an empty profile. Records its requests and errors."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._buffer = b""
        self._session: str | None = None

    def __enter__(self) -> Browser:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = _pipe()
        self._read, from_browser = _pipe()
        command = [chromium(), *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            # the shell puts the pipe's ends where Chromium looks for them
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, path: Path, size: tuple[int, int], dark: bool = False) -> Any:
        """Load ``path`` from disk in a window of ``size`` CSS pixels and return the measurements of ``_MEASURE``."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass
        self._call("Runtime.evaluate", expression="new Promise(done => requestAnimationFrame(done))", awaitPromise=True)
        return self._call("Runtime.evaluate", expression=_MEASURE, returnByValue=True)["result"]["value"]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            response = self._receive()
            if response.get("id") == self._number:
                assert "error" not in response, f"{method}: {response['error']}"
                return response["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium closed its debugging pipe"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        self._record(event.get("method", ""), event.get("params", {}))
        return event

    def _record(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Log.entryAdded":
                self.errors.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
            case "Runtime.consoleAPICalled":
                self.errors.append(f"console.{parameters['type']}: {parameters['args']}")
            case "Runtime.exceptionThrown":
                self.errors.append(parameters["exceptionDetails"]["text"])


def _pipe() -> tuple[int, int]:
    """A pipe with descriptors above 10, so that they do not collide with 3 and 4, to which they are copied."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]


def assert_report_is_readable(path: Path, plots: tuple[str, ...] = EXPECTED_PLOTS) -> None:
    """The report at ``path`` loads without other files and without errors, draws every plot and fits a phone."""
    with Browser() as browser:
        for size in (DESKTOP, PHONE):
            page = browser.open(path, size)
            where = f"{path.name} at {size[0]} px"
            assert page["title"] and page["headings"], f"{where}: no title or headings"
            assert page["width"] <= page["inner"] == size[0], f"{where}: {page['width']} px wide"
            assert page["smallest_text"] >= 14, f"{where}: text of {page['smallest_text']} px"
            assert len(set(page["ids"])) == len(page["ids"]), f"{where}: an id is used twice"
            assert page["dangling"] == 0, f"{where}: {page['dangling']} references have no target"
            assert page["scripts"] == 0, f"{where}: the page holds a script"
            assert tuple(page["plots"]) == plots, f"{where}: plots {tuple(page['plots'])}"
            for name, plot in page["plots"].items():
                assert min(plot["box"]) > 100, f"{where}: plot {name} has the size {plot['box']}"
                assert plot["drawn"] >= 5, f"{where}: plot {name} has {plot['drawn']} drawn shapes"
                assert plot["text"] >= 10, f"{where}: plot {name} has text of {plot['text']:.1f} px"
                assert plot["label"], f"{where}: plot {name} has no description"
        assert not browser.errors, browser.errors
        page_url = path.resolve().as_uri()
        foreign = [url for url in browser.requests if url != page_url and not url.startswith("data:")]
        assert not foreign, f"the report requests {foreign}"
