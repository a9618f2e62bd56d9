"""Drives a headless Chromium for tests/dashboard.rs over the DevTools protocol, on a pipe.

One JSON object a line comes in, one goes out for each: {"do": "open", "url": ..., "width": ..., "height": ...,
"dark": ...}, {"do": "eval", "js": ...}, {"do": "until", "js": ..., "seconds": ...}, {"do": "keys", "text": ...},
{"do": "press", "key": ...}, {"do": "shot", "path": ...}, {"do": "report"}. The answer has "value", or "error".
Only Python's own library is used. Usage: browser.py CHROMIUM DIRECTORY
"""

import base64
import json
import os
import select
import subprocess
import sys
import time

COMMAND_SECONDS = 120


class Browser:
    def __init__(self, program, directory):
        to_read, self.to_browser = os.pipe()
        self.from_browser, to_write = os.pipe()

        def hand_over():
            # As the protocol's pipe has it: 3 is read, 4 is written by the browser.
            read, written = os.dup(to_read), os.dup(to_write)
            os.dup2(read, 3)
            os.dup2(written, 4)

        arguments = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-proxy-server",
            "--user-data-dir=" + os.path.join(directory, "profile"), "about:blank",
        ]
        log = open(os.path.join(directory, "chromium.log"), "wb")
        self.process = subprocess.Popen(
            [program] + arguments, preexec_fn=hand_over, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, env=dict(os.environ, HOME=directory, XDG_CONFIG_HOME=directory, XDG_CACHE_HOME=directory),
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number, self.session = b"", 0, None
        self.console, self.requests = [], []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.call(domain + ".enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + COMMAND_SECONDS
        while True:
            answer = self.receive(until)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, until):
        while b"\0" not in self.buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.from_browser], [], [], left)[0]:
                raise RuntimeError("the browser does not answer")
            piece = os.read(self.from_browser, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        self.note(message)
        return message

    def note(self, message):
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            texts = [str(part.get("value", part.get("description"))) for part in parameters["args"]]
            self.console.append(" ".join(texts))
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.console.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def evaluate(self, js):
        result = self.call("Runtime.evaluate", expression=js, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def open(self, order):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=order["width"], height=order["height"],
            deviceScaleFactor=1, mobile=order["width"] < 600,
        )
        scheme = "dark" if order.get("dark") else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if order.get("url"):
            self.call("Page.navigate", url=order["url"])

    def until(self, order):
        end = time.monotonic() + order["seconds"]
        while True:
            failure = ""
            try:
                value = self.evaluate(order["js"])
            except RuntimeError as error:
                # The page, or the part of it that is meant, may not be there yet.
                value, failure = None, f" ({error})"
            if value:
                return value
            if time.monotonic() > end:
                raise RuntimeError("waited in vain for " + order["js"] + failure)
            time.sleep(0.01)

    def press(self, order):
        codes = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "/": (191, "/")}
        code, text = codes[order["key"]]
        event = {"key": order["key"], "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def shot(self, order):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 4000), "scale": 1}
        picture = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        with open(order["path"], "wb") as file:
            file.write(base64.b64decode(picture["data"]))

    def obey(self, order):
        what = order["do"]
        if what == "eval":
            return self.evaluate(order["js"])
        if what == "keys":
            return self.call("Input.insertText", text=order["text"]) and None
        if what == "report":
            self.evaluate("1")
            return {"console": self.console, "requests": self.requests}
        return {"open": self.open, "until": self.until, "press": self.press, "shot": self.shot}[what](order)


def main():
    browser = Browser(sys.argv[1], sys.argv[2])
    try:
        for line in sys.stdin:
            try:
                answer = {"value": browser.obey(json.loads(line))}
            except Exception as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    finally:
        browser.process.kill()
        browser.process.wait()


main()
