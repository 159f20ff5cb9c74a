"""Pages in a headless Chromium, and what it has to say about them (by its DevTools protocol, over tornado's web sockets)."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium here; on Debian and Ubuntu: apt install chromium"
LOOK = """JSON.stringify({
  title: document.title,
  missing: [...document.images].filter(i => (i.loading = 'eager', !i.complete || !i.naturalWidth)).map(i => i.src.slice(0, 80)),
  images: document.images.length,
  formulas: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().width > 0).length,
  dollars: (document.querySelector('main')?.innerText.match(/\\$[^$\\n]+\\$/g) || []).slice(0, 3),
  found: document.querySelectorAll('#search-results li').length,
  dead: [...document.querySelectorAll('a[href^="#"]:not([href="#"])')].filter(a => !document.getElementById(a.hash.slice(1)) && !document.getElementById(decodeURIComponent(a.hash.slice(1)))).map(a => a.hash),
  overflow: document.documentElement.scrollWidth - window.innerWidth})"""


@dataclass
class Seen:
    """What came of one page: facts of `LOOK`, messages and errors of its console, addresses that it asked for."""

    facts: dict
    console: list[str]
    requests: list[str]


def visit(pages: list[Path], width: int = 1280, height: int = 900, pictures: Path | None = None) -> dict[str, Seen]:
    """Load every page in one browser; a picture of each goes to ``pictures``, if wanted."""
    # its helper processes may still write for a moment after it is gone, so the profile's removal may fail
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return asyncio.run(_visit(_address(Path(profile), process), pages, (width, height), pictures))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(profile: Path, process: subprocess.Popen, limit_s: float = 60.0) -> str:
    until = time.monotonic() + limit_s
    while not (profile / "DevToolsActivePort").exists() or not (profile / "DevToolsActivePort").read_text().count("\n"):
        assert process.poll() is None and time.monotonic() < until, "Chromium did not start"
        time.sleep(0.1)
    port, path = (profile / "DevToolsActivePort").read_text().split()[:2]
    return f"ws://127.0.0.1:{port}{path}"


async def _visit(address: str, pages: list[Path], size: tuple[int, int], pictures: Path | None) -> dict[str, Seen]:
    from tornado.websocket import websocket_connect

    socket, numbers, events = await websocket_connect(address, max_message_size=1 << 28), itertools.count(1), []
    session = {}

    async def ask(method: str, **params) -> dict:
        number = next(numbers)
        await socket.write_message(json.dumps({"id": number, "method": method, "params": params, **session}))
        while (answer := await receive()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    async def receive() -> dict:
        message = json.loads(await asyncio.wait_for(socket.read_message(), 60))
        events.append(message)
        return message

    target = (await ask("Target.createTarget", url="about:blank"))["targetId"]
    session["sessionId"] = (await ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
    for domain in ("Page", "Network", "Runtime", "Log"):
        await ask(f"{domain}.enable")
    await ask(
        "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=size[0] < 600
    )
    seen = {}
    for page in pages:
        events.clear()
        address, _, query = str(page.resolve()).partition("?")
        await ask("Page.navigate", url=Path(address).as_uri() + f"?{query}" * bool(query))
        while not any(event.get("method") == "Page.loadEventFired" for event in events):
            await receive()
        for _ in range(50):  # pictures that were put off until they are scrolled to
            facts = json.loads((await ask("Runtime.evaluate", expression=LOOK))["result"]["value"])
            if not facts["missing"]:
                break
            await asyncio.sleep(0.1)
        if pictures:
            shot = await ask("Page.captureScreenshot", format="png", captureBeyondViewport=False)
            (pictures / f"{page.stem}-{size[0]}.png").write_bytes(base64.b64decode(shot["data"]))
        seen[page.name] = Seen(facts, _messages(events), _requests(events))
    await ask("Browser.close")
    socket.close()
    while await socket.read_message() is not None:  # until it is closed at the other end too
        pass
    return seen


def _messages(events: list[dict]) -> list[str]:
    """Console output, entries of the browser's log and uncaught exceptions."""
    told = []
    for event in events:
        params = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            told.append(str([argument.get("value") for argument in params["args"]]))
        elif event.get("method") == "Log.entryAdded":
            told.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            told.append(params["exceptionDetails"]["text"])
    return told


def _requests(events: list[dict]) -> list[str]:
    return [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
