"""Who may do what: the roles of ``k8s/base``, for the account that the head's pod has there."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from tests.support.kubernetes.objects import Object
from tests.support.manifests import SHIPPED

ACCOUNT = "system:serviceaccount:default:reknit-head"
"""How an API server calls it."""

ANYTHING = "system:masters"
"""The group that may do anything."""


def roles() -> list[Object]:
    """The Role and the RoleBinding, as kustomize completes them."""
    documents = yaml.safe_load_all((SHIPPED / "base" / "rbac.yaml").read_text(encoding="utf-8"))
    found = [each for each in documents if each["kind"] in ("Role", "RoleBinding")]
    for each in found:
        for subject in each.get("subjects", ()):
            subject["namespace"] = "default"
    return found


def rules_of(account: str) -> list[Object]:
    """The rules of every Role that is bound to a service account."""
    objects = roles()
    bound = {
        each["roleRef"]["name"]
        for each in objects
        for subject in each.get("subjects", ())
        if account == f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
    }
    return [
        rule
        for each in objects
        if each["kind"] == "Role" and each["metadata"]["name"] in bound
        for rule in each["rules"]
    ]


def permitted(rules: Sequence[Object], group: str, resource: str, verb: str) -> bool:
    return any(
        group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
        for rule in rules
    )
