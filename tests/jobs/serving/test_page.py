"""The web page in a real Chromium, over the real HTTP interface and an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from jobs.serving.app import AppSettings, build
from jobs.serving.host import EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.service import Service
from jobs.serving.source import RunSource
from tests.support.answering import CAPTIONER, TOKENIZER, Local, answering
from tests.support.browser import chromium, listening, needs_chromium
from tests.support.browser import page as open_page
from tests.support.served import CONTEXT, expected_text, make_run, write_checkpoint

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def page(browser: Any, url: str, scheme: str = "light", width: int = 900) -> AbstractContextManager[Any]:
    """Answers that refuse something belong to the tests."""
    return open_page(browser, url, scheme, width, but="status of")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("page") / "run"
    with answering(folder, model="jobs.models.captioner:build", arguments=CAPTIONER) as local:
        yield local


def drawing(folder: Path) -> Path:
    image = Image.new("RGB", (320, 240), "#9fd3f0")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 170, 320, 240), fill="#5a9e4b")
    draw.ellipse((220, 20, 280, 80), fill="#f8d64e")
    draw.polygon([(60, 170), (110, 90), (160, 170)], fill="#8a5a3c")
    image.save(folder / "hill.png")
    return folder / "hill.png"


@pytest.mark.parametrize(("scheme", "width"), [("dark", 900), ("light", 380)])
def test_an_image_is_described(
    browser: Any, captioner: Local, tmp_path: Path, scheme: str, width: int
) -> None:
    service = Service("painter", "caption", 78, 18, TOKENIZER, 16, 1600, ("de", "en", "fr"))
    app = build(service, AppSettings(), captioner)
    with listening(app) as url, page(browser, url, scheme, width) as shown:
        shown.get_by_role("heading", name="painter").wait_for()
        assert shown.locator("#language option").all_inner_texts() == [
            "English (en)",
            "French (fr)",
            "German (de)",
        ]
        shown.locator("#go").click()
        assert shown.locator("#error").inner_text() == "Choose an image first."
        # by the keyboard alone: Enter on the drop zone opens the file chooser
        with shown.expect_file_chooser() as chooser:
            shown.locator("#drop").press("Enter")
        chooser.value.set_files(drawing(tmp_path))
        shown.locator("#language").select_option("fr")
        shown.locator("#most").fill("20")
        shown.locator("#go").press("Enter")
        shown.get_by_text("tokens by the checkpoint of step 10").wait_for()
        asked = captioner.asked[-1]
        assert asked.prompt.tokens == (TOKENIZER.language("fr"),) and asked.prompt.image is not None
        assert asked.max_tokens == 20
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert shown.locator("#preview").evaluate("image => image.naturalWidth") == 320


def test_text_is_continued_behind_a_token(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    layers = write_checkpoint(folder, make_run(folder), 30, 1)
    host = EngineHost(RunSource(folder), Limits(), 1, 1000.0)
    app = build(Service("story", "completions", CONTEXT), AppSettings(token="open sesame"), Local(host))
    with listening(app) as url, page(browser, url) as shown:
        shown.locator("#token").fill("wrong")
        shown.locator("#go").click()
        shown.get_by_text("This token is not the right one.").wait_for()
        shown.locator("#token").fill("open sesame")
        shown.locator("#token").press("Enter")
        shown.get_by_role("heading", name="story").wait_for()
        shown.locator("#prompt").fill("once upon")
        shown.locator("#most").fill("50")
        shown.locator("#go").click()
        shown.get_by_text("50 tokens by the checkpoint of step 30").wait_for()
        assert shown.locator("#text").text_content() == "once upon" + expected_text(layers, "once upon", 50)
        shown.locator("#most").fill("5000")
        shown.locator("#form").evaluate("form => form.noValidate = true")
        shown.locator("#go").click()
        shown.get_by_text("lower max_tokens or shorten the prompt").wait_for()
        assert shown.locator("#answer").is_hidden() and shown.locator("#access").is_hidden()
    host.close()
