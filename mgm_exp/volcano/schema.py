"""Whether a manifest has the form of a Volcano Job: checked here, without a cluster, before anything is sent.

``schema.json`` describes the fields that :mod:`mgm_exp.volcano.manifest` writes, and no others. It was compared by hand
with the CustomResourceDefinition ``jobs.batch.volcano.sh`` (its pod included) and the admission checks of Volcano
1.15.0, commit ed72c7c. This module reads the few words of JSON Schema that are used there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
}  # fmt: skip


def faults_of(manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with a manifest, with its places; empty if Volcano takes it."""
    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    faults = list(_form(dict(manifest), schema, schema, "job"))
    return faults or list(_admission(manifest))


def _form(value: Any, schema: Mapping[str, Any], whole: Mapping[str, Any], at: str) -> Iterator[str]:
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    wanted = schema.get("type")
    if wanted and (not isinstance(value, _TYPES[wanted]) or (wanted == "integer" and isinstance(value, bool))):
        yield f"{at} is {value!r}, not of type {wanted}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is {value!r}; allowed are {schema['enum']}"
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        yield f"{at} is {value!r}, which does not match {schema['pattern']}"
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        yield f"{at} is longer than {schema['maxLength']} characters"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{at} is {value}, below {schema['minimum']}"
    if isinstance(value, dict):
        yield from _members(value, schema, whole, at)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at} has fewer than {schema['minItems']} entries"
        for number, item in enumerate(value):
            yield from _form(item, schema.get("items", {}), whole, f"{at}[{number}]")


def _members(value: dict[str, Any], schema: Mapping[str, Any], whole: Mapping[str, Any], at: str) -> Iterator[str]:
    known = schema.get("properties", {})
    yield from (f"{at} has no {key}" for key in schema.get("required", ()) if key not in value)
    alternatives = schema.get("oneOfKeys")
    if alternatives and sum(key in value for key in alternatives) != 1:
        yield f"{at} needs exactly one of {', '.join(alternatives)}"
    more = schema.get("additionalProperties", False)
    for key, item in value.items():
        if key in known:
            yield from _form(item, known[key], whole, f"{at}.{key}")
        elif isinstance(more, dict):
            yield from _form(item, more, whole, f"{at}.{key}")
        else:
            yield f"{at}.{key} is no field that is known here"


def _admission(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the form cannot say, and Volcano's admission refuses."""
    spec = manifest["spec"]
    tasks = spec["tasks"]
    replicas = sum(task["replicas"] for task in tasks)
    if spec["minAvailable"] > replicas:
        yield f"minAvailable={spec['minAvailable']} is more than the {replicas} pods of all tasks"
    names = [task["name"] for task in tasks]
    if len(set(names)) < len(names):
        yield f"two tasks have the same name: {names}"
    for task in tasks:
        if task.get("minAvailable", 0) > task["replicas"]:
            yield f"task {task['name']}: minAvailable is more than its replicas"
        pod = task["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            missing = [mount["name"] for mount in container["volumeMounts"] if mount["name"] not in volumes]
            if missing:
                yield f"task {task['name']} mounts {missing}, which are no volumes of it"
            given = [variable["name"] for variable in container["env"]]
            twice = sorted({name for name in given if given.count(name) > 1})
            if twice:
                yield f"task {task['name']} sets {twice} twice"
            limits = container["resources"]["limits"]
            if any(limits.get(key) != amount for key, amount in container["resources"]["requests"].items()):
                yield f"task {task['name']} requests other amounts than its limits"
