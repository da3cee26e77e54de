"""What must hold of a JobSet and its schema cannot say: fields that fit each other, the Job and the machines.

JobSet's webhook and the CRD's own CEL rules check part of it, in the cluster; here it is known before.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema

from launch import crd
from launch.job import Job
from launch.pods import CONTAINER, Manifest
from neo_jax.errors import UserError

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_MAX_NAME = 63
_POD_SUFFIX = "-abcde"
_RESOURCES = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}


def check_schema(manifest: Manifest) -> None:
    """Checks a manifest against JobSet's schema. Raises UserError with the path of the first wrong field."""
    validator = jsonschema.Draft202012Validator(crd.load())
    error = jsonschema.exceptions.best_match(validator.iter_errors(manifest))
    if error is not None:
        path = ".".join(map(str, error.absolute_path)) or "the manifest"
        raise UserError(f"JobSet schema: {path}: {error.message}")


def check_jobset(manifest: Manifest, job: Job) -> None:
    """Checks what the schema cannot say. Raises UserError for the first that does not hold."""
    problem = next(problems(manifest, job), None)
    if problem is not None:
        raise UserError(f"JobSet {manifest['metadata']['name']}: {problem}")


def problems(manifest: Manifest, job: Job) -> Iterator[str]:
    """Everything that does not hold, one line each."""
    spec = manifest["spec"]
    names = [replicated["name"] for replicated in spec["replicatedJobs"]]
    yield from _names(manifest, names)
    yield from _policies(spec, names)
    accelerated = []
    for replicated in spec["replicatedJobs"]:
        yield from _job(replicated)
        yield from _pod(replicated)
        if _chips(replicated, job):
            accelerated.append(replicated)
    yield from _machines(manifest, accelerated, job)
    if null := next(_nulls(manifest, ""), None):
        yield f"{null} is empty: leave it out"


def _names(manifest: Manifest, names: list[str]) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    for part in (name, *names):
        if not _DNS_LABEL.fullmatch(part):
            yield f"{part!r} is no DNS label: lower-case letters, digits and '-', starting with a letter"
    if not _NAMESPACE.fullmatch(namespace := manifest["metadata"].get("namespace", "default")):
        yield f"namespace {namespace!r}: must be 1 to 63 lower-case letters, digits and, between them, '-'"
    yield from _labels("", manifest["metadata"].get("labels", {}))
    if len(set(names)) < len(names):
        yield f"two replicated jobs share a name: {', '.join(names)}"
    for replicated in manifest["spec"]["replicatedJobs"]:
        last_job = replicated.get("replicas", 1) - 1
        last_pod = replicated["template"]["spec"].get("completions", 1) - 1
        pod = f"{name}-{replicated['name']}-{last_job}-{last_pod}{_POD_SUFFIX}"
        if len(pod) > _MAX_NAME:
            yield f"pods would be called {pod}, which is longer than {_MAX_NAME}; shorten --name"
    if coordinator := manifest["spec"].get("coordinator"):
        pod = f"-{coordinator['replicatedJob']}-0-0."
        if 2 * len(name) + len(pod) > _MAX_NAME:
            yield (
                f"all pods would have the coordinator {name}{pod}{name} as a label, which is longer than "
                f"{_MAX_NAME}; shorten --name to {(_MAX_NAME - len(pod)) // 2}"
            )


def _labels(here: str, labels: dict[str, str]) -> Iterator[str]:
    for name, value in labels.items():
        if not _LABEL_VALUE.fullmatch(value):
            yield (
                f"{here}label {name} is {value!r}: must be at most 63 letters, digits and, between them, "
                "'-', '_' and '.'"
            )


def _policies(spec: Manifest, names: list[str]) -> Iterator[str]:
    failure = spec.get("failurePolicy", {})
    if failure.get("maxRestarts", 0) < 0:
        yield f"failurePolicy.maxRestarts is {failure['maxRestarts']}: must not be negative"
    rules = [rule["name"] for rule in failure.get("rules", ())]
    if len(set(rules)) < len(rules):
        yield f"two failure rules share a name: {', '.join(rules)}"
    for rule in rules:
        if not _RULE_NAME.fullmatch(rule):
            yield f"failure rule {rule!r}: must match {_RULE_NAME.pattern}"
    targets = [name for rule in failure.get("rules", ()) for name in rule.get("targetReplicatedJobs", ())]
    targets += spec.get("successPolicy", {}).get("targetReplicatedJobs", ())
    if "coordinator" in spec:
        targets.append(spec["coordinator"]["replicatedJob"])
    for target in targets:
        if target not in names:
            yield f"a policy names the replicated job {target!r}; there are {', '.join(names)}"


