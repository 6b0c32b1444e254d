"""The component that a recipe becomes, as text; no kubectl is needed here."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.curation.recipe import CurationRecipe, load_curation
from jobs.manifests import curation_files, training_files
from jobs.pods import Machines
from jobs.recipe.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parent.parent.parent / "jobs" / "recipes"
MACHINES = Machines("registry.example.com/reknit:1")


def training(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "gpt-small.toml", overrides)


def curation(*overrides: str) -> CurationRecipe:
    return load_curation(RECIPES / "image-folder-curate.toml", overrides)


def patch_of(files: dict[str, str], kind: str) -> dict[str, Any]:
    return {each["path"]: each["value"] for each in yaml.safe_load(files[f"{kind.lower()}.yaml"])}


def test_the_same_in_the_same_out() -> None:
    assert training_files(training(), MACHINES) == training_files(training(), MACHINES)
    assert curation_files(curation(), MACHINES, (1, 4), 4) == curation_files(curation(), MACHINES, (1, 4), 4)


def test_the_recipe_reads_back_as_it_was() -> None:
    recipe = training("parallel.workers=5")
    assert Recipe.model_validate(tomllib.loads(training_files(recipe, MACHINES)["recipe.toml"])) == recipe
    to_curate = curation("set.image_size=32")
    text = curation_files(to_curate, MACHINES, (1, 1), 1)["recipe.toml"]
    assert CurationRecipe.model_validate(tomllib.loads(text)) == to_curate


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.b:5000/c/d:1.2", {"newName": "a.b:5000/c/d", "newTag": "1.2"}),
        ("d:1@sha256:" + "0" * 64, {"newName": "d", "digest": "sha256:" + "0" * 64}),
    ],
)
def test_the_image_is_the_one_asked_for(image: str, expected: dict[str, str]) -> None:
    (found,) = yaml.safe_load(training_files(training(), Machines(image))["kustomization.yaml"])["images"]
    assert found == {"name": "reknit", **expected}


def test_every_patch_is_listed_and_every_file_used() -> None:
    for files in (training_files(training(), MACHINES), curation_files(curation(), MACHINES, (1, 4), 4)):
        kustomization = yaml.safe_load(files["kustomization.yaml"])
        used = {each["path"] for each in kustomization["patches"]} | set(kustomization.get("resources", ()))
        used |= set(kustomization["configMapGenerator"][0]["files"]) | {"kustomization.yaml"}
        assert used == files.keys()


def test_the_job_and_the_service_use_one_run_folder() -> None:
    files = training_files(training("run.name=GPT_7b", "parallel.threads=2"), MACHINES)
    job, service = patch_of(files, "RayJob"), patch_of(files, "RayService")
    assert job["/metadata/name"] == service["/metadata/name"] == "gpt-7b"
    assert job["/spec/entrypoint"] == "bash /etc/reknit/train.sh /data/runs/gpt-7b"
    (application,) = yaml.safe_load(service["/spec/serveConfigV2"])["applications"]
    assert application["args"] == {"run": "/data/runs/gpt-7b", "least": 1, "most": 8, "threads": 2}


@pytest.mark.parametrize(
    ("override", "opened"),
    [
        ("checkpoint.folder=/data/checkpoints", False),
        ("checkpoint.folder=file:///data/checkpoints", False),
        ("checkpoint.folder=s3://bucket/run", True),
        ("data.arguments.source=gs://bucket/text", True),
        ('data.arguments.source=["/data/a", "/data/b"]', False),
        ('data.arguments.source=["/data/a", "s3://bucket/b"]', True),
        ('data.arguments.source={"mix"=[{"path"="/data/a", "weight"=2}]}', False),
        ('data.arguments.source={"mix"=[{"path"="gs://bucket/b", "weight"=2}]}', True),
    ],
)
def test_the_way_out_is_opened_for_uris_only(override: str, opened: bool) -> None:
    files = training_files(training(override), MACHINES)
    assert ("egress.yaml" in files) == opened
    assert ("resources" in yaml.safe_load(files["kustomization.yaml"])) == opened


def test_labels_of_machines_become_selectors_and_the_spot_toleration() -> None:
    label = ("cloud.google.com/gke-spot", "true")
    machines = Machines("reknit:1", spot_label=label, accelerator="amd.com/gpu")
    patch = patch_of(training_files(training(), machines), "RayCluster")
    assert patch["/spec/workerGroupSpecs/0/template/spec/nodeSelector"] == {"reknit.dev/capacity": "reserved"}
    assert patch["/spec/workerGroupSpecs/1/template/spec/nodeSelector"] == dict([label])
    resources = patch["/spec/workerGroupSpecs/1/template/spec/containers/0/resources"]
    assert resources["limits"] == {"cpu": "1", "memory": "7168Mi", "amd.com/gpu": "1"}
    operations = yaml.safe_load(training_files(training(), machines)["raycluster.yaml"])
    tolerated = [
        (each["path"].split("/")[3], each["value"]["key"])
        for each in operations
        if "/tolerations" in each["path"]
    ]
    assert tolerated == [("0", "amd.com/gpu"), ("1", label[0]), ("1", "amd.com/gpu")]


@pytest.mark.parametrize(
    ("pods", "cpus", "word"),
    [((0, 1), 1, "make no sense"), ((3, 2), 1, "from 3 to 2"), ((1, 1), 0, "cpus is 0")],
)
def test_pods_that_make_no_sense_are_refused(pods: tuple[int, int], cpus: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        curation_files(curation(), MACHINES, pods, cpus)
