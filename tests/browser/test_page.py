"""The whole way through the page in a real browser: train, draw with the adapter, load again, restore."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

pytestmark = pytest.mark.browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SERVE = "from studio.ui.app import serve; serve(port=0, on_ready=lambda url: print(url, flush=True))"
WAIT = 60_000  # ms; a cold start imports torch and diffusers on a machine that may be busy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the page's workspace."""
    return tmp_path_factory.mktemp("page") / "home"


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """Serve the page with a workspace of its own in a process of its own."""
    environment = os.environ | {"STUDIO_HOME": str(home)}
    command = [sys.executable, "-P", "-c", SERVE]
    with subprocess.Popen(
        command, env=environment, cwd=home.parent, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a browser."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=WAIT)
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Open the page; anything it fetches from elsewhere, and any script error, fails the test."""
    strangers: list[str] = []
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 1400, "height": 1250})
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: _note_stranger(request.url, strangers))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert not strangers, f"the page fetched from elsewhere: {strangers}"
    assert not errors, f"script errors on the page: {errors}"


def _note_stranger(url: str, strangers: list[str]) -> None:
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost"):
        strangers.append(url)


@pytest.fixture(scope="module")
def base(home: Path, short_sd: Callable[[], Any]) -> Path:
    """Save a tiny base model for the page to work with."""
    short_sd().save_pretrained(home.parent / "tiny-base")
    return home.parent / "tiny-base"


@pytest.fixture
def drawings(tmp_path: Path) -> list[Path]:
    """Write a few pictures to train on, one with a caption of its own."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    for index in range(4):
        image = Image.new("RGB", (96, 96), ("navy", "teal", "olive", "maroon")[index])
        ImageDraw.Draw(image).ellipse((20 + 4 * index, 16, 76, 80), fill="gold")
        image.save(folder / f"{index}.png")
    (folder / "0.txt").write_text("a photo of sks coin on a navy background")
    return sorted(folder.iterdir())


def _screenshot(page: Any, name: str) -> None:
    """Keep a picture of the page for whoever looks at it, in the folder STUDIO_SCREENSHOTS."""
    if folder := os.environ.get("STUDIO_SCREENSHOTS"):
        page.wait_for_timeout(700)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def _fill(page: Any, field: str, value: str) -> None:
    box = page.locator(f"#{field} input, #{field} textarea").first
    box.fill(value)
    box.press("Tab")


def _choose_base(page: Any, base: Path) -> None:
    """Choose a base to train on, and wait until the rate of the demo has gone."""
    from playwright.sync_api import expect

    _fill(page, "train-base", str(base))
    expect(page.locator("#train-rate input")).to_have_value("")
    expect(page.locator("#train-rate input")).to_have_attribute("placeholder", "auto: 0.001")


CHART = "#train-chart canvas, #train-chart svg.marks"


def _no_overflow(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def _fits_a_phone(page: Any) -> bool:
    """Say whether the page is as wide as a phone, and its chart whole, on the screen of one."""
    before = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 850})
    page.wait_for_timeout(300)
    frame, chart = (page.locator(name).first.bounding_box() for name in ("#train-chart", CHART))
    whole = chart["y"] + chart["height"] <= frame["y"] + frame["height"]
    narrow = _no_overflow(page)
    page.set_viewport_size(before)
    return whole and narrow


