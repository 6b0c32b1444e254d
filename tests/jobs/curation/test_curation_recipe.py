"""A curation's recipe: mistakes are refused in one sentence with file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.curation.recipe import load_curation
from jobs.recipe.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
GOOD = '[set]\nname = "toy"\nfolder = "toy"\n[source]\nkind = "image_folder"\npath = "raw"\n'


@pytest.mark.parametrize("name", ["tuxpaint-curate.toml", "image-folder-curate.toml"])
def test_ready_recipes_are_right(name: str) -> None:
    recipe = load_curation(RECIPES / name)
    assert recipe.set.folder.startswith("sets/")


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(GOOD)
    assert load_curation(path).set.image_size == 64
    changed = load_curation(path, ["set.image_size=32", 'caption.languages=["en"]', "balance.languages.en=5"])
    assert changed.set.image_size == 32 and changed.caption.languages == ("en",)
    assert changed.balance.languages == {"en": 5}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("[imagee]\n", "toy.toml: imagee is not a known key; did you mean image?"),
        (
            "[image]\nsharpnes = 1\n",
            "toy.toml: image.sharpnes is not a known key; did you mean image.sharpness?",
        ),
        ("[image]\naspect = 0.5\n", "toy.toml: image.aspect must be at least 1, not 0.5."),
        ('[tokens]\nkind = "words"\n', 'toy.toml: tokens.kind must be one of "bytes", "bpe", not "words".'),
        ("[split]\nheld_out = 1.0\n", "toy.toml: split.held_out must be below 1, not 1.0."),
        ("[balance.languages]\nen = -1\n", "toy.toml: balance.languages en must be at least 0."),
        (
            "[caption]\nshortest = 9\nlongest = 5\n",
            "toy.toml: caption.shortest (9) is above caption.longest (5): lower shortest or raise longest.",
        ),
        (
            "[clip]\nkeep = false\nrequired = true\n",
            "toy.toml: clip.required needs clips: set clip.keep to true, or remove clip.required.",
        ),
        (
            "[duplicates]\nimage_distance = 9\n",
            "toy.toml: duplicates.related_distance (8) is below duplicates.image_distance (9): raise it, or "
            "lower the other.",
        ),
        (
            "[clip]\nshortest_seconds = 20.0\n",
            "toy.toml: clip.shortest_seconds (20.0) is above clip.longest_seconds (10.0): lower "
            "shortest_seconds or raise longest_seconds.",
        ),
    ],
)
def test_mistakes_are_told(more: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(GOOD + more)
    with pytest.raises(RecipeError) as caught:
        load_curation(path)
    assert str(caught.value) == says


def test_source_without_a_path(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(GOOD.replace('path = "raw"\n', ""))
    with pytest.raises(RecipeError, match=r'source\.path is missing: say where the "image_folder" lies'):
        load_curation(path)
    assert load_curation(path, ["source.kind=tuxpaint"]).source.path is None
    with pytest.raises(RecipeError, match=r"--set|toy.toml: source\.captions has no meaning"):
        load_curation(path, ["source.kind=tuxpaint", "source.captions=a.csv"])
