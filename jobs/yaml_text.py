"""YAML as a person would write it."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Every value in full, texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(value: Any, command: str = "reknit k8s render") -> str:
    """Keys in their order, under a line that says which command the file comes from."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return f"# Written by `{command}`.\n{text}"
