"""Promise: the page at / works in a real browser on a real server, shows what the service said, and harms nobody."""

import io
import json
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from test_serve import CLIENT, Server
from tiny_model import CLASSES, PALETTE, encoded

from service import page as service_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
PATIENCE = 120  # seconds, as the machine may be busy

FILES = {
    "": "text/html; charset=utf-8",
    "page/page.css": "text/css; charset=utf-8",
    "page/page.js": "text/javascript; charset=utf-8",
    "page/key.js": "text/javascript; charset=utf-8",
    "page/png.js": "text/javascript; charset=utf-8",
    "page/request.js": "text/javascript; charset=utf-8",
    "page/icon.svg": "image/svg+xml",
    "samples/street.jpg": "image/jpeg",
}


# ---- over HTTP


@pytest.mark.parametrize("path", FILES)
def test_each_file_has_its_type_and_the_security_headers(client: TestClient, path: str) -> None:
    response = client.get(f"/{path}")
    assert response.status_code == 200
    assert response.headers["content-type"] == FILES[path]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert "script-src" not in policy


@pytest.mark.parametrize("path", ["", "page/page.js", "samples/street.jpg"])
def test_a_browser_that_has_the_file_is_not_sent_it_again(client: TestClient, path: str) -> None:
    etag = client.get(f"/{path}").headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        again = client.get(f"/{path}", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get(f"/{path}", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(f"/{path}")
    assert (head.status_code, head.headers["etag"]) == (200, etag)


@pytest.mark.parametrize("folder", ["page", "samples"])
@pytest.mark.parametrize("name", ["none.js", "../page.py", "..%2Fpage.py", "%2e%2e/settings.py", "/etc/passwd", "%00"])
def test_no_other_file_can_be_asked_for(client: TestClient, folder: str, name: str) -> None:
    response = client.get(f"/{folder}/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_the_page_names_nothing_outside_this_service() -> None:
    for file in service_page.PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("over HTTP", ""), file


def test_samples_have_the_credit_that_the_examples_folder_gives(client: TestClient) -> None:
    rows = client.get("/samples").json()
    listed = (service_page.EXAMPLES / "README.md").read_text()
    assert {row["name"] for row in rows} == {"street.jpg", "temple.jpg"}
    for row in rows:
        (line,) = [line for line in listed.splitlines() if f"| {row['name']} |" in line]
        assert row["licence"] in line
        assert client.get(f"/{row['url']}").content == (service_page.EXAMPLES / row["name"]).read_bytes()


def test_without_the_examples_folder_there_are_no_samples(
    client_with: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(service_page, "EXAMPLES", tmp_path)
    client = client_with()
    assert client.get("/samples").json() == []
    assert client.get("/samples/street.jpg").status_code == 404
    assert client.get("/").status_code == 200


def test_the_script_learns_the_settings_of_this_service(client_with: Callable[..., TestClient]) -> None:
    known = client_with(threshold=0.8, max_bytes=1234, max_scales=3).get("/page/settings").json()
    assert known == {
        "threshold": 0.8,
        "max_bytes": 1234,
        "min_scale": 0.25,
        "max_scale": 3.0,
        "max_scales": 3,
        "scales": [1.0],
        "flip": False,
    }


# ---- in a browser


class Browser:
    """Chromium without a window, and the few gestures that the tests need."""

    def __init__(self, url: str, downloads: Path) -> None:
        webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
        from selenium.webdriver.chrome.service import Service

        if not (CHROMIUM and CHROMEDRIVER):
            pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium-driver)")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1200,900"):
            options.add_argument(f"--{switch}")
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(CHROMEDRIVER))
        self.driver.set_script_timeout(PATIENCE)
        self.url, self.downloads = url, downloads

    def open(self) -> None:
        self.driver.get(self.url)
        self.until("document.body.classList.contains('ready')")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition} did not come true\n{self.text('body')}"
            time.sleep(0.03)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def give(self, file: Path) -> None:
        self.find("#file").send_keys(str(file))

    def segment(self, file: Path) -> None:
        self.give(file)
        self.until(f"{IDLE} && document.getElementById('status').textContent.startsWith({json.dumps(file.name)})")

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def legend(self) -> list[list[str]]:
        """Class, area and score of the rows that can be seen, from the top."""
        return self.run(
            "return [...document.querySelectorAll('#rows tr:not([hidden])')].map(row => [...row.cells]"
            ".map(cell => cell.textContent))"
        )

    def point_at(self, x: float, y: float, width: int, height: int) -> str:
        """Move the mouse to the middle of a mask pixel; gives the name shown there."""
        from selenium.webdriver import ActionChains

        pane = self.find("#blend")
        at = [
            round(((x + 0.5) / width - 0.5) * pane.size["width"]),
            round(((y + 0.5) / height - 0.5) * pane.size["height"]),
        ]
        ActionChains(self.driver, duration=0).move_to_element_with_offset(pane, *at).perform()
        return self.text("#probe")

    def downloaded(self, name: str) -> Path:
        path, deadline = self.downloads / name, time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline, sorted(self.downloads.iterdir())
            time.sleep(0.03)
        return path


