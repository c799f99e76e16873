"""A headless Chromium for the tests of pages: DevTools over a pipe, nothing else."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
if PROGRAM is None and os.environ.get("REQUIRE_CHROMIUM"):
    raise RuntimeError(
        "REQUIRE_CHROMIUM is set, and there is no chromium to test with."
    )
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --disable-dev-shm-usage --remote-debugging-pipe"
).split()


class Page:
    """One tab. Use in a `with` statement; the browser ends with it."""

    def __init__(self, *flags: str):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        reads, self.commands = os.pipe()
        self.replies, writes = os.pipe()

        # The protocol's descriptors have fixed numbers: 3 to read from, 4 to write to.
        # A process of its own sets them: code between fork and exec could deadlock.
        place = (
            "import fcntl, os, sys;"
            "a, b = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]);"
            "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])"
        )
        command = [sys.executable, "-IS", "-c", place, str(reads), str(writes)]
        self.process = subprocess.Popen(
            [
                *command,
                PROGRAM,
                *FLAGS,
                *flags,
                f"--user-data-dir={self.profile}",
                "about:blank",
            ],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads), os.close(writes)
        self.buffer, self.count, self.session = b"", 0, None
        self.events: list[dict] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(target for target in targets if target["type"] == "page")
        self.session = self.call(
            "Target.attachToTarget", targetId=tab["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands), os.close(self.replies)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict:
        """Sends one command and waits for its reply; events are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                chunk = os.read(self.replies, 1 << 20)
                if not chunk:
                    raise RuntimeError("Chromium ended.")
                self.buffer += chunk
            reply, _, self.buffer = self.buffer.partition(b"\0")
            reply = json.loads(reply)
            if reply.get("id") == self.count:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def open(self, path: pathlib.Path) -> None:
        """Loads a file; returns as soon as it has a body."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.body !== null")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        reply = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        if "exceptionDetails" in reply:
            raise RuntimeError(str(reply["exceptionDetails"]))
        return reply["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Waits until an expression is true, and returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(expression):
                return value
            time.sleep(0.02)
        raise TimeoutError(f"Not true within {seconds} s: {expression}")

    def type(self, text: str) -> None:
        """Types into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: pathlib.Path) -> None:
        """Saves what the window shows as a PNG file."""
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Uncaught errors, and what the console and the policy complained of."""
        found = []
        for event in self.events:
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded":
                found.append(event["params"]["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """Addresses of everything the page asked the network or the disk for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
