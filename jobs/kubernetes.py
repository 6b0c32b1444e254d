"""``reknit k8s render``: a recipe's manifests as a folder that ``kubectl apply -k`` takes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from jobs.curation.recipe import load_curation
from jobs.dashboards.files import kubernetes_files
from jobs.manifests import NAMESPACE, curation_files, training_files
from jobs.pods import Machines, object_name
from jobs.recipe.recipe import load_recipe
from jobs.recipe.table import read_table
from jobs.terminal import plain_console
from jobs.yaml_text import to_yaml

SHIPPED = Path(__file__).parent.parent / "k8s"
"""The manifests that come with Reknit, beside its rooms in a checkout and in an installed package."""

WRITTEN = to_yaml({}).partition("\n")[0]
"""The first line of what is rendered."""

TRAINING: tuple[str, ...] = ("cluster", "train", "serve")
CURATION: tuple[str, ...] = ("curate",)
"""The overlays of each kind of recipe."""


def render(
    recipe: str | Path,
    machines: Machines,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    pods: tuple[int, int] | None = None,
    cpus: int | None = None,
    namespace: str = NAMESPACE,
    console: Console | None = None,
) -> tuple[Path, ...]:
    """Writes base, dashboards, overlays and the recipe's component to ``output``; returns the overlays.

    The default of ``output`` is ``deploy/<name>``; a folder that was rendered before is written over.

    ``pods`` (least, most) and ``cpus`` of each are for a recipe of a curated set, which names none. Raises
    ValueError for a mistake in the recipe or the arguments, and for a folder that holds other things.
    """
    if "set" in read_table(Path(recipe)):
        curation = load_curation(recipe, overrides)
        kind, overlays, name = "curate", CURATION, object_name(curation.set.name)
        files = curation_files(curation, machines, pods or (1, 4), 4 if cpus is None else cpus, namespace)
    else:
        training = load_recipe(recipe, overrides)
        if pods is not None or cpus is not None:
            raise ValueError(
                "--pods and --cpus are for recipes of a curated set: a training recipe says so in [parallel]"
            )
        kind, overlays, name = "train", TRAINING, object_name(training.run.name)
        files = training_files(training, machines, namespace)
    target = Path("deploy") / name if output is None else Path(output)
    written = {target / "settings" / kind: files, target / "dashboards": kubernetes_files()}
    if _holds_anything(target) and not any(map(_is_rendered, (target / "settings").glob("*"))):
        raise ValueError(f"{target} holds other things: choose another folder by --output")
    for folder in written:
        if _holds_anything(folder) and not _is_rendered(folder):
            raise ValueError(f"{folder} holds other things: choose another folder by --output")
    for folder, contents in written.items():
        _write(folder, contents)
    if target.resolve() != SHIPPED.resolve():
        for part in ("base", *(f"overlays/{overlay}" for overlay in overlays)):
            shutil.copytree(SHIPPED / part, target / part, dirs_exist_ok=True)
    folders = tuple(target / "overlays" / overlay for overlay in overlays)
    for folder in folders:
        (console or plain_console()).print(
            f"kubectl apply -k {folder}", highlight=False, markup=False, soft_wrap=True
        )
    return folders


def _holds_anything(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _is_rendered(folder: Path) -> bool:
    """Whether an earlier ``render`` has written it, and it may be written anew."""
    try:
        return (folder / "kustomization.yaml").read_text(encoding="utf-8").startswith(WRITTEN)
    except (OSError, UnicodeDecodeError):
        return False


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """The folder holds these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_text(content, encoding="utf-8")