def _job(replicated: Manifest) -> Iterator[str]:
    here, spec = replicated["name"], replicated["template"]["spec"]
    if spec.get("completionMode") != "Indexed":
        yield f"{here}: completionMode must be Indexed, as a pod's index says who it is"
    if spec.get("parallelism") != spec.get("completions"):
        yield f"{here}: parallelism {spec.get('parallelism')} is not completions {spec.get('completions')}"
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return
    pod = spec["template"]["spec"]
    if pod.get("restartPolicy") != "Never":
        yield f"{here}: podFailurePolicy needs restartPolicy Never"
    containers = [c["name"] for c in (*pod["containers"], *pod.get("initContainers", ()))]
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if ("onPodConditions" in rule) == (codes is not None):
            yield f"{here}: a podFailurePolicy rule has either onExitCodes or onPodConditions"
        if codes is None:
            continue
        values = codes["values"]
        if (
            values != sorted(set(values))
            or not 1 <= len(values) <= 255
            or (codes["operator"] == "In" and 0 in values)
        ):
            yield f"{here}: exit codes {values} must rise, be different and, with operator In, not be 0"
        if codes.get("containerName", containers[0]) not in containers:
            yield f"{here}: podFailurePolicy names container {codes['containerName']!r}, which the pod lacks"


def _pod(replicated: Manifest) -> Iterator[str]:
    here, pod = replicated["name"], replicated["template"]["spec"]["template"]["spec"]
    yield from _labels(f"{here}: node ", pod.get("nodeSelector", {}))
    volumes = [volume["name"] for volume in pod.get("volumes", ())]
    used: set[str] = set()
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        mounts = container.get("volumeMounts", ())
        used.update(mount["name"] for mount in mounts)
        for path, count in Counter(mount["mountPath"].rstrip("/") for mount in mounts).items():
            if count > 1:
                yield f"{here}: {container['name']} mounts {count} volumes at {path}; give each its own path"
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{here}: {container['name']} mounts volume {mount['name']!r}, which the pod lacks"
        if container["name"] != CONTAINER:
            continue
        if not any(mount["mountPath"] == "/dev/shm" for mount in mounts):
            yield f"{here}: {CONTAINER} needs memory mounted at /dev/shm for the workers that read data"
        if container["command"][0] in ("bash", "sh", "/bin/bash", "/bin/sh"):
            yield f"{here}: a shell is process 1 of {CONTAINER} and would keep SIGTERM from Python"
        if pod.get("terminationGracePeriodSeconds", 30) < 30:
            yield f"{here}: terminationGracePeriodSeconds must be at least 30: a step and a save have to fit"
    for name in volumes:
        if name not in used:
            yield f"{here}: nothing mounts volume {name!r}"
    if pod.get("hostNetwork") and pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
        yield f"{here}: with hostNetwork, names of other pods need dnsPolicy ClusterFirstWithHostNet"


def _machines(manifest: Manifest, accelerated: list[Manifest], job: Job) -> Iterator[str]:
    """The accelerators that are asked for are those of the Job."""
    place, gpu = job.target.slice, job.target.slice.chip.platform == "gpu"
    if len(accelerated) != 1:
        yield f"{len(accelerated)} replicated jobs ask for {_RESOURCES[place.chip.platform]}; one should"
        return
    replicated = accelerated[0]
    here, spec = replicated["name"], replicated["template"]["spec"]
    replicas = 1 if gpu else job.target.num_slices
    hosts = job.target.num_hosts if gpu else place.num_hosts
    if replicated.get("replicas", 1) != replicas:
        yield f"{here}: {replicated.get('replicas', 1)} replicas, but {job.target.name} needs {replicas}"
    if spec.get("completions") != hosts:
        yield f"{here}: {spec.get('completions')} pods, but {job.target.name} has {hosts} hosts"
    chips = _chips(replicated, job) * spec.get("completions", 1) * replicated.get("replicas", 1)
    if chips != (wanted := place.num_chips * job.target.num_slices):
        yield f"{here}: asks for {chips} chips; {job.target.name} has {wanted}"
    selector = spec["template"]["spec"].get("nodeSelector", {})
    label = "cloud.google.com/gke-accelerator" if gpu else "cloud.google.com/gke-tpu-accelerator"
    if selector.get(label) != place.chip.gke_accelerator:
        yield f"{here}: node label {label} must be {place.chip.gke_accelerator}"
    if not gpu and selector.get("cloud.google.com/gke-tpu-topology") != place.shape_text:
        yield f"{here}: node label cloud.google.com/gke-tpu-topology must be {place.shape_text}"
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    annotations = {
        **manifest["metadata"].get("annotations", {}),
        **replicated["template"].get("metadata", {}).get("annotations", {}),
    }
    if not gpu and place.num_hosts > 1 and annotations.get(exclusive) != "cloud.google.com/gke-nodepool":
        yield f"{here}: annotation {exclusive} must give each slice a node pool of its own"


def _chips(replicated: Manifest, job: Job) -> int:
    """Chips that a pod asks for."""
    resource = _RESOURCES[job.target.slice.chip.platform]
    containers = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return sum(int(c.get("resources", {}).get("limits", {}).get(resource, 0)) for c in containers)


def _nulls(value: Any, here: str) -> Iterator[str]:
    """Paths of null, {} and []."""
    if value is None or value == {} or value == []:
        yield here
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _nulls(inner, f"{here}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _nulls(inner, f"{here}[{i}]")
