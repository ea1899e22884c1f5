"""What Kubernetes refuses, or what goes wrong later, though the published schemas let it through."""

import re
from collections.abc import Iterator
from typing import Any

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_UNITS = {"": 1, "m": 1e-3, **{unit: 1e3**i for i, unit in enumerate("kMGTPE", 1)}}
_UNITS |= {f"{unit}i": 1024.0**i for i, unit in enumerate("KMGTPE", 1)}

_WORDS = {
    "completionMode": {"Indexed", "NonIndexed"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "operator": {"In", "NotIn"},
    "restartPolicy": {"Never", "OnFailure", "Always"},
    "medium": {"", "Memory"},
    "status": {"True", "False", "Unknown"},
}
_ACCESS = {"ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"}


def complaints(manifest: dict[str, Any]) -> list[str]:
    """Give what is wrong with a manifest that the schema accepts, a line for each."""
    found = [*_words(manifest, ""), *_names(manifest)]
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind == "PersistentVolumeClaim":
        found += [f"accessModes: {mode}" for mode in spec["accessModes"] if mode not in _ACCESS]
        found += _quantities(spec["resources"])
    if kind == "Job":
        found += [*_job(manifest), *_policy(spec), *_pod(spec["template"]["spec"], spec)]
    return found


def _words(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _words(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in _WORDS and item not in _WORDS[key]:
                yield f"{where}{key}: {item} is none of {sorted(_WORDS[key])}"
            if key != "data":
                yield from _words(item, f"{where}{key}.")


def _names(manifest: dict[str, Any]) -> Iterator[str]:
    for key in ("name", "namespace"):
        name = manifest["metadata"].get(key)
        # A Job's name becomes a label of its pods.
        pattern = _LABEL if key == "namespace" or manifest["kind"] == "Job" else _NAME
        if name is not None and not pattern.fullmatch(name):
            yield f"metadata.{key}: {name} is no name"


def _job(manifest: dict[str, Any]) -> Iterator[str]:
    spec, name = manifest["spec"], manifest["metadata"]["name"]
    indexed, completions = spec.get("completionMode") == "Indexed", spec.get("completions")
    if indexed and completions is None:
        yield "completions: an Indexed Job needs them"
    if "backoffLimitPerIndex" in spec and not indexed:
        yield "backoffLimitPerIndex: only of an Indexed Job"
    if "maxFailedIndexes" in spec:
        if "backoffLimitPerIndex" not in spec:
            yield "maxFailedIndexes: needs backoffLimitPerIndex"
        if spec["maxFailedIndexes"] > (completions or 0):
            yield "maxFailedIndexes: more than there are"
    if len(f"{name}-{(completions or 1) - 1}-12345") > 63:
        yield "metadata.name: too long for the names of its pods"
    if "activeDeadlineSeconds" in spec:
        yield "activeDeadlineSeconds: fails the Job, whatever is left to do"


def _policy(spec: dict[str, Any]) -> Iterator[str]:
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    containers = {container["name"] for container in spec["template"]["spec"]["containers"]}
    if rules and spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield "podReplacementPolicy: a policy looks at pods that have failed"
    for i, rule in enumerate(rules):
        where = f"podFailurePolicy.rules[{i}]"
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield f"{where}: exit codes or conditions, one of the two"
        if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
            yield f"{where}: FailIndex needs backoffLimitPerIndex"
        codes = rule.get("onExitCodes")
        if codes is None:
            continue
        if codes["operator"] == "In" and 0 in codes["values"]:
            yield f"{where}: 0 is no failure"
        if sorted(set(codes["values"])) != codes["values"]:
            yield f"{where}: exit codes must be in order, each once"
        if codes.get("containerName") not in containers:
            yield f"{where}: no container is called {codes.get('containerName')}"


def _pod(pod: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    policy = pod.get("restartPolicy", "Always")
    if policy == "Always":
        yield "restartPolicy: a Job's is Never or OnFailure"
    elif policy != "Never" and "podFailurePolicy" in spec:
        yield "restartPolicy: podFailurePolicy needs Never"
    if pod.get("terminationGracePeriodSeconds", 30) < 60:
        yield "terminationGracePeriodSeconds: too short for a step and a save"
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if len(set(volumes)) < len(volumes):
        yield "volumes: two of one name"
    for container in pod["containers"]:
        name = container["name"]
        if not _LABEL.fullmatch(name):
            yield f"containers: {name} is no name"
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest") and "@sha256:" not in container["image"]:
            yield f"image: {container['image']} may be another one tomorrow"
        mounts = container.get("volumeMounts", [])
        yield from (f"volumeMounts: no volume {m['name']}" for m in mounts if m["name"] not in volumes)
        paths = [mount["mountPath"] for mount in mounts]
        if len(set(paths)) < len(paths):
            yield "volumeMounts: two at one place"
        yield from (f"mountPath: {path}" for path in paths if not path.startswith("/") or ":" in path)
        yield from _quantities(container.get("resources", {}))
        if container["command"][0] in ("sh", "bash", "/bin/sh", "/bin/bash"):
            yield "command: a shell does not hand on the signal"
        known = {variable["name"] for variable in container.get("env", [])}
        known |= {"JOB_COMPLETION_INDEX"} if spec.get("completionMode") == "Indexed" else set()
        for word in [*container["command"], *(variable["value"] for variable in container.get("env", []))]:
            for variable in re.findall(r"(?<!\$)(?:\$\$)*\$\(([^)]*)\)", word):
                if variable not in known:
                    yield f"command: $({variable}) stands for nothing"


def _quantities(resources: dict[str, Any]) -> Iterator[str]:
    sizes: dict[str, dict[str, float]] = {"requests": {}, "limits": {}}
    for part, entries in resources.items():
        for name, quantity in entries.items():
            match = _QUANTITY.fullmatch(str(quantity))
            if match is None:
                yield f"{part}.{name}: {quantity} is no quantity"
                continue
            size = sizes[part][name] = float(match[1]) * _UNITS[match[2] or ""]
            if name == "memory" and size < 2**20:
                yield f"{part}.memory: {quantity} is less than a MiB; is a unit missing?"
            if "/" in name and size != int(size):
                yield f"{part}.{name}: {quantity} of a device"
    for name, size in sizes["requests"].items():
        if size > sizes["limits"].get(name, size):
            yield f"requests.{name}: more than its limit"
        if "/" in name and name not in sizes["limits"]:
            yield f"requests.{name}: a device is asked for by its limit"
