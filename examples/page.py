"""Photograph the web page for README: `python -m examples.page URL OUTPUT.jpg`, with the service running at URL.

Needs chromium, chromedriver and selenium. The page segments street.jpg, and the mouse rests on a wall.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

WIDTH, HEIGHT = 1400, 900
PATIENCE = 120  # seconds
ANSWERED = "return document.body.classList.contains('answered') && document.getElementById('progress').hidden"
RESTING = "return document.getAnimations().length === 0"


def main(url: str, output: Path) -> None:
    options = webdriver.ChromeOptions()
    for switch in ("headless=new", "no-sandbox", "hide-scrollbars", f"window-size={WIDTH},{HEIGHT}"):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(f"{url}/?sample=street")
        for condition in (ANSWERED, RESTING):
            WebDriverWait(driver, PATIENCE).until(lambda driver, script=condition: driver.execute_script(script))
        pane = driver.find_element("id", "blend")
        ActionChains(driver).move_to_element_with_offset(pane, -250, -100).perform()
        Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB").save(output, quality=85, optimize=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
    except (WebDriverException, OSError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
