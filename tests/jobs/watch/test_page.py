"""The live page in a real Chromium: finished runs, small and large, in light and dark, by keyboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.watch.app import build
from runtime.events import RunFinished, WorkerLost
from runtime.run_folder import RunFolder
from tests.support.browser import chromium, listening, needs_chromium, page
from tests.support.made_run import JOINED_AT, LOST_AT, make_run

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(build(make_run(tmp_path_factory.mktemp("small")))) as url:
        yield url


@pytest.fixture(scope="module")
def opened(browser: Any, small: str) -> Iterator[Any]:
    """A page that several tests use one after the other: loading it takes longer than they do."""
    with page(browser, small) as shown:
        is_whole(shown)
        yield shown


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_run(tmp_path_factory.mktemp("large"), 256, 4, 512, steps=JOINED_AT + 2)
    with listening(build(folder)) as url:
        yield url


def is_whole(shown: Any) -> None:
    """Waits until everything is there."""
    shown.locator("#state:not(:has-text('loading'))").wait_for()
    for chart in ("loss-chart", "speed-chart", "goodput-chart"):
        shown.locator(f"#{chart} .main-svg").first.wait_for()
    shown.locator("#plans .plan").first.wait_for()


def colours(shown: Any) -> set[str]:
    """Of what the canvas shows, one point in eight."""
    found: list[str] = shown.evaluate(
        """() => {
          const canvas = document.getElementById("lanes"), pen = canvas.getContext("2d"), seen = new Set();
          const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
          for (let i = 0; i < data.length; i += 32) seen.add(data.slice(i, i + 4).join());
          return [...seen];
        }"""
    )
    return set(found)


def paint(shown: Any, name: str) -> str:
    """A colour of the style sheet in the present theme, as ``colours`` has it."""
    text: str = shown.evaluate(
        """name => {
          const probe = document.createElement("i");
          document.body.append(probe);
          probe.style.color = `var(--${name})`;
          const found = getComputedStyle(probe).color;
          probe.remove();
          return found;
        }""",
        name,
    )
    return ",".join([*text.removeprefix("rgb(").removesuffix(")").replace(" ", "").split(","), "255"])


def is_finished(shown: Any) -> None:
    is_whole(shown)
    assert shown.locator("#state").inner_text() == "completed"
    assert shown.locator("#step").inner_text() == "60 / 60"
    assert shown.locator("#grid [role=gridcell]").count() == 6
    label = shown.locator("[data-worker='4']").get_attribute("aria-label")
    assert label == "worker 4, stage 0, layers 0\u20132, micro-batches 2, 5, 8, 11"
    assert {paint(shown, kind) for kind in ("forward", "backward", "wait", "reduce")} <= colours(shown)
    assert paint(shown, "recovery") not in colours(shown), "the last steps were undisturbed"
    shown.locator("#moment").select_option(str(LOST_AT))
    assert paint(shown, "recovery") in colours(shown)
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


def test_a_finished_run_on_a_narrow_screen(browser: Any, small: str) -> None:
    with page(browser, small, "light", 390) as shown:
        is_finished(shown)


def test_a_finished_run_in_the_systems_theme_until_somebody_chooses(browser: Any, small: str) -> None:
    def ground(shown: Any) -> str:
        found: str = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        return found

    with page(browser, small, "dark") as shown:
        is_finished(shown)
        dark, drawn = ground(shown), paint(shown, "forward")
        shown.locator("#theme").select_option("light")
        light = ground(shown)
        assert light != dark
        assert drawn != paint(shown, "forward") and paint(shown, "forward") in colours(shown)
        shown.reload()
        is_whole(shown)
        assert ground(shown) == light, "the choice is kept"
        shown.locator("#theme").select_option("auto")
        assert ground(shown) == dark


def test_another_run_at_the_same_address_is_shown(browser: Any, tmp_path: Path) -> None:
    served = [build(make_run(tmp_path / "first"))]

    async def newest(scope: Any, receive: Any, send: Any) -> None:
        await served[-1](scope, receive, send)

    with listening(newest) as url, page(browser, url) as shown:
        is_whole(shown)
        assert shown.locator("#step").inner_text() == "60 / 60"
        assert shown.locator("#name").inner_text() == "made"
        served.append(build(make_run(tmp_path / "second", 4, name="other")))
        shown.locator("#name:has-text('other')").wait_for()
        is_whole(shown)
        assert shown.locator("#grid [role=gridcell]").count() == 4
        shown.locator("#events [role=option]", has_text="worker 3 lost (").first.click()
        assert "3 workers" in shown.locator("#plans").inner_text()


def test_the_grid_by_keyboard(opened: Any) -> None:
    shown = opened

    def chosen() -> str:
        found: str = shown.locator("#grid [aria-selected=true]").inner_text().split()[0]
        focused = shown.evaluate("document.activeElement.dataset.worker")
        assert focused == found, "the focus goes along, and one cell alone can be reached by Tab"
        assert shown.locator("#grid [tabindex='0']").count() == 1
        return found

    shown.locator("[data-worker='0']").click()
    shown.locator("#theme").focus()
    shown.keyboard.press("Tab")
    assert chosen() == "0"
    assert shown.locator("[data-worker='0']").evaluate(
        "cell => getComputedStyle(cell).outlineStyle !== 'none'"
    ), "the focus is seen"
    walked = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End", "Home", "ArrowUp"):
        shown.keyboard.press(key)
        walked.append(chosen())
    assert walked == ["2", "3", "1", "6", "1", "0"]
    shown.keyboard.press("End")
    assert "Worker 4" in shown.locator("#worker").inner_text()
    assert "backed up by\n0" in shown.locator("#worker").inner_text()


def test_the_timeline_by_keyboard(opened: Any) -> None:
    shown = opened
    shown.locator("[data-worker='0']").click()
    shown.locator("#lanes").focus()

    def said() -> str:
        text: str = shown.locator("#span").inner_text()
        return text.rpartition(", ")[0]  # without the time of day

    shown.keyboard.press("Home")
    first = said()
    assert first == "worker 0, step 29: forward of micro-batch 0, 4.0 ms"
    shown.keyboard.press("ArrowRight")
    assert said() == "worker 0, step 29: forward of micro-batch 3, 4.0 ms"
    shown.keyboard.press("ArrowLeft")
    assert said() == first
    shown.keyboard.press("ArrowDown")
    assert said().startswith("worker 2"), "the next row of the stage"
    assert shown.locator("#grid [aria-selected=true]").inner_text().split()[0] == "2"
    shown.keyboard.press("End")
    assert "gather" in said() and "step 60" in said()
    whole = len(colours(shown))
    for _ in range(8):
        shown.keyboard.press("+")
    assert len(colours(shown)) < whole, "so near that little is seen"
    shown.keyboard.press("f")
    assert paint(shown, "forward") in colours(shown)


def test_events_and_their_plans_by_keyboard(opened: Any) -> None:
    shown = opened
    rows = shown.locator("#events [role=option]")
    assert rows.count() == 5, "checkpoints are left out"
    assert "worker 6 joined" in shown.locator("#events [aria-selected=true]").inner_text()
    assert shown.locator("#plans .chip.new").inner_text().split()[0] == "6"
    shown.locator("#events [tabindex='0']").focus()
    shown.keyboard.press("ArrowUp")
    assert "recovered in" in shown.locator("#events [aria-selected=true]").inner_text()
    shown.locator("#plans .chip.gone").wait_for()
    assert shown.locator("#plans .chip.gone").inner_text().split()[0] == "5"
    assert shown.locator("#moment").input_value() == str(LOST_AT), "the timeline goes along"
    shown.locator("#quiet").check()
    assert rows.count() == 6 and shown.get_by_text("checkpoint written").count() == 1


def test_256_workers(browser: Any, large: str) -> None:
    with page(browser, large, "dark") as shown:
        is_whole(shown)
        assert shown.locator("#grid [role=gridcell]").count() == 256
        assert shown.locator("#lanes").bounding_box()["height"] < 1100
        for name in ("forward", "backward", "wait"):
            assert paint(shown, name) in colours(shown)
        shown.locator("[data-worker='130']").click()
        assert "Worker 130" in shown.locator("#worker").inner_text()
        shown.keyboard.press("ArrowDown")
        assert shown.evaluate("document.activeElement.dataset.worker") not in ("130", None)
        assert shown.locator("#plans .chip").count() <= 4 * 2 * 32, "large plans are shown in short"
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_run_as_it_begins_goes_on_and_cannot_be_asked_for_a_while(browser: Any, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "young", "", {})
    with listening(build(folder)) as url, page(browser, url, but="status of 503") as shown:
        shown.get_by_text("No plan yet: workers are being started.").wait_for()
        assert shown.locator("#state").inner_text() == "starting"
        assert shown.locator(".chart .empty").count() == 3
        assert shown.get_by_text("Nothing has happened yet.").is_visible()
        made = make_run(tmp_path, steps=12, finished=False)
        for path in made.path.iterdir():
            (folder.path / path.name).write_bytes(path.read_bytes())
        is_whole(shown)
        assert shown.locator("#step").inner_text() == "12 / 60"
        refuse = "**/api/run"
        shown.route(refuse, lambda route: route.fulfill(status=503))
        shown.get_by_role("alert").get_by_text("No contact with reknit dashboard").wait_for()
        assert shown.locator("#step").inner_text() == "12 / 60", "what was known is still there"
        shown.unroute(refuse)
        shown.locator("#problem").wait_for(state="hidden")
        folder.log_event(RunFinished("interrupted", 12, 6, 3.0, 0.5, "stopped by hand"), time.time())
        shown.locator("#state:has-text('interrupted')").wait_for()
        assert shown.locator("#detail").inner_text() == "stopped by hand"
        folder.close()


def test_what_a_run_says_is_text(browser: Any, tmp_path: Path) -> None:
    nasty = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    folder = make_run(tmp_path, steps=3, finished=False, name="run <b>bold")
    folder.log_event(WorkerLost(3, 5, nasty), time.time())
    folder.log_event(RunFinished("failed", 3, 6, 1.0, 0.5, nasty), time.time())
    folder.close()
    with listening(build(folder)) as url, page(browser, url) as shown:
        is_whole(shown)
        assert shown.locator("#name").inner_text() == "run <b>bold"
        assert shown.locator("#detail").inner_text() == nasty
        assert shown.locator("#events").get_by_text(nasty).count() == 2
        assert shown.locator("#events b, #events img, h1 b").count() == 0
        assert shown.title() == "run <b>bold: failed"