def test_a_user_trains_draws_reloads_and_restores(
    page: Any, address: str, home: Path, base: Path, drawings: list[Path]
) -> None:
    from playwright.sync_api import expect

    _screenshot(page, "1-opened")
    assert _no_overflow(page)

    page.locator("#train-drop input[type=file]").set_input_files([str(path) for path in drawings])
    expect(page.locator("#train-set img")).to_have_count(4)
    _choose_base(page, base)
    _fill(page, "train-prompt", "a photo of sks coin")
    _fill(page, "train-name", "coin")
    _fill(page, "train-steps", "0")
    page.locator("#train-start").click()
    expect(page.locator("#train-message")).to_contain_text(
        "steps: Input should be greater than or equal to 1"
    )
    _screenshot(page, "2-refused")

    _fill(page, "train-steps", "24")
    _fill(page, "train-sample-every", "12")
    page.locator("#train-start").click()
    expect(page.locator("#train-status .job")).to_have_attribute("data-state", "running")
    _screenshot(page, "3-training")
    expect(page.locator("#train-status .job")).to_have_attribute("data-state", "done")
    expect(page.locator("#train-status")).to_contain_text("step 24 of 24")
    expect(page.locator("#train-download .filename")).to_have_attribute("aria-label", "coin.safetensors")
    expect(page.locator("#train-pictures img")).to_have_count(3)
    expect(page.locator(CHART).first).to_be_visible()
    _screenshot(page, "4-trained")
    assert _fits_a_phone(page)
    assert (home / "adapters" / "coin.safetensors").is_file()
    with page.expect_download() as download:
        page.locator("#train-download a").click()
    assert download.value.suggested_filename == "coin.safetensors"

    page.locator("#train-use").click()
    expect(page.locator("#generate-adapters")).to_contain_text("coin.safetensors")
    expect(page.locator("#generate-prompt textarea")).to_have_value("a photo of sks coin")
    _fill(page, "generate-count", "3")
    _fill(page, "generate-steps", "4")
    _fill(page, "generate-seed", "7")
    page.locator("#generate-start").click()
    expect(page.locator("#generate-status .job")).to_have_attribute("data-state", "done")
    expect(page.locator("#generate-pictures img")).to_have_count(3)
    _screenshot(page, "5-drawn")
    assert _no_overflow(page)

    page.goto(address)
    expect(page.locator("#train-status")).to_contain_text("step 24 of 24")
    expect(page.locator("#train-pictures img")).to_have_count(3)
    expect(page.locator("#train-prompt textarea, #train-prompt input").first).to_have_value(
        "a photo of sks coin"
    )
    expect(page.locator(CHART).first).to_be_visible()
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#generate-pictures img")).to_have_count(3)
    expect(page.locator("#generate-seed input")).to_have_value("7")
    _screenshot(page, "6-loaded-again")

    _fill(page, "generate-seed", "99")
    page.locator("#settings button").first.click()
    picture = next((home / "pictures").glob("*/*-8.png"))
    page.locator("#generate-drop input[type=file]").set_input_files(str(picture))
    expect(page.locator("#generate-seed input")).to_have_value("8")
    expect(page.locator("#generate-message")).to_contain_text("restored")
    _screenshot(page, "7-restored")


def test_stop_ends_a_training_safely_keeps_its_adapter_and_retry_goes_on_from_there(
    page: Any, home: Path, base: Path, drawings: list[Path]
) -> None:
    from playwright.sync_api import expect

    if (home / "adapters").is_dir() and any((home / "adapters").iterdir()):
        # The page restores the other test's run when it is loaded, and would do so over what is filled in.
        expect(page.locator("#train-status")).to_contain_text("Trained")
    page.locator("#train-drop input[type=file]").set_input_files([str(path) for path in drawings])
    _choose_base(page, base)
    _fill(page, "train-name", "long")
    _fill(page, "train-steps", "100000")
    page.locator("#train-start").click()
    expect(page.locator("#train-status")).to_contain_text("of 100000")
    page.reload()
    expect(page.locator("#train-status .job")).to_have_attribute("data-state", "running")
    page.locator("#train-stop").click()
    expect(page.locator("#train-status .job")).to_have_attribute("data-state", "cancelled")
    expect(page.locator("#train-download .filename")).to_have_attribute("aria-label", "long.safetensors")
    _screenshot(page, "8-stopped")

    page.locator("#train-retry").click()
    expect(page.locator("#train-status")).to_contain_text("Goes on after step")
    page.locator("#train-stop").click()
    expect(page.locator("#train-status .job")).to_have_attribute("data-state", "cancelled")
