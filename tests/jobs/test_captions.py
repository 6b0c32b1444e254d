"""What a run's checkpoint says of held-out images: captions, losses, the page, lines while it trains."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.assembly import assemble
from jobs.builders import build_layers
from jobs.captions import show
from jobs.captions.losses import Spoken, losses
from jobs.captions.page import held_out_items, render, write_page
from jobs.captions.trained import Trained, captions, checkpoints, held_out_loss, load
from jobs.data.curated import open_set
from jobs.data.media import decode_pixels, decode_samples
from jobs.data.tokenizer import CaptionTokenizer
from jobs.recipe.recipe import Recipe
from jobs.showing import Showing
from runtime.events import CheckpointWritten, WorkerLost
from runtime.run_folder import RunFolder
from tests.support.captions import LANGUAGES, SIZE, Row, coloured_row, write_set
from tests.support.chaos import ChaosRun
from tests.support.ray_jobs import toy_recipe
from tests.support.served import damage

COLOURS = {"rouge": (220, 30, 30), "vert": (30, 200, 30), "bleu": (30, 30, 220), "noir": (5, 5, 5)}


def told_by_colour(number: int, tokenizer: CaptionTokenizer) -> Row:
    """The caption says what the image shows, in every language the same word, and a language's own mark."""
    item, language = number // 3, LANGUAGES[number % 3]
    name = list(COLOURS)[item % 4]
    about = {"category": "colours", "language": language, "caption": f"<{language}> {name}"}
    return coloured_row(item, tokenizer, **about, colour=COLOURS[name], noise=20)


def recipe_of(source: Path, images: bool, steps: int = 120) -> Recipe:
    return toy_recipe(
        "colours",
        steps,
        2,
        2,
        model={
            "build": "jobs.models.captioner:build",
            "arguments": {
                "image_size": SIZE,
                "patch": 8,
                "width": 32,
                "depth_image": 1,
                "depth_text": 1,
                "heads": 2,
                "vocabulary": open_set(source).tokenizer.vocabulary,
                "context": 60,
                "dropout": 0.0,
                "audio": True,
                "audio_rate": 8000,
                "audio_seconds": 0.16,
                "mels": 4,
            },
        },
        data={
            "build": "jobs.data.multimodal:build",
            "arguments": {
                "source": str(source),
                "context": 60,
                "slots": 4,
                "images": images,
                "audio": True,
                "audio_seconds": 0.16,
            },
            "show": "jobs.captions.show:lines",
        },
        parallel={"workers": 2, "stages": 2, "micro_batches": 2, "micro_batch_size": 2},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 5, "clip_norm": 1.0},
        checkpoint={"every": 60, "keep": 2},
    )


def trained_run(folder: Path, source: Path, images: bool) -> Path:
    recipe = recipe_of(source, images)
    run = RunFolder.create(folder, recipe.to_toml(), {"device": "cpu"})
    job = assemble(recipe, str(run.checkpoints))
    result = ChaosRun(job, folder, 2, 2).run()
    assert result.outcome == "completed", result.message
    run.recipe.write_text(recipe.to_toml())  # the cluster of threads knows jobs only
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"train": (48, 48), "held_out": (36,)}
    return write_set(tmp_path_factory.mktemp("colours"), counts, told_by_colour)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("runs") / "seeing", source, images=True)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("runs") / "blind", source, images=False)


def test_the_checkpoint_is_the_model(run: Path) -> None:
    """Loaded, it has the held-out loss that any other way of computing it gives."""
    trained = load(run)
    assert trained.version == 120 and trained.languages == LANGUAGES
    loss, tokens = held_out_loss(trained)
    table = trained.curated.table("held_out").to_pylist()
    assert tokens == sum(len(row["tokens"]) + 1 for row in table), "every sample of the split once"
    total = 0.0
    data = trained.data
    with torch.no_grad():
        assert data.held_out_order is not None
        for number in range(data.held_out_order.rows_of(0)):
            value: Any
            value, targets_BT = data.held_out(number)
            for layer in trained.layers:
                value = layer(value)
            total += float(torch.nn.functional.cross_entropy(value[0], targets_BT[0], reduction="sum"))
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_it_says_what_it_sees_in_the_language_asked_for(run: Path) -> None:
    items = held_out_items(load(run))
    assert len(items) == 12 and {said.language for said in items[0].said} == set(LANGUAGES)
    said = [each for shown in items for each in shown.said]
    assert all(each.true is not None and each.written.startswith(f"<{each.language}>") for each in said)
    right = sum(each.written == each.true for each in said)
    assert right >= 0.9 * len(said), [(each.written, each.true) for each in said]


