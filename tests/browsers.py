"""A real browser for the tests of pages: Debian's Chromium without a screen, driven by selenium."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

REPORT = Path(sys.prefix) / "chromium"  # of install_debian.py


@contextmanager
def chromium() -> Iterator[Any]:
    """Opens a browser that logs what its console says and what it loads; skips the test without one."""
    told = REPORT.read_text().strip() if REPORT.exists() else ""
    if told != "ready":
        pytest.skip(told or "no browser: tests/install_debian.py gets one")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    try:
        yield driver
    finally:
        driver.quit()


def visit(
    driver: Any, page: Path, *, width: int = 1400, height: int = 900, dark: bool = False
) -> None:
    """Opens a page, and waits until what is in sight is there; the logs begin anew.

    Args:
        driver: of `chromium`.
        page: the page's file.
        width: of the page in CSS pixels, which may be less than a window's.
        height: likewise.
        dark: whether the user prefers dark colours.
    """
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get("about:blank")  # the page before may still be loading
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(page.as_uri())
    settle(driver)


def settle(driver: Any) -> None:
    """Waits until the pictures in sight are loaded and what changed is drawn."""
    driver.execute_async_script(
        """
        const done = arguments[0];
        const later = () => [...document.images].every((one) => one.complete)
          ? requestAnimationFrame(() => setTimeout(done, 50)) : setTimeout(later, 20);
        setTimeout(later, 150);
        """
    )


def addresses(driver: Any) -> list[str]:
    """What was asked for since the last call, whether it came or not."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def faults(driver: Any, folder: Path) -> list[str]:
    """What is wrong with the page that is open: errors, requests that leave its folder, its width.

    Args:
        driver: of `chromium`.
        folder: of the page.
    """
    wrong = [entry["message"] for entry in driver.get_log("browser")]
    allowed = (f"{folder.as_uri()}/", "data:", "blob:")
    wrong += [f"asks for {a}" for a in addresses(driver) if not a.startswith(allowed)]
    wide, window = driver.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    if wide > window:
        wrong.append(f"is {wide} pixels wide, scrolls sideways at {window}")
    wrong += driver.execute_script(
        "return [...document.images].filter((one) => one.complete && !one.naturalWidth)"
        ".map((one) => `cannot show ${one.src.slice(0, 200)}`)"
    )
    return wrong


def press(driver: Any, keys: str) -> None:
    """Presses keys, and waits for what they do."""
    driver.switch_to.active_element.send_keys(keys)
    settle(driver)


def canvas(driver: Any, selector: str) -> NDArray[np.uint8]:
    """[H, W, 4], the pixels of a canvas."""
    url = driver.execute_script("return document.querySelector(arguments[0]).toDataURL()", selector)
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as picture:
        return np.asarray(picture.convert("RGBA"))
