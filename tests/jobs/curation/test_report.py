"""The report page in a real browser: it shows what was kept and what was dropped, in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.curation.decide import decide
from jobs.curation.examine import examine_table
from jobs.curation.items import EXAMINED, item_table
from jobs.curation.manifest import build_manifest, count_drops
from jobs.curation.recipe import load_curation
from jobs.curation.report import report_page
from jobs.curation.sources import list_units, read_unit
from jobs.curation.work import Work
from jobs.data.curated import DataFile, Manifest
from jobs.data.tokenizer import CaptionTokenizer
from runtime.storage import Store
from tests.support.raw import DROPPED, GOOD, raw_folder, raw_recipe

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A page made in this process: a category bears a name that would be markup if it were not escaped."""
    folder = tmp_path_factory.mktemp("report")
    raw = raw_folder(folder / "raw")
    (raw / "a" / "03.txt").write_text("<b>bold</b> & <script>document.title = 'taken'</script>")
    recipe = load_curation(raw_recipe(folder / "raw.toml", raw, folder / "set"))
    work = Work(Store.open(folder / "set"), "key")
    units = list_units(recipe)
    tables = [
        examine_table(item_table(unit.key, number, True, item), recipe)
        for unit in units
        for number, item in enumerate(read_unit(unit, recipe))
    ]
    work.keep(pa.concat_tables(tables))
    assert tables[0].schema == EXAMINED
    decision = decide(work.seen(unit.key for unit in units), recipe)
    files = {
        split: (DataFile(name=f"{split}.parquet", rows=len(rows), bytes=0, sha256=""),)
        for split, rows in decision.splits.items()
    }
    manifest = build_manifest(decision, recipe, CaptionTokenizer(["en", "fr"]), files)
    assert manifest.drops == count_drops(decision.dropped)
    page = report_page(decision, manifest, recipe, work)
    assert page == report_page(decision, manifest, recipe, work)
    path = folder / "report.html"
    path.write_bytes(page)
    return path, manifest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("there is no browser: install the Debian package chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_shows_counts_filters_and_pictures(
    report: tuple[Path, Manifest], browser: Any, scheme: str
) -> None:
    path, manifest = report
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url[:5] == "http:" else None)
    try:
        page.goto(path.as_uri())
        assert page.title() == "raw: a curated set" and not problems
        text = page.inner_text("main")
        assert f"{manifest.read}\nrows read" in text and f"{2 * GOOD}\nkept, of {GOOD} items" in text
        for filter_name in set(DROPPED.values()):
            section = page.locator(f"#{filter_name}-rows")
            count = sum(drop.count for drop in manifest.drops if drop.filter == filter_name)
            assert f"{count} of " in section.inner_text()
            assert section.locator(".gone figure").count() == count
            assert section.locator("figure").count() > count
        assert page.locator("#duplicate_image-rows img.like").count() == 2
        assert page.locator("#silence-clips .gone figure").count() == 1
        assert page.locator("audio").count() > 0 and page.locator("script").count() == 0
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 20, 27)"}[scheme]
    finally:
        page.close()


def test_page_fits_a_telephone(report: tuple[Path, Manifest], browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    try:
        page.goto(report[0].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.close()


def test_page_bears_nothing_but_the_set(report: tuple[Path, Manifest]) -> None:
    text = io.BytesIO(report[0].read_bytes()).read().decode()
    assert "http://" not in text and "https://" not in text
    assert "<script" not in text and "&lt;script&gt;" in text
