"""Pictures of each section of a run's report, for a person to look at: `python benchmarks/screenshots.py DIR OUT`.

Desktop and phone, light and dark, and the page as it prints. Needs Chromium and its driver. Tells what the console has.
"""

import argparse
import base64
import pathlib
import shutil
import tempfile
import time
from typing import Any

from selenium import webdriver

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
DEVICES = {"desktop": (1280, 900, 1, False), "phone": (390, 844, 2, True)}
HIGHEST = 1600  # pixels of a section
SECTIONS = (
    "return [...document.querySelectorAll('header, section')].map(s => { const r = s.getBoundingClientRect();"
    " return [s.id || 'header', r.x + scrollX, r.y + scrollY, r.width, r.height] })"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for device in DEVICES:
                for theme in ("light", "dark"):
                    picture(browser, given.run_dir / "report.html", given.out, device, theme)
            pdf = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
            (given.out / "paper.pdf").write_bytes(base64.b64decode(pdf["data"]))
        finally:
            browser.quit()


def picture(browser: Any, page: pathlib.Path, out: pathlib.Path, device: str, theme: str) -> None:
    """Save every section as OUT/DEVICE-THEME-SECTION.png."""
    width, height, scale, phone = DEVICES[device]
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.resolve().as_uri())
    while not browser.execute_script("return document.documentElement.dataset.ready"):
        time.sleep(0.1)
    for name, x, y, wide, high in browser.execute_script(SECTIONS):
        clip = {"x": x, "y": y, "width": wide, "height": min(high, HIGHEST), "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (out / f"{device}-{theme}-{name}.png").write_bytes(base64.b64decode(shot["data"]))
    said = [entry["message"] for entry in browser.get_log("browser")]
    print(f"{device}, {theme}: {'; '.join(said) or 'nothing in the console'}")


if __name__ == "__main__":
    main()
