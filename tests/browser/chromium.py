"""A headless Chromium that is told what to do through a pipe (its DevTools protocol): open, look inside, photograph.

with Chromium(folder) as browser:
    browser.open("http://127.0.0.1:6006/#scalars")
    browser.wait_for("train/loss"); browser.screenshot(folder / "scalars.png")
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_S = 60
# Of a page and of all shadow roots in it: its elements, and its text as it is seen.
DEEP = """
const deep = (root, out = []) => { for (const one of root.querySelectorAll("*")) {
    out.push(one); if (one.shadowRoot) deep(one.shadowRoot, out); } return out; };
const texts = () => deep(document).filter(one => !["SCRIPT", "STYLE"].includes(one.tagName)).flatMap(
    one => [...one.childNodes].filter(node => node.nodeType == 3).map(node => node.data.trim())).filter(Boolean)
    .join("\\n");
"""


class Chromium:
    """One page in a browser of its own; ended with the `with`."""

    def __init__(self, folder, size=(1400, 1100)):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", "--disable-background-networking",
            "--no-first-run", "--disable-dev-shm-usage", f"--window-size={size[0]},{size[1]}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}",
            "--remote-debugging-pipe",
        ]  # fmt: skip

        def arrange():  # the browser reads from descriptor 3 and writes to 4
            for source, target in ((to_read, 103), (to_write, 104), (103, 3), (104, 4)):
                os.dup2(source, target)

        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(command, preexec_fn=arrange, pass_fds=(3, 4), stderr=log, stdout=log)
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
        """Load a page anew, also where only what is behind its # has changed."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def run(self, script):
        """The value of a JavaScript expression; `deep(root)` and `texts()` are there for it."""
        expression = f"(async () => {{ {DEEP} return await ({script}); }})()"
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, *texts):
        """Until the page shows all of these; the whole of its text."""

        def missing(shown):
            return [text for text in texts if text not in shown]

        return self.until("texts()", lambda shown: not missing(shown), missing)

    def until(self, script, holds, say=lambda value: value):
        """Evaluate until it holds; the value."""
        end = time.monotonic() + WAIT_S
        while not holds(value := self.run(script)):
            assert time.monotonic() < end, say(value)
            time.sleep(0.3)
        return value

    def screenshot(self, path):
        """What is seen now, as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass
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
