"""A headless Chromium, controlled through a pipe with the DevTools protocol.

with Chromium(folder) as browser:
    browser.open("http://127.0.0.1:6006/#scalars")
    browser.wait_for("train/loss")
    browser.screenshot(folder / "scalars.png")
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_S = 60
# The elements and the visible text of a page, including its shadow roots.
DEEP = """
const deep = (root, out = []) => { for (const element of root.querySelectorAll("*")) {
    out.push(element); if (element.shadowRoot) deep(element.shadowRoot, out); } return out; };
const texts = () => deep(document).filter(element => !["SCRIPT", "STYLE"].includes(element.tagName)).flatMap(
    element => [...element.childNodes].filter(node => node.nodeType == 3).map(node => node.data.trim())).filter(Boolean)
    .join("\\n");
"""


class Navigated(Exception):
    """The page was left while a script was running in it."""


class Chromium:
    """A browser with one page. It ends with the `with` block."""

    def __init__(self, folder, size=(1400, 1100)):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", "--disable-background-networking",
            "--no-first-run", "--disable-dev-shm-usage", f"--window-size={size[0]},{size[1]}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}",
            "--remote-debugging-pipe",
        ]  # fmt: skip

        def move_descriptors():  # the browser reads from descriptor 3 and writes to 4
            for source, target in ((to_read, 103), (to_write, 104), (103, 3), (104, 4)):
                os.dup2(source, target)

        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, preexec_fn=move_descriptors, pass_fds=(3, 4), stderr=log, stdout=log
            )
        os.close(to_read)
        os.close(to_write)
        self._number, self._buffer, self._session = 0, b"", {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)

    def open(self, address):
        """Load a page, also if only the part after # has changed."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def run(self, script):
        """Return the value of a JavaScript expression, which may use `deep(root)` and `texts()`."""
        expression = f"(async () => {{ {DEEP} return await ({script}); }})()"
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, *texts):
        """Wait until the page shows all of these. Returns its whole text."""
        return self.until("texts()", lambda shown: all(text in shown for text in texts))

    def until(self, script, condition):
        """Evaluate the script until the condition is true of its value. Returns the value."""
        end, value = time.monotonic() + WAIT_S, None
        while time.monotonic() < end:
            with contextlib.suppress(Navigated):
                if condition(value := self.run(script)):
                    return value
            time.sleep(0.3)
        raise AssertionError(value)

    def screenshot(self, path):
        """Write what the page shows as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass
        if "navigated" in answer.get("error", {}).get("message", ""):
            raise Navigated(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            ready, *_ = select.select([self._from], [], [], WAIT_S)
            assert ready, "the browser does not answer"
            data = os.read(self._from, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
