"""The shape of the code: which room may import which, where Ray and the environment are touched."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runtime", "strategies", "actors", "jobs")
"""In order: each room may import itself and those before it."""

RAY_ROOMS = ("actors", "jobs")
SETTINGS = "runtime/settings.py"
LONGEST_FILE = 400


def imported_modules(tree: ast.AST) -> set[str]:
    """Absolute names of all imported modules, those inside functions and conditions included."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(f"{'.' * node.level}{node.module or ''}")
    return modules


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the file at ``path`` (relative to the root)."""
    room = path.split("/", 1)[0]
    tree = ast.parse(source)
    allowed = ROOMS[: ROOMS.index(room) + 1]
    found = []
    for module in sorted(imported_modules(tree)):
        top = module.split(".", 1)[0]
        if module.startswith("."):
            found.append(f"{path} imports {module} relatively")
        elif top in ROOMS and top not in allowed:
            found.append(f"{path} imports {module}: {room} must not know {top}")
        elif top == "tests":
            found.append(f"{path} imports {module}: nothing may know the tests")
        elif top == "ray" and room not in RAY_ROOMS:
            found.append(f"{path} imports {module}: {room} must not know Ray")
    if path != SETTINGS:
        for node in ast.walk(tree):
            names: set[str] = set()
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names}
            else:
                continue
            if names & {"environ", "environb", "getenv", "getenvb"}:
                found.append(f"{path}:{node.lineno} reads the environment: only {SETTINGS} may")
    lines = source.count("\n")
    if lines > LONGEST_FILE:
        found.append(f"{path} has {lines} lines, more than {LONGEST_FILE}")
    return found


def source_files() -> list[str]:
    return [
        path.relative_to(ROOT).as_posix() for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))
    ]


def test_every_room_has_files() -> None:
    assert {path.split("/", 1)[0] for path in source_files()} == set(ROOMS)


@pytest.mark.parametrize("path", source_files())
def test_file_keeps_the_rules(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/a.py", "import strategies.pipeline"),
        ("runtime/a.py", "from jobs import recipe"),
        ("strategies/a.py", "def f():\n    from actors.worker import Worker"),
        ("actors/a.py", "import os, jobs"),
        ("runtime/a.py", "import ray"),
        ("strategies/a.py", "from ray.util import get_node_ip_address"),
        ("strategies/a.py", "if TYPE_CHECKING:\n    import ray.actor"),
        ("jobs/a.py", "from .recipe import Recipe"),
        ("jobs/a.py", "from tests.conftest import one_thread"),
        ("jobs/a.py", "import os\nos.environ['HOME']"),
        ("jobs/a.py", "import os\nos.getenv('HOME')"),
        ("actors/a.py", "from os import environ"),
        ("jobs/a.py", "x = 1\n" * 401),
    ],
)
def test_bad_file_is_caught(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jobs/a.py", "import ray, actors.worker, strategies.pipeline, runtime.plan, jobs.recipe.recipe"),
        ("actors/a.py", "import ray\nfrom runtime.plan import Plan"),
        (SETTINGS, "import os\nos.environ"),
        ("runtime/a.py", "import jobserver, raylib"),
    ],
)
def test_good_file_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