def test_a_caption_ends_at_the_limit(run: Path) -> None:
    trained = load(run)
    images = [decode_pixels(shown.image) for shown in held_out_items(trained, 2)]
    whole = captions(trained, images, "en")
    short = captions(trained, images, "en", most=3)
    assert short == ["<en", "<en"] and all(text.startswith("<en> ") for text in whole)
    with pytest.raises(ValueError, match="tlh"):
        captions(trained, images, "tlh")


def test_seeing_is_worth_something_and_wrong_images_mislead(run: Path, blind: Path) -> None:
    found = losses(load(run), blind)
    assert found.blind is not None
    assert found.smoothed <= found.prior, "Witten and Bell's own strength is among those tried"
    assert found.seeing < 0.5 * min(found.blind, found.smoothed), found
    assert found.exchanged > found.blind, "what it says of another item's image is wrong"
    with pytest.raises(ValueError, match="images=false"):
        losses(load(run), run)


def test_the_baseline_counts_at_its_best(run: Path, blind: Path) -> None:
    of_version = {version: held_out_loss(load(blind, version))[0] for version in checkpoints(blind)}
    assert len(of_version) > 1
    found = losses(load(run), blind)
    assert found.blind == min(of_version.values()) == of_version[found.blind_version or 0]


def alone(trained: Trained, place: int, clip: bytes | None) -> tuple[float, int]:
    """(sum of losses, tokens) of one held-out sample by itself in a row, which hears ``clip``."""
    row = trained.curated.table("held_out").to_pylist()[place]
    samples = np.zeros(1280, dtype=np.int16)
    if clip is not None:
        given = decode_samples(clip)[:1280]
        samples[: len(given)] = given
    image = np.zeros((SIZE, SIZE, 3), np.uint8) if row["image"] is None else decode_pixels(row["image"])
    tokenizer = trained.curated.tokenizer
    tokens = [tokenizer.language(row["language"]), *row["tokens"]]
    value: Any = {
        "image": torch.from_numpy(image.copy())[None, None],
        "has_image": torch.tensor([[row["image"] is not None]]),
        "audio": torch.from_numpy(samples)[None, None],
        "has_audio": torch.tensor([[clip is not None]]),
        "tokens": torch.tensor([tokens]),
        "segment": torch.zeros(1, len(tokens), dtype=torch.int64),
        "position": torch.arange(len(tokens))[None],
    }
    for layer in trained.layers:
        value = layer(value)
    loss, count = trained.loss(value, torch.tensor([[*row["tokens"], tokenizer.end]]))
    return float(loss), int(count)


def test_what_a_clip_is_worth(tmp_path: Path) -> None:
    """Over the samples that have one, and no others; the rest of the row hears nothing of it."""
    source = write_set(tmp_path / "drawn")
    recipe = recipe_of(source, images=True)
    torch.manual_seed(3)
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    for layer in layers:
        layer.eval()
    trained = Trained(recipe, "", 0, layers, loss, open_set(source))
    clips = [row["audio"] for row in trained.curated.table("held_out", ["audio"]).to_pylist()]
    there = [(place, clip) for place, clip in enumerate(clips) if clip is not None]
    assert 0 < len(there) < len(clips)
    with torch.no_grad():
        heard = [alone(trained, place, clip) for place, clip in there]
        muted = [alone(trained, place, None) for place, _ in there]
    tokens = sum(count for _, count in heard)
    found = losses(trained, None).spoken
    assert found is not None and found.tokens == tokens
    assert found.heard == pytest.approx(sum(each for each, _ in heard) / tokens, rel=1e-5)
    assert found.muted == pytest.approx(sum(each for each, _ in muted) / tokens, rel=1e-5)
    assert abs(found.heard - found.muted) > 1e-4