IDLE = "document.getElementById('progress').hidden"

# A file given to the page by a paste or drop event: kind, bytes, name.
HAND_OVER = """
    const bytes = Uint8Array.from(arguments[1]);
    const data = new DataTransfer();
    data.items.add(new File([bytes], arguments[2], {type: 'image/png'}));
    const init = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
    const kind = arguments[0] === 'paste' ? ClipboardEvent : DragEvent;
    document.body.dispatchEvent(new kind(arguments[0], init));
"""


@pytest.fixture(scope="module")
def browser(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    server = Server(model_file, ENCNET_MAX_BYTES="400000")
    try:
        browser = Browser(server.url, tmp_path_factory.mktemp("downloads"))
        try:
            yield browser
            entries = browser.driver.get_log("browser")
            assert not [entry for entry in entries if "/segment" not in entry["message"]], "the page's own errors"
        finally:
            browser.driver.quit()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """uint8 (30, 40, 3) with 1/2 blue, 1/4 green, 5/24 black and 1/24 red: no two classes with the same area."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[15:] = PALETTE[3]
    pixels[:15, 20:] = PALETTE[2]
    pixels[:5, :10] = PALETTE[1]
    return pixels


@pytest.fixture
def scene_file(scene: np.ndarray, tmp_path: Path) -> Path:
    (tmp_path / "scene.png").write_bytes(encoded(scene))
    return tmp_path / "scene.png"


def test_the_legend_is_sorted_by_area_and_its_numbers_are_the_services(
    browser: Browser, client: TestClient, scene_file: Path
) -> None:
    browser.open()
    assert browser.text("#knows").splitlines()[1:] == CLASSES
    browser.segment(scene_file)
    rows = client.post("/segment", content=scene_file.read_bytes()).json()["presence"]
    score = {row["class"]: f"{row['score']:.2f}" for row in rows}
    assert browser.legend() == [
        ["blue", "50.0 %", score["blue"]],
        ["green", "25.0 %", score["green"]],
        ["black", "20.8 %", score["black"]],
        ["red", "4.2 %", score["red"]],
    ]
    assert browser.text("#summary") == "4 of 4 classes are present."
    assert "40 × 30 pixels, scale 1." in browser.text("#status")
    swatches = "return [...document.querySelectorAll('#rows .swatch')].map(mark => mark.style.background)"
    assert browser.run(swatches) == [f"rgb({r}, {g}, {b})" for r, g, b in (PALETTE[i] for i in (3, 2, 0, 1))]


def test_the_threshold_decides_in_the_page_who_is_present(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "black.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8)))
    browser.open()
    browser.segment(tmp_path / "black.png")  # black scores 0.99, the others 0.50 exactly
    assert browser.text("#summary") == "4 of 4 classes are present."
    browser.find("#threshold").send_keys("\ue014")  # arrow to the right
    assert browser.text("#threshold-value") == "0.51"
    assert browser.text("#summary") == "1 of 4 classes are present."
    assert [row[0] for row in browser.legend()] == ["black"]
    browser.find("#rest").click()
    assert browser.legend()[0] == ["black", "100.0 %", "0.99"]
    assert {tuple(row[1:]) for row in browser.legend()[1:]} == {("0 %", "0.50")}


def test_the_class_under_the_pointer(browser: Browser, scene: np.ndarray, scene_file: Path) -> None:
    browser.open()
    browser.segment(scene_file)
    known = {(2, 2): "red", (9, 4): "red", (10, 4): "black", (9, 5): "black", (19, 14): "black", (20, 14): "green"}
    for (x, y), name in {**known, (39, 0): "green", (19, 15): "blue", (39, 29): "blue"}.items():
        assert browser.point_at(x, y, 40, 30) == name, (x, y)
    colours = browser.run(
        "const c = document.getElementById('colours'); return [c.width, c.height,"
        " ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    assert colours[:2] == [40, 30]
    painted = np.array(colours[2:], np.uint8).reshape(30, 40, 4)
    np.testing.assert_array_equal(painted[..., :3], scene)  # the tiny model's palette is the colours it tells apart
    assert (painted[..., 3] == 255).all()


def test_everything_can_be_done_by_keyboard(browser: Browser, scene_file: Path) -> None:
    enter, tab, shift, right, down = "\ue007", "\ue004", "\ue008", "\ue014", "\ue015"
    browser.open()
    focused = []
    for _ in range(3):
        browser.press(tab)
        focused.append(browser.run("return document.activeElement.textContent"))
    assert focused[:2] == ["API", "Choose a picture"]
    browser.segment(scene_file)
    browser.run("document.getElementById('blend').focus()")
    browser.press(right)
    assert browser.text("#probe") == "blue"
    assert browser.run("return document.getElementById('spoken').textContent") == "blue at 21, 15"
    browser.press(shift + down)
    assert browser.run("return document.getElementById('spoken').textContent") == "blue at 21, 16"
    browser.press("-")
    assert browser.text("#opacity-value") == "40 %"
    browser.press("s")
    assert browser.find(".plain").is_displayed()
    browser.press("s")
    assert not browser.find(".plain").is_displayed()
    browser.find("#rows button").send_keys(enter)
    assert browser.find("#rows button").get_attribute("aria-pressed") == "true"
    first = browser.run(
        "return [...document.getElementById('colours').getContext('2d').getImageData(0, 0, 1, 1).data][3]"
    )
    assert first < 100  # red, while blue is looked at
    browser.find("#flip").send_keys(" ")
    browser.find("#scales input").send_keys(" ")
    assert "4 views" in browser.text("#views")
    browser.find("#run").send_keys(enter)
    browser.until(f"{IDLE} && document.getElementById('status').textContent.includes('scales 0.5, 1, mirrored too.')")
    assert not browser.find("#run").is_displayed()
    assert browser.run("return document.activeElement.id") == "blend"


def test_no_more_scales_than_are_allowed_and_where_that_is_one_another_one(browser: Browser, model_file: Path) -> None:
    chosen = "return [...document.querySelectorAll('#scales :checked')].map(box => box.value)"
    for most, expected in ((1, ["0.75"]), (2, ["0.75", "1"])):
        server = Server(model_file, ENCNET_MAX_SCALES=str(most))
        try:
            browser.driver.get(server.url)
            browser.until("document.body.classList.contains('ready')")
            for value in ("0.5", "0.5", "0.75", "1.25"):
                if browser.find(f"#scales [value='{value}']").is_enabled():
                    browser.find(f"#scales [value='{value}']").send_keys(" ")
            if most == 1:
                browser.find("#scales [value='0.75']").send_keys(" ")
            assert browser.run(chosen) == expected
        finally:
            server.stop()


def test_a_file_that_is_no_picture_is_a_sentence_and_the_page_goes_on(
    browser: Browser, scene_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "garbage.jpg").write_bytes(b"hello")
    browser.open()
    browser.give(tmp_path / "garbage.jpg")
    browser.until("!document.getElementById('error').hidden")
    assert browser.find("#error").get_attribute("role") == "alert"
    assert browser.text("#error-text").startswith("The data is not a picture in a format read here (JPEG, PNG,")
    assert browser.text("#error-text").endswith(".")
    assert browser.find("#welcome").is_displayed()
    browser.segment(scene_file)
    assert not browser.find("#error").is_displayed()
    assert len(browser.legend()) == 4


def test_escape_cancels_what_is_running_and_it_can_be_asked_again(browser: Browser, scene: np.ndarray) -> None:
    browser.open()
    escape = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));"
    browser.run(HAND_OVER + escape, "drop", list(encoded(scene)), "scene.png")  # in one go: no answer comes between
    browser.until(f"{IDLE} && document.getElementById('status').textContent === 'Cancelled.'")
    assert not browser.find("#legend").is_displayed()
    browser.until("document.querySelector('.blend img').naturalWidth === 40")
    browser.find("#run").click()
    browser.until(f"{IDLE} && document.getElementById('status').textContent.startsWith('scene.png: 40 × 30')")
    assert len(browser.legend()) == 4


def test_a_file_above_the_limit_is_refused_before_it_travels(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(b"\0" * 400_001)
    browser.open()
    browser.give(tmp_path / "big.png")
    browser.until("!document.getElementById('error').hidden")
    assert browser.text("#error-text") == "big.png has 0.4 MB; this service takes at most 0.4 MB."
    assert (
        browser.run("return performance.getEntriesByType('resource').filter(e => /segment/.test(e.name)).length") == 0
    )


def test_an_upright_picture_under_an_upright_mask(browser: Browser, scene: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture has to turn clockwise
    large = scene.repeat(8, 0).repeat(8, 1)
    (tmp_path / "turned.jpg").write_bytes(encoded(np.rot90(large), "JPEG", exif=exif, quality=95, subsampling=0))
    browser.open()
    browser.segment(tmp_path / "turned.jpg")
    assert "320 × 240 pixels, turned upright" in browser.text("#status")
    assert not browser.find("#note").is_displayed()
    assert browser.point_at(8, 8, 320, 240) == "red"
    browser.run("const o = document.getElementById('opacity'); o.value = 0; o.dispatchEvent(new Event('input'))")
    browser.press("d")
    bare = np.asarray(Image.open(browser.downloaded("turned.overlay.png")).convert("RGB")).astype(int)
    assert bare.shape == (240, 320, 3)
    assert np.abs(bare - large).mean() < 3


def test_a_picture_that_the_browser_cannot_show_as_it_is_read_has_its_colours(
    browser: Browser, scene: np.ndarray, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn, which Chromium leaves out for WebP
    (tmp_path / "turned.webp").write_bytes(encoded(np.rot90(scene, 2), "WEBP", exif=exif, lossless=True))
    (tmp_path / "scene.tif").write_bytes(encoded(scene, "TIFF"))
    browser.open()
    browser.segment(tmp_path / "turned.webp")
    assert browser.find("#note").is_displayed()
    browser.segment(tmp_path / "scene.tif")
    assert browser.text("#note") == (
        "This browser cannot show the picture as the service reads it; here are the colours alone."
    )
    assert browser.point_at(2, 2, 40, 30) == "red"


def test_such_a_picture_has_its_place_when_it_is_tried_again(
    browser: Browser, scene: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "scene.tif").write_bytes(encoded(scene, "TIFF"))
    browser.open()
    browser.run("window.real = fetch; window.fetch = () => Promise.reject(new TypeError('no network'));")
    browser.give(tmp_path / "scene.tif")
    browser.until("!document.getElementById('again').hidden && !document.getElementById('error').hidden")
    browser.run("window.fetch = real;")
    browser.find("#again").click()
    browser.until(f"{IDLE} && document.getElementById('status').textContent.startsWith('scene.tif: 40 × 30')")
    assert browser.find("#panes").is_displayed()
    assert not browser.find("#welcome").is_displayed()


def test_a_sample_that_is_late_or_missing_takes_no_place(browser: Browser, scene_file: Path) -> None:
    browser.open()
    browser.run(
        "window.real = fetch;"
        "window.fetch = async (url, ...more) => {"
        "  if (/samples/.test(url)) { await new Promise(done => window.go = done); }"
        "  return real(url, ...more); };"
    )
    browser.find("#sample-list button").click()
    browser.segment(scene_file)
    browser.run("go();")
    time.sleep(0.5)
    browser.until(f"{IDLE} && document.getElementById('status').textContent.startsWith('scene.png: 40 × 30')")
    browser.run("window.fetch = async () => new Response('{}', {status: 503});")
    browser.find("#sample-list button").click()
    browser.until("!document.getElementById('error').hidden")
    assert browser.text("#error-text") == "The service answered 503."


def test_of_several_files_the_first_is_taken_unless_it_is_refused(
    browser: Browser, scene_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "big.png").write_bytes(b"\0" * 400_001)
    browser.open()
    browser.run("document.getElementById('file').multiple = true;")
    browser.find("#file").send_keys(f"{tmp_path / 'big.png'}\n{scene_file}")
    browser.until("!document.getElementById('error').hidden")
    assert browser.text("#error-text").startswith("big.png has 0.4 MB")


def test_what_became_of_an_earlier_picture_says_nothing_of_a_later_one(
    browser: Browser, scene: np.ndarray, scene_file: Path
) -> None:
    browser.open()
    browser.run(
        "window.decode = HTMLImageElement.prototype.decode;"
        "HTMLImageElement.prototype.decode = () => new Promise((done, fail) => window.giveUp = fail);"
        "window.real = fetch;"
        "window.fetch = async (...given) => { window.refused = true; return new Response('{}', {status: 429}); };"
    )
    browser.run(HAND_OVER, "drop", list(encoded(scene)), "slow.png")
    browser.until("window.refused")
    browser.run("window.fetch = real; HTMLImageElement.prototype.decode = decode;")
    browser.segment(scene_file)
    browser.run("giveUp();")
    time.sleep(0.5)
    assert not browser.find("#error").is_displayed()
    assert not browser.find("#welcome").is_displayed()


def test_another_picture_can_be_chosen_while_there_is_no_result(
    browser: Browser, scene: np.ndarray, scene_file: Path, tmp_path: Path
) -> None:
    large = encoded(scene.repeat(8, 0).repeat(8, 1), "JPEG")
    (tmp_path / "broken.jpg").write_bytes(large[: len(large) // 2])
    browser.open()
    browser.give(tmp_path / "broken.jpg")
    browser.until("!document.getElementById('error').hidden")
    assert browser.find("#panes").is_displayed()
    assert browser.text("#tools") == "New picture"
    browser.segment(scene_file)
    assert browser.find("#save-mask").is_displayed()


def test_a_file_that_was_changed_or_is_a_folder_is_not_the_networks_fault(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8)))
    browser.open()
    browser.segment(tmp_path / "scene.png")
    (tmp_path / "scene.png").unlink()
    browser.find("#flip").send_keys(" ")
    browser.find("#run").click()
    browser.until("!document.getElementById('error').hidden")
    assert browser.text("#error-text") == (
        "The file scene.png cannot be read: it is a folder, or was changed after it was chosen."
    )
    assert not browser.find("#again").is_displayed()


def test_an_answer_that_breaks_off_or_is_anothers_is_a_sentence(browser: Browser, scene: np.ndarray) -> None:
    page = "new Response('<!doctype html>')"
    cut = "new Response(new ReadableStream({start: body => body.error(new TypeError('network error'))}))"
    for answer, said in (
        (page, "What answers here is not the service. Does a proxy or a sign-in page stand before it?"),
        (cut, "The service does not answer. Is it still running, and is the network up?"),
    ):
        browser.open()
        browser.run(f"window.fetch = async () => {answer};")
        browser.run(HAND_OVER, "drop", list(encoded(scene)), "scene.png")
        browser.until("!document.getElementById('error').hidden")
        assert browser.text("#error-text") == said
        assert browser.find("#again").is_displayed()


def test_a_model_that_was_exchanged_has_its_own_names_and_long_ones_are_not_cut(
    browser: Browser, changed_model: Callable[..., Path], scene_file: Path
) -> None:
    server = Server(changed_model())
    try:
        browser.driver.get(server.url)
        browser.until("document.body.classList.contains('ready')")
        classes = ["black", "escalator_and_moving_staircase", "leaf", "sea"]
        changed_model(name="another", classes=json.dumps(classes))
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while CLIENT.get(f"{server.url}/classes").json()["model"]["name"] != "another":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        browser.segment(scene_file)
        assert [row[0] for row in browser.legend()] == ["sea", "leaf", "black", "escalator and moving staircase"]
        assert browser.text("#model") == "another"
        cut = "button => button.scrollWidth > button.parentElement.clientWidth + 8"
        assert not browser.run(f"return [...document.querySelectorAll('#rows button')].filter({cut}).length")
    finally:
        server.stop()


def test_one_of_several_models_is_chosen_and_the_picture_segmented_anew(
    browser: Browser, model_file: Path, changed_model: Callable[..., Path], scene_file: Path
) -> None:
    second = changed_model(name="another", classes=json.dumps(["black", "brick", "leaf", "sea"]))
    server = Server(model_file, ENCNET_MODELS=f"second={second}")
    try:
        browser.driver.get(server.url)
        browser.until("document.body.classList.contains('ready')")
        assert not browser.find("#model").is_displayed()
        browser.segment(scene_file)
        assert [row[0] for row in browser.legend()] == ["blue", "green", "black", "red"]
        browser.find("#models").send_keys("second")
        browser.until(
            f"document.body.classList.contains('answered') && {IDLE} && !document.getElementById('legend').hidden"
        )
        assert [row[0] for row in browser.legend()] == ["sea", "leaf", "black", "brick"]
        assert browser.text("#count") == "4 classes"
        assert not browser.run("return document.querySelector('.panes').classList.contains('two')"), "S chose, no more"
        assert 'encnet_pictures_total{model="second"} 1.0' in CLIENT.get(f"{server.url}/metrics").text
    finally:
        server.stop()


def test_of_one_model_there_is_no_choice(browser: Browser) -> None:
    browser.open()
    assert not browser.find("#models").is_displayed()
    assert browser.text("#model") == "encnet-tiny"


def test_downloads_are_the_mask_of_the_service_and_the_picture_as_shown(
    browser: Browser, client: TestClient, quadrants_mask: np.ndarray, tmp_path: Path
) -> None:
    grey = np.full((30, 40, 3), 100, np.uint8)
    grey[:15, 20:] = 200, 60, 60
    (tmp_path / "saved.png").write_bytes(encoded(grey))
    browser.open()
    browser.segment(tmp_path / "saved.png")
    browser.find("#save-mask").click()
    browser.find("#save-overlay").click()
    expected = client.post("/segment?format=png", content=encoded(grey)).content
    assert browser.downloaded("saved.mask.png").read_bytes() == expected
    mask = np.asarray(Image.open(io.BytesIO(expected)))
    overlay = np.asarray(Image.open(browser.downloaded("saved.overlay.png")).convert("RGB")).astype(int)
    blended = (grey.astype(int) + np.array(PALETTE)[mask]) / 2
    assert set(np.unique(mask)) == {0, 1}
    assert np.abs(overlay - blended).max() <= 2


def test_a_picture_can_be_dropped_pasted_or_taken_from_the_samples(browser: Browser, scene: np.ndarray) -> None:
    browser.open()
    for kind, name in (("paste", "pasted.png"), ("drop", "dropped.png")):
        browser.run(HAND_OVER, kind, list(encoded(scene)), name)
        browser.until(f"{IDLE} && document.getElementById('status').textContent.startsWith('{name}: 40 × 30')")
        assert len(browser.legend()) == 4
    browser.find("#sample-list button").click()
    browser.until(f"{IDLE} && document.getElementById('status').textContent.startsWith('street.jpg: 751 × 563')")
    assert "Apache-2.0" in browser.text("#samples")


def test_the_time_is_drawn_in_the_services_phases(browser: Browser, scene_file: Path) -> None:
    browser.open()
    browser.segment(scene_file)
    names = [name.text for name in browser.driver.find_elements("css selector", "#phases dt")]
    assert names[-1] == "transfer"
    assert {"decode", "inference", "encode"} <= set(names)
    parts = browser.run("return [...document.getElementById('bar').children].map(part => Number(part.style.flexGrow))")
    assert len(parts) == len(names)
    assert sum(parts) > 0
    total = browser.text("#total")
    shown = float(total.split()[0]) * (1000 if total.endswith(" s") else 1)
    assert shown == pytest.approx(sum(parts), rel=0.01, abs=1)


REFUSALS = [
    (429, {"Retry-After": "7"}, {"error": {"code": "busy", "message": "too much is waiting", "request_id": "a"}}),
    (500, {}, {"error": {"code": "internal_error", "message": "the service failed.", "request_id": "abc-1"}}),
    (502, {}, None),
]


def test_every_refusal_is_a_sentence(browser: Browser) -> None:
    browser.open()
    said = [
        browser.driver.execute_async_script(
            """
            const [status, headers, body, done] = arguments;
            const text = body ? JSON.stringify(body) : '<html>';
            import('./page/request.js').then(({refusalOf}) => refusalOf(new Response(text, {status, headers})))
                .then(refusal => done([refusal.message, refusal.again]));
            """,
            *refusal,
        )
        for refusal in REFUSALS
    ]
    assert said == [
        ["Too much is waiting. Try again in 7 seconds.", True],
        ["The service failed. The request was abc-1.", False],
        ["The service answered 502.", True],
    ]


# ---- the page's own PNG reader


def png(rows: np.ndarray, width: int, depth: int, kind: int, filters: list[int]) -> bytes:
    """A PNG from packed rows uint8 (H, stride), row y filtered with filters[y % len], as the specification says."""
    pixel = max(1, depth // 8)
    wide = np.pad(rows.astype(int), ((1, 0), (pixel, 0)))
    body = b""
    for y, row in enumerate(rows.astype(int), start=1):
        left, up, corner = wide[y, :-pixel], wide[y - 1, pixel:], wide[y - 1, :-pixel]
        near = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner]))
        paeth = np.choose(near.argmin(axis=0), [left, up, corner])  # argmin takes the first of equals, as is the rule
        filter_ = filters[(y - 1) % len(filters)]
        predicted = {1: left, 2: up, 3: (left + up) // 2, 4: paeth}.get(filter_, 0 * left)
        body += bytes([filter_]) + ((row - predicted) % 256).astype(np.uint8).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if kind == 3 and depth == 8 else b""
    packed = zlib.compress(body)
    data = chunk(b"IDAT", packed[:5]) + chunk(b"IDAT", packed[5:])  # a stream may be cut anywhere
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + data + chunk(b"IEND", b"")


def read_labels(browser: Browser, file: bytes) -> Any:
    return browser.driver.execute_async_script(
        """
        const [bytes, done] = arguments;
        import('./page/png.js').then(({readLabels}) => readLabels(Uint8Array.from(bytes)))
            .then(({width, height, values}) => done([width, height, ...values]), error => done(error.message));
        """,
        list(file),
    )


def test_the_png_reader_gives_back_every_label(browser: Browser) -> None:
    browser.open()
    for depth, kind in ((1, 3), (2, 3), (4, 3), (8, 3), (8, 0), (16, 0)):
        labels = np.random.default_rng(depth).integers(0, 2**depth, (11, 13))
        bits = (labels[..., None] >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(11, -1).astype(np.uint8), axis=1)
        for filters in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
            file = png(rows, 13, depth, kind, filters)
            if kind == 0:
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), labels)  # the writer above
            assert read_labels(browser, file) == [13, 11, *labels.ravel()], (depth, kind, filters)


def test_the_png_reader_says_what_is_wrong(browser: Browser, scene: np.ndarray) -> None:
    good = encoded(Image.fromarray(scene[..., 0]))
    browser.open()
    assert read_labels(browser, good)[:2] == [40, 30]
    assert read_labels(browser, b"GIF89a") == "the mask is not a PNG file"
    assert read_labels(browser, good[:60]) == "the PNG is cut short"
    assert "colour type 2" in read_labels(browser, encoded(scene))
    assert "filter 5" in read_labels(browser, png(np.zeros((2, 4), np.uint8), 4, 8, 0, [5]))
    assert "10 bytes of rows where 15" in read_labels(
        browser,
        png(np.zeros((2, 4), np.uint8), 4, 8, 0, [0]).replace(struct.pack(">II", 4, 2), struct.pack(">II", 4, 3)),
    )


def test_a_page_that_cannot_start_says_so_and_can_be_tried_again(browser: Browser, model_file: Path) -> None:
    server = Server(model_file, ENCNET_API_KEYS="opens")
    try:
        browser.driver.get(server.url)
        browser.until("document.getElementById('lock').open")
        browser.press("\ue00c")
        browser.until("!document.getElementById('error').hidden && !document.getElementById('lock').open")
        assert browser.run("return [...document.querySelectorAll('.choose')].every(button => button.disabled)")
        drop = "const drop = new DragEvent('drop', {cancelable: true}); dispatchEvent(drop);"
        assert browser.run(f"{drop} return drop.defaultPrevented"), "the browser would open the file"
        browser.find("#dismiss").click()
        assert not browser.find("#error").is_displayed()
        browser.driver.refresh()
        browser.until("document.getElementById('lock').open")
        browser.find("#key").send_keys("opens\ue007")
        browser.until("document.body.classList.contains('ready')")
        browser.run("sessionStorage.clear()")
        browser.driver.get_log("browser")
    finally:
        server.stop()


def test_the_key_is_kept_for_the_page_where_the_browser_stores_nothing(
    browser: Browser, model_file: Path, scene_file: Path
) -> None:
    """As one does that is set to take no cookies."""
    refusing = "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('', 'Security'); }})"
    added = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refusing})
    server = Server(model_file, ENCNET_API_KEYS="opens")
    try:
        browser.driver.get(server.url)
        browser.until("document.getElementById('lock').open")
        browser.find("#key").send_keys("opens\ue007")
        browser.until("document.body.classList.contains('ready')")
        browser.segment(scene_file)
        assert browser.text("#summary") == "4 of 4 classes are present."
        browser.driver.get_log("browser")
    finally:
        server.stop()
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_service_with_keys_is_asked_for_one(browser: Browser, model_file: Path, scene_file: Path) -> None:
    server = Server(model_file, ENCNET_API_KEYS="opens")
    try:
        browser.driver.get(server.url)
        browser.until("document.getElementById('lock').open")
        assert not browser.find("#wrong-key").is_displayed()
        browser.find("#key").send_keys("does not\ue007")
        browser.until("document.getElementById('lock').open && !document.getElementById('wrong-key').hidden")
        browser.find("#key").send_keys("opens✓\ue007")
        browser.until("document.getElementById('key').validity.patternMismatch")
        assert browser.run("return sessionStorage.getItem('encnet-key')") == "does not", "it could not be sent"
        browser.find("#key").clear()
        browser.find("#key").send_keys("opens\ue007")
        browser.until("document.body.classList.contains('ready')")
        browser.segment(scene_file)
        assert browser.text("#summary") == "4 of 4 classes are present."
        said = [entry["message"] for entry in browser.driver.get_log("browser")]
        assert sum(server.url in message and "401" in message for message in said) == 2
        assert all(server.url in message or "/segment" in message for message in said), "the page's own errors"
        browser.driver.get(server.url)
        browser.until("document.body.classList.contains('ready')")
        assert not browser.find("#lock").is_displayed(), "the key is kept while the tab is open"
    finally:
        server.stop()
