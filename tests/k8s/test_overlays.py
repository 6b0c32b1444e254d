"""Every overlay is built and held against KubeRay's schemas, Ray's own readers and kubectl."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from jobs.builders import load_builder
from jobs.kubernetes import render
from jobs.pods import Machines
from jobs.recipe.recipe import load_recipe
from tests.support.kubernetes_api import discovery
from tests.support.manifests import (
    CUSTOM,
    OVERLAYS,
    ROOT,
    SHIPPED,
    build,
    cluster_spec,
    needs_kubectl,
    only,
    part,
    pod_templates,
    schema,
)

pytestmark = needs_kubectl

EXPECTED = {"cluster": "RayCluster", "train": "RayJob", "curate": "RayJob", "serve": "RayService"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_holds_one_custom_resource_that_its_schema_accepts(overlay: str) -> None:
    (found,) = [each for each in build(SHIPPED / "overlays" / overlay) if each["kind"] in CUSTOM]
    assert found["kind"] == EXPECTED[overlay]
    jsonschema.Draft202012Validator(schema(found["kind"])).validate(found)


@pytest.mark.parametrize(
    "path", [(), ("headGroupSpec", "template", "spec"), ("gcsFaultToleranceOptions",), ("autoscalerOptions",)]
)
def test_the_schema_refuses_fields_that_it_does_not_know(path: tuple[str, ...]) -> None:
    found = only(build(SHIPPED / "overlays" / "cluster"), "RayCluster")
    node: Any = found["spec"]
    for name in path:
        node = node[name]
    node["terminationGracePeriod"] = 1
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        jsonschema.Draft202012Validator(schema("RayCluster")).validate(found)


def test_the_schema_refuses_a_wrong_type() -> None:
    found = only(build(SHIPPED / "overlays" / "cluster"), "RayCluster")
    found["spec"]["workerGroupSpecs"][0]["minReplicas"] = "two"
    with pytest.raises(jsonschema.ValidationError, match="two"):
        jsonschema.Draft202012Validator(schema("RayCluster")).validate(found)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_objects_fit_the_schemas_that_kuberay_has_of_them(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    rules = ("spec", "networkPolicy", "head")
    template = ("spec", "workerGroupSpecs", "[]", "template")
    claim = (*template, "spec", "volumes", "[]", "ephemeral", "volumeClaimTemplate", "spec")
    checked = [
        (part("RayCluster", *template), only(objects, "StatefulSet")["spec"]["template"]),
        (part("RayCluster", *claim), only(objects, "PersistentVolumeClaim")["spec"]),
        (part("RayCluster", *claim), only(objects, "StatefulSet")["spec"]["volumeClaimTemplates"][0]["spec"]),
        (
            part("RayCluster", "spec", "headGroupSpec", "headService", "spec"),
            only(objects, "Service")["spec"],
        ),
    ]
    for policy in (each["spec"] for each in objects if each["kind"] == "NetworkPolicy"):
        assert policy.keys() <= {"podSelector", "policyTypes", "ingress", "egress"}
        checked += [(part("RayCluster", *rules, "ingressRules", "[]"), r) for r in policy.get("ingress", ())]
        checked += [(part("RayCluster", *rules, "egressRules", "[]"), r) for r in policy.get("egress", ())]
    assert len(checked) > 10
    for known, value in checked:
        # an object's own metadata is not described there, except for its labels
        jsonschema.Draft202012Validator(_with_open_metadata(known)).validate(value)


def _with_open_metadata(known: dict[str, Any]) -> dict[str, Any]:
    if "metadata" not in known.get("properties", {}):
        return known
    return {**known, "properties": {**known["properties"], "metadata": {"type": "object"}}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_would_create_every_object(overlay: str, tmp_path: Path) -> None:
    folder = SHIPPED / "overlays" / overlay
    with discovery() as server:
        reach = f"--server={server} --kubeconfig=/dev/null --cache-dir={tmp_path}".split()
        create = ["kubectl", "create", "--dry-run=client", "--validate=false", "-k", str(folder), *reach]
        done = subprocess.run(create, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(build(folder))
    assert all(line.endswith(" created (dry run)") for line in lines)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_name_that_is_referred_to_is_there(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    names.add(("ConfigMap", "kube-root-ca.crt"))  # every namespace has it
    missing = []
    for maker, template in pod_templates(objects):
        spec = template["spec"]
        wanted = [("ServiceAccount", spec["serviceAccountName"])] if "serviceAccountName" in spec else []
        wanted += [("PriorityClass", spec["priorityClassName"])] if "priorityClassName" in spec else []
        claims = {
            c["metadata"]["name"] for e in objects for c in e.get("spec", {}).get("volumeClaimTemplates", ())
        }
        volumes = {volume["name"] for volume in spec.get("volumes", ())} | claims
        for volume in spec.get("volumes", ()):
            sources = [volume, *volume.get("projected", {}).get("sources", ())]
            wanted += [
                ("ConfigMap", source["configMap"]["name"]) for source in sources if "configMap" in source
            ]
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for container in spec["containers"]:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    missing.append((maker, mount["name"]))
        missing += [(maker, each) for each in wanted if each not in names]
    assert missing == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_in_the_namespace(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    assert only(objects, "Namespace")["metadata"]["name"] == "reknit"
    for each in objects:
        inside = each["kind"] not in ("Namespace", "PriorityClass")
        assert each["metadata"].get("namespace") == ("reknit" if inside else None), each["kind"]
    (subject,) = only(objects, "RoleBinding")["subjects"]
    assert subject["namespace"] == "reknit"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_reads_the_recipes_numbers_from_the_cluster(overlay: str) -> None:
    spec = cluster_spec(build(SHIPPED / "overlays" / overlay))
    meta = {"name": "reknit", "namespace": "n", "uid": "u", "resourceVersion": "1"}
    config = _derive_autoscaling_config_from_ray_cr({"metadata": meta, "spec": spec})
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    reserved, spot = types["reserved"], types["spot"]
    assert reserved["priority"] > spot["priority"]
    assert reserved["labels"]["ray.io/market-type"] == "on-demand"
    assert spot["labels"]["ray.io/market-type"] == "spot"
    if overlay == "curate":
        assert [reserved[k] for k in ("min_workers", "max_workers")] == [1, 1]
        assert [spot[k] for k in ("min_workers", "max_workers")] == [0, 3]
        assert spot["resources"] == {"CPU": 4, "memory": 7 << 30}
        return
    parallel = load_recipe(ROOT / "jobs" / "recipes" / "gpt-small.toml").parallel
    assert reserved["min_workers"] == reserved["max_workers"] == parallel.min_workers
    assert spot["max_workers"] == parallel.workers - parallel.min_workers
    assert spot["resources"] == {"CPU": 1, "GPU": 1, "memory": 7 << 30}


def test_a_rendered_folder_is_built_and_read_as_the_shipped_one(tmp_path: Path) -> None:
    machines = Machines("registry.example.com:5000/team/reknit:7", workers_per_pod=2, reserved=1)
    overrides = [
        "parallel.workers=6",
        "parallel.max_workers=10",
        "parallel.gpus_per_worker=0.5",
        "parallel.resources={fast_disk = 0.5}",
        "data.feed_workers=4",
        "checkpoint.folder=s3://bucket/gpt",
    ]
    recipe = ROOT / "jobs" / "recipes" / "gpt-small.toml"
    folders = render(recipe, machines, overrides, output=tmp_path / "out", namespace="team")
    assert [folder.name for folder in folders] == ["cluster", "train", "serve"]
    for folder in folders:
        objects = build(folder)
        (found,) = [each for each in objects if each["kind"] in CUSTOM]
        assert {found["metadata"]["namespace"], only(objects, "Namespace")["metadata"]["name"]} == {"team"}
        jsonschema.Draft202012Validator(schema(found["kind"])).validate(found)
        images = {
            c["image"] for _, t in pod_templates(objects) for c in t["spec"]["containers"] if "image" in c
        }
        assert images == {machines.image, "redis:7.2.5"}
        assert only(objects, "NetworkPolicy", "reknit-storage")["spec"]["egress"] == [
            {"ports": [{"port": 443}]}
        ]
        meta = {"name": "reknit", "namespace": "n", "uid": "u", "resourceVersion": "1"}
        config = _derive_autoscaling_config_from_ray_cr({"metadata": meta, "spec": cluster_spec(objects)})
        types = config["available_node_types"]
        assert [types["reserved"][k] for k in ("min_workers", "max_workers")] == [1, 1]
        assert [types["spot"][k] for k in ("min_workers", "max_workers")] == [0, 4]
        # two workers, and two of the four feed workers on each of the three pods at the start
        assert types["spot"]["resources"] == {"CPU": 4, "GPU": 1, "memory": 11 << 30, "fast_disk": 1}
        toml = only(objects, "ConfigMap", "reknit-recipe")["data"]["recipe.toml"]
        assert tomllib.loads(toml)["parallel"]["max_workers"] == 10


def test_the_service_names_an_application_that_there_is() -> None:
    service = only(build(SHIPPED / "overlays" / "serve"), "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path is not None
    assert callable(load_builder(application.import_path))
    assert config.http_options.port == 8000


def test_the_versions_are_those_that_reknit_is_tested_with() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for overlay in OVERLAYS:
        assert cluster_spec(build(SHIPPED / "overlays" / overlay))["rayVersion"] == pins["ray"]
