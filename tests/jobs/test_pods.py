"""How many pods a recipe needs, and how large."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.pods import (
    LONGEST_NAME,
    Machines,
    Pod,
    Replicas,
    object_name,
    shared_out,
    training_pod,
    training_replicas,
)
from jobs.recipe.recipe import Recipe

IMAGE = "registry.example.com/reknit:1"


def recipe(**sections: Any) -> Recipe:
    parallel = {"workers": 4, "micro_batches": 4, "micro_batch_size": 1, **sections.pop("parallel", {})}
    return Recipe.model_validate(
        {
            "run": {"name": "r", "steps": 10},
            "model": {},
            "optimizer": {"learning_rate": 0.1},
            "parallel": parallel,
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("parallel", "machines", "expected"),
    [
        ({}, {}, (Replicas(1, 1, 1), Replicas(0, 3, 3))),
        ({"min_workers": 2}, {}, (Replicas(2, 2, 2), Replicas(0, 2, 2))),
        ({"min_workers": 2, "max_workers": 9, "spares": 1}, {}, (Replicas(2, 2, 2), Replicas(0, 2, 8))),
        ({"min_workers": 2}, {"reserved": 0}, (Replicas(0, 0, 0), Replicas(2, 4, 4))),
        ({"min_workers": 2}, {"reserved": 1}, (Replicas(1, 1, 1), Replicas(1, 3, 3))),
        ({"min_workers": 2}, {"reserved": 4}, (Replicas(4, 4, 4), Replicas(0, 0, 0))),
        (
            {"min_workers": 3, "max_workers": 9},
            {"workers_per_pod": 2},
            (Replicas(2, 2, 2), Replicas(0, 0, 3)),
        ),
    ],
)
def test_replicas(
    parallel: dict[str, Any], machines: dict[str, Any], expected: tuple[Replicas, Replicas]
) -> None:
    assert training_replicas(recipe(parallel=parallel), Machines(IMAGE, **machines)) == expected


@given(counts=st.lists(st.integers(1, 200), min_size=3, max_size=3), reserved=st.integers(0, 200))
def test_both_groups_together_are_what_was_asked_for(counts: list[int], reserved: int) -> None:
    least, start, most = sorted(counts)
    if reserved > most:
        with pytest.raises(ValueError, match=f"no use for more than {most} pods"):
            shared_out(least, start, most, reserved)
        return
    stay, come = shared_out(least, start, most, reserved)
    assert stay.least == stay.start == stay.most == reserved
    assert 0 <= come.least <= come.start <= come.most
    assert stay.most + come.most == most
    assert stay.least + come.least == max(least, reserved)
    assert stay.start + come.start == max(start, reserved)


@pytest.mark.parametrize(
    ("sections", "machines", "expected"),
    [
        ({}, {}, Pod(1, 7.0)),
        ({"parallel": {"cpus_per_worker": 0.0}}, {}, Pod(1, 7.0)),
        ({"parallel": {"cpus_per_worker": 2.5}}, {"workers_per_pod": 2}, Pod(5, 11.0)),
        ({"parallel": {"gpus_per_worker": 1.0}}, {"workers_per_pod": 4, "memory_gib": 16}, Pod(4, 67.0, 4)),
        ({"parallel": {"gpus_per_worker": 0.25}}, {"workers_per_pod": 2}, Pod(2, 11.0, 1)),
        ({"parallel": {"resources": {"x": 0.5}}}, {"workers_per_pod": 2}, Pod(2, 11.0, 0, (("x", 1.0),))),
        # three feed workers of half a CPU on two pods: two of them may come to one
        ({"data": {"feed_workers": 3, "feed_cpus": 0.5}}, {"workers_per_pod": 2}, Pod(3, 11.0)),
    ],
)
def test_what_a_pod_takes_up(sections: dict[str, Any], machines: dict[str, Any], expected: Pod) -> None:
    assert training_pod(recipe(**sections), Machines(IMAGE, **machines)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-small", "gpt-small"),
        ("GPT_small.v2", "gpt-small-v2"),
        ("7b", "run-7b"),
        ("_x_", "x"),
        ("é", "run"),
    ],
)
def test_names_become_such_as_kubernetes_takes(name: str, expected: str) -> None:
    assert object_name(name) == expected


def test_a_name_that_is_too_long_is_refused() -> None:
    assert object_name("a" * LONGEST_NAME) == "a" * LONGEST_NAME
    with pytest.raises(ValueError, match="too long for Kubernetes"):
        object_name("a" * (LONGEST_NAME + 1))


@pytest.mark.parametrize(
    "image",
    [
        "reknit:1",
        "localhost:5000/reknit:1.0",
        "ghcr.io/a/b-c/reknit@sha256:" + "0" * 64,
        "ghcr.io/a/reknit:v1@sha256:" + "a" * 64,
    ],
)
def test_an_image_with_a_version_is_taken(image: str) -> None:
    assert Machines(image).image == image


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"image": "reknit"}, "names no version"),
        ({"image": "reknit:latest"}, "names no version"),
        ({"image": "localhost:5000/reknit"}, "names no version"),
        ({"image": "Reknit Image:1"}, "names no image"),
        ({"image": "reknit:1\nkind: Secret"}, "names no image"),
        ({"workers_per_pod": 0}, "workers-per-pod is 0"),
        ({"reserved": -1}, "reserved is -1"),
        ({"memory_gib": 0.0}, "memory-gib is 0.0"),
        ({"memory_gib": float("nan")}, "memory-gib is nan"),
        ({"spot_label": ("a b", "c")}, "a b=c is no node label"),
        ({"reserved_label": ("a", "")}, "a= is no node label"),
        ({"accelerator": "gpu:1"}, "names no resource"),
    ],
)
def test_machines_that_make_no_sense_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as raised:
        Machines(**{"image": IMAGE, **values})
    assert "\n" not in str(raised.value)
