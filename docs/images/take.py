"""Take the screenshots of the docs from a demo that ran (`make demo`), in headless Chromium.

    .venv/bin/python docs/images/take.py .ratchet/demo

Its services have to run still. In MLflow's page it sets the tags by which a person puts the newest version in
charge, and waits until they took effect, so the demo's champion changes. Git's user is shown as Ana.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
SIZE = {"width": 1400, "height": 860}
WAIT = 120_000  # ms
RENAME = """name => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(name, 'Ana');
}"""


def main(home: Path) -> None:
    status = read_status(home)
    newest, project = 2, status["project"]
    urls = {name: one["url"] for name, one in status["services"].items()}
    if status["champion"]["version"] == newest:
        ratchet(home, "rollback", "--reason", "to show a decision")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(WAIT)
        page.goto(f"{urls['gateway']}/", wait_until="networkidle")
        save(page, home, "page")
        page.goto(f"{urls['prefect']}/runs", wait_until="networkidle")
        save(page, home, "prefect-runs")
        registry = f"{urls['mlflow']}/#/models/{project}"
        open_registry(page, f"{registry}/versions/{newest}", "Registered At")
        save(page, home, "mlflow-version")
        open_registry(page, registry, "New model registry UI")
        page.get_by_role("row").nth(1).get_by_role("button").first.click()  # newest version: edit its tags
        page.get_by_role("dialog").wait_for()
        for key, value in (("reason", "the new packages matter more to us"), ("decision", "force")):
            add_tag(page, key, value)
        save(page, home, "mlflow-decision")
        page.get_by_role("button", name="Save tags").click()
        until = time.monotonic() + 180
        while read_status(home)["champion"]["version"] != newest:
            assert time.monotonic() < until, "the decision took no effect"
            time.sleep(5)
        open_registry(page, registry, "champion")
        save(page, home, "mlflow-versions")
        browser.close()


def open_registry(page: Page, url: str, text: str) -> None:
    page.goto("about:blank")  # a change of the fragment alone would load nothing
    page.goto(url, wait_until="load")
    page.get_by_text(text).first.wait_for()
    assistant = page.get_by_role("button", name="Close")
    if assistant.count():
        assistant.first.click()


def add_tag(page: Page, key: str, value: str) -> None:
    """Fill MLflow's form for a tag, and press its plus."""
    form = page.get_by_role("dialog")
    form.get_by_role("combobox").click()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    form.get_by_label("Value (optional)").fill(value)
    form.get_by_role("button", name="Add tag").click()


def ratchet(home: Path, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("ratchet")), "-C", str(home), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_status(home: Path) -> Any:
    return json.loads(ratchet(home, "status", "--json"))


def save(page: Page, home: Path, name: str) -> None:
    time.sleep(1)  # what fades in has come
    user = subprocess.run(
        ["git", "-C", str(home), "config", "user.name"], capture_output=True, text=True, check=False
    ).stdout.strip()
    page.evaluate(RENAME, user or "Ratchet")
    page.screenshot(path=HERE / f"{name}.png")
    print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