def test_the_page_shows_every_item_and_both_numbers(run: Path, blind: Path) -> None:
    output = io.StringIO()
    page = write_page(run, blind, Console(file=output, width=300))
    text = page.read_text()
    assert page == run / "captions.html" and text.count("<figure") == 12
    assert text.count("data:image/png;base64,") == 12 and "&lt;fr&gt; " in text
    found = losses(load(run), blind)
    for value in (found.seeing, found.exchanged, found.prior, found.smoothed, found.blind):
        assert f"{value:.3f}" in text and f"{value:.4f}" in output.getvalue()
    assert found.spoken is None and "clip" not in text, "no held-out sample has one"
    spoken = render(load(run), replace(found, spoken=Spoken(9, 1.125, 1.25)), [])
    assert "1.125" in spoken and "1.250" in spoken
    without = render(load(run), losses(load(run), None), [])
    assert "trained without images" in text and "trained without images" not in without


def test_a_set_that_holds_nothing_out(tmp_path: Path) -> None:
    """Nothing can be said of such a set, but it can be trained on, unless held-out losses are asked for."""
    source = write_set(tmp_path / "colours", {"train": (12,), "held_out": ()}, told_by_colour)
    recipe = recipe_of(source, images=True)
    assemble(recipe, str(tmp_path))
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    trained = Trained(recipe, "", 0, layers, loss, open_set(source))
    assert held_out_loss(trained) == (0.0, 0) and held_out_items(trained) == []
    evaluated = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out_every": 5})})
    with pytest.raises(ValueError, match=r"data\.held_out_every \(5\).*nothing is held out"):
        assemble(evaluated, str(tmp_path))


def test_runs_that_write_no_captions(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of step 7"):
        load(run, 7)
    text = toy_recipe("plain", 1, 1, 1, data={"build": "tests.support.toys:build_tokens"})
    folder = RunFolder.create(tmp_path / "plain", text.to_toml(), {})
    with pytest.raises(ValueError, match="no checkpoint"):
        load(folder.path)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, run: Path) -> None:
    copied = copytree(run, tmp_path / "run")
    old, new = checkpoints(copied)
    damage(copied, new)
    trained = load(copied)
    assert trained.version == old
    assert all(
        torch.equal(a, b)
        for mine, its in zip(trained.layers, load(run, old).layers, strict=True)
        for a, b in zip(mine.parameters(), its.parameters(), strict=True)
    )
    output = io.StringIO()
    write_page(copied, None, Console(file=output, width=300))
    assert "step-00000120" in output.getvalue() and "loss of step 60" in output.getvalue()
    damage(copied, old)
    with pytest.raises(ValueError, match=r"has no whole checkpoint: .*step-00000060"):
        load(copied)


def test_lines_of_a_checkpoint(run: Path) -> None:
    lines = show.lines(run, 120)
    assert len(lines) == show.ITEMS and all(line.startswith("step 120  item") for line in lines)
    assert "(really: <de> " in lines[0]


def written(version: int) -> CheckpointWritten:
    return CheckpointWritten(version, 1, 0.1)


def test_showing_holds_nobody_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    go = threading.Event()

    def scripted(run: Path, version: int) -> list[str]:
        calls.append(version)
        go.wait(30)
        if version == 4:
            raise OSError("the checkpoint is gone")
        return [f"shown {version}"]

    recipe = recipe_of(source, True)
    monkeypatch.setattr(show, "lines", scripted)
    showing = Showing(recipe, tmp_path)
    assert showing.look([written(1), WorkerLost(1, 1, "x")]) == []
    assert showing.look([written(2)]) == [] and showing.look([written(3)]) == []
    go.set()
    assert showing.look([written(4)], last=True) == [
        "shown 1",
        "data.show failed: the checkpoint is gone",
    ], "the newest one at the end, those between are left out"
    assert calls == [1, 4]
    silent = Showing(
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"show": None})}), tmp_path
    )
    assert silent.look([written(1)], last=True) == []


def test_a_process_that_is_to_end_does_not_wait_for_what_is_shown(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_of(source, True).to_toml())
    code = f"""
import threading
from pathlib import Path
from jobs.captions import show
from jobs.recipe.recipe import load_recipe
from jobs.showing import Showing
from runtime.events import CheckpointWritten

began = threading.Event()

def endless(run, version):
    began.set()
    threading.Event().wait()

show.lines = endless
Showing(load_recipe({str(recipe)!r}), Path({str(tmp_path)!r})).look([CheckpointWritten(1, 1, 0.1)])
began.wait()
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3
