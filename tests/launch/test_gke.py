"""JobSets: the schema against another reading of JobSet's API, and what each rule catches."""

import copy
import dataclasses
import typing

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api import models

from launch import crd, gke, rules
from launch.job import parse_mount
from neo_jax.errors import UserError
from tests.launch import jobs

CASES = {name: job for name, (backend, job) in jobs.cases().items() if backend == "gke"}


@pytest.mark.parametrize("name", CASES)
def test_manifests_are_valid(name):
    manifest = yaml.safe_load(gke.render(CASES[name]))
    rules.check_schema(manifest)
    assert list(rules.problems(manifest, CASES[name])) == []
    # The types of the Kubeflow Trainer's client are another reading of JobSet's and Kubernetes' API.
    again = models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    for replicated in again["spec"]["replicatedJobs"]:
        pod = replicated["template"]["spec"]["template"]["spec"]
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            for port in container.get("ports", ()):
                assert port.pop("protocol") == "TCP"  # its default
    assert again["spec"] == manifest["spec"]


# Kubernetes 1.37, of which that client is, no longer demands what the CRD of our JobSet does.
LATER_OPTIONAL = {
    "JobSet.spec.replicatedJobs.template.spec.podFailurePolicy.rules.onPodConditions": {"status"}
}


def _model(annotation):
    """The pydantic model in Optional[List[Model]] and the like, or None."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(_model, typing.get_args(annotation))), None)


def _compare(schema, model, here):
    """Every field of the schema is one of the model's, and both demand the same ones."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    assert set(schema["properties"]) <= set(fields), here
    kept = [name for name, field in fields.items() if field.is_required() and name in schema["properties"]]
    assert set(kept) == set(schema.get("required", ())) - LATER_OPTIONAL.get(here, set()), here
    count = len(schema["properties"])
    for name, inner in schema["properties"].items():
        inner = inner.get("items", inner)
        found = _model(fields[name].annotation)
        if "properties" in inner:
            assert found is not None, f"{here}.{name}"
            count += _compare(inner, found, f"{here}.{name}")
        elif found is None and "type" in inner and "additionalProperties" not in inner:
            plain = str(fields[name].annotation)
            kind = {"string": "str", "integer": "int", "boolean": "bool"}[inner["type"]]
            assert f"Strict{kind.capitalize()}" in plain or kind in plain, f"{here}.{name}: {plain}"
    return count


def test_the_schema_is_jobsets():
    """Names, nesting, types and required fields equal those of the Kubeflow Trainer's client."""
    schema = crd.load()
    parts = {**schema, "properties": {"spec": schema["properties"]["spec"]}, "required": []}
    assert _compare(parts, models.JobsetV1alpha2JobSet, "JobSet") > 100


def test_reduction_of_a_crd():
    full = {
        "type": "object",
        "description": "gone",
        "required": ["a"],
        "properties": {
            "a": {
                "type": "array",
                "items": {"type": "object", "properties": {"x": {"type": "string"}, "y": {}}},
            },
            "b": {"x-kubernetes-int-or-string": True, "anyOf": [], "pattern": "^[0-9]+$"},
            "c": {"type": "object", "additionalProperties": {"type": "string", "description": "gone"}},
            "unused": {"type": "object"},
        },
    }
    reduced = crd.reduce(full, ["a.x", "b", "c"])
    assert reduced["properties"]["a"]["items"] == {
        "type": "object",
        "properties": {"x": {"type": "string"}},
        "additionalProperties": False,
    }
    assert reduced["properties"]["b"] == {
        "anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9]+$"}]
    }
    assert reduced["properties"]["c"] == {"type": "object", "additionalProperties": {"type": "string"}}
    assert "unused" not in reduced["properties"]
    jsonschema.Draft202012Validator.check_schema(reduced)
    with pytest.raises(UserError, match=r"the CRD has no field .z"):
        crd.reduce(full, ["a", "z"])
    with pytest.raises(UserError, match=r"the CRD requires .a; add it to KEEP"):
        crd.reduce(full, ["b"])


def test_the_command_reads_a_crd(tmp_path, monkeypatch, capsys):
    """From a CRD made of the committed schema, the command gives that schema again."""

    def opened(node):  # closed objects, as a CRD has them
        if isinstance(node, list):
            return [opened(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "anyOf" in node:
            return {"x-kubernetes-int-or-string": True, **node, "pattern": node["anyOf"][1]["pattern"]}
        return {key: opened(value) for key, value in node.items() if value is not False}

    committed = crd.load()
    schema = opened({key: value for key, value in committed.items() if key not in ("$schema", "required")})
    schema["properties"]["metadata"] = {"type": "object"}  # all that a CRD says of it
    definition = {
        "metadata": {"annotations": {"controller-gen.kubebuilder.io/version": "v0"}},
        "spec": {"versions": [{"name": "v1alpha2", "schema": {"openAPIV3Schema": schema}}]},
    }
    path = tmp_path / "crd.yaml"
    path.write_text(yaml.safe_dump(definition))
    monkeypatch.setattr(crd, "FILE", tmp_path / "out.json")
    crd.main([str(path), "--version=v0.0.0"])
    assert crd.load() == committed
    path.write_text("kind: Other\n")
    with pytest.raises(UserError, match="no CustomResourceDefinition of JobSet v1alpha2"):
        crd.main([str(path), "--version=v0.0.0"])


def _set(path, value):
    def change(manifest):
        *parents, last = path
        node = manifest
        for key in parents:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value

    return change


JOB = ("spec", "replicatedJobs", 0)
SPEC = (*JOB, "template", "spec")
POD = (*SPEC, "template", "spec")
FIRST = (*POD, "containers", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3, "failurePolicy: .*'maxRestart' was unexpected"),
        ((*FIRST, "resources", "limit"), {}, "resources: .*'limit' was unexpected"),
        (("spec", "failurePolicy", "rules", 0, "name"), None, "rules.0: 'name' is a required property"),
        (
            ("spec", "failurePolicy", "rules", 0, "action"),
            "Restart",
            "rules.0.action: 'Restart' is not one of",
        ),
        ((*SPEC, "parallelism"), "16", "parallelism: '16' is not of type 'integer'"),
        ((*FIRST, "env", 0, "value"), 1, "value: 1 is not of type 'string'"),
        (
            (*FIRST, "resources", "limits", "google.com/tpu"),
            "four",
            "google.com/tpu: 'four' does not match",
        ),
        (("metadata", "name"), None, "metadata: 'name' is a required property"),
    ],
)
def test_the_schema_catches(path, value, message):
    manifest = gke.manifest(CASES["gke_v5p_4x4x4_x2.yaml"])
    _set(path, value)(manifest)
    with pytest.raises(UserError, match=message):
        rules.check_schema(manifest)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("metadata", "name"), "Neo", "'Neo' is no DNS label"),
        (("metadata", "name"), "n" * 50, "longer than 63; shorten --name"),
        ((*JOB, "replicas"), 3, "3 replicas, but v5p:4x4x4 x 2 needs 2"),
        ((*SPEC, "completions"), 8, "parallelism 16 is not completions 8"),
        ((*SPEC, "completionMode"), None, "completionMode must be Indexed"),
        ((*FIRST, "resources", "limits", "google.com/tpu"), 8, "asks for 256 chips; v5p:4x4x4 x 2 has 128"),
        ((*FIRST, "resources"), None, "0 replicated jobs ask for google.com/tpu"),
        (
            (*POD, "nodeSelector", "cloud.google.com/gke-tpu-topology"),
            "2x2x2",
            "gke-tpu-topology must be 4x4x4",
        ),
        ((*POD, "nodeSelector", "cloud.google.com/gke-tpu-accelerator"), "v5p", "must be tpu-v5p-slice"),
        (("metadata", "annotations"), None, "must give each slice a node pool of its own"),
        ((*POD, "volumes", 0), None, "mounts volume 'shm', which the pod lacks"),
        ((*FIRST, "volumeMounts", 0, "mountPath"), "/tmp", "needs memory mounted at /dev/shm"),
        ((*FIRST, "volumeMounts", 1), None, "nothing mounts volume 'mount-0'"),
        (
            (*FIRST, "volumeMounts", 1, "mountPath"),
            "/dev/shm/",
            "slice: train mounts 2 volumes at /dev/shm; give each its own path",
        ),
        (("metadata", "namespace"), "Bad_NS", "namespace 'Bad_NS': must be 1 to 63 lower-case letters"),
        (("metadata", "namespace"), "n" * 64, "must be 1 to 63 lower-case letters"),
        (
            ("metadata", "labels"),
            {"kueue.x-k8s.io/queue-name": "Bad_Queue!"},
            "label kueue.x-k8s.io/queue-name is 'Bad_Queue!': must be at most 63 letters, digits",
        ),
        (
            (*POD, "nodeSelector", "cloud.google.com/reservation-name"),
            "projects/p/reservations/r",
            "slice: node label cloud.google.com/reservation-name is 'projects/p/reservations/r': must be",
        ),
        ((*FIRST, "command"), ["bash", "-c", "x"], "a shell is process 1"),
        ((*POD, "dnsPolicy"), None, "need dnsPolicy ClusterFirstWithHostNet"),
        ((*POD, "terminationGracePeriodSeconds"), 5, "must be at least 30"),
        ((*POD, "restartPolicy"), "OnFailure", "podFailurePolicy needs restartPolicy Never"),
        ((*SPEC, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [0, 1], "must rise, be different"),
        ((*SPEC, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [2, 1], "must rise, be different"),
        (
            (*SPEC, "podFailurePolicy", "rules", 0, "onExitCodes", "containerName"),
            "main",
            "names container 'main', which the pod lacks",
        ),
        (("spec", "failurePolicy", "maxRestarts"), -1, "must not be negative"),
        (("spec", "failurePolicy", "rules", 0, "name"), "a b", "failure rule 'a b': must match"),
        (
            ("spec", "failurePolicy", "rules", 0, "targetReplicatedJobs"),
            ["head"],
            "names the replicated job 'head'; there are slice",
        ),
        ((*FIRST, "args"), [], "args is empty: leave it out"),
    ],
)
def test_the_rules_catch(path, value, message):
    job = CASES["gke_v5p_4x4x4_x2.yaml"]
    manifest = copy.deepcopy(gke.manifest(job))
    _set(path, value)(manifest)
    with pytest.raises(UserError, match=message):
        rules.check_jobset(manifest, job)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("gs://b", "implicit-dirs"),
        ("gs://b/", "implicit-dirs"),
        ("gs://b/runs/x/", "implicit-dirs,only-dir=runs/x"),
    ],
)
def test_a_folder_of_a_bucket_is_an_option_of_the_mount(source, options):
    job = jobs.job("v6e:2x2", mounts=(parse_mount(f"{source}:/workdir"),))
    manifest = gke.manifest(job)
    rules.check_jobset(manifest, job)
    _, volume = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["volumes"]
    attributes = volume["csi"]["volumeAttributes"]
    assert (attributes["bucketName"], attributes["mountOptions"]) == ("b", options)


def test_what_the_user_wrote_is_not_expanded():
    """Kubernetes would replace $(NAME) in commands and values."""
    job = jobs.job("v6e:2x2", env=(("A", "$(B)"),), overrides=(("name", "$(HOME)"),))
    container = gke.manifest(job)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["command"][-1] == "--config.name=$$(HOME)"
    assert {"name": "A", "value": "$$(B)"} in container["env"]


def test_the_address_of_pathways_head_is_a_label():
    """JobSet refuses one of more than 63 characters; the longest name fits exactly."""
    job = CASES["gke_v5p_4x4x4_x2_pathways.yaml"]
    for length, fits in ((22, True), (23, False)):
        manifest = gke.manifest(dataclasses.replace(job, name="n" * length))
        problems = list(rules.problems(manifest, job))
        assert fits == (problems == []) == (len(f"{'n' * length}-pathways-head-0-0.{'n' * length}") <= 63)
    assert len(problems) == 1 and problems[0].endswith("longer than 63; shorten --name to 22")


def test_pathways_gives_the_program_a_proxy():
    """The head talks to the proxy beside it and loses no flags; the workers, slice by slice, ask the head."""
    job = CASES["gke_v5p_4x4x4_x2_pathways.yaml"]
    head, workers = gke.manifest(job)["spec"]["replicatedJobs"]
    pod = head["template"]["spec"]["template"]["spec"]
    [train] = pod["containers"]
    environment = {variable["name"]: variable.get("value") for variable in train["env"]}
    # Kubernetes puts a variable into those that come after it.
    assert list(environment).index("PATHWAYS_HEAD") < list(environment).index("JAX_BACKEND_TARGET")
    assert environment["JAX_BACKEND_TARGET"] == "grpc://$(PATHWAYS_HEAD):29000"
    assert environment["JAX_PLATFORMS"] == "proxy" and environment["NEO_JAX_NUM_PROCESSES"] == "1"
    assert "LIBTPU_INIT_ARGS" not in environment
    assert train["command"][3:] == job.command()[3:]
    compile(train["command"][2], "command", "exec")
    assert [sidecar["restartPolicy"] for sidecar in pod["initContainers"]] == ["Always", "Always"]
    assert "--instance_type=tpuv5:4x4x4" in pod["initContainers"][0]["args"]
    assert "nodeSelector" not in pod
    assert workers["replicas"] == 2 and workers["template"]["spec"]["completions"] == 16
    [server] = workers["template"]["spec"]["template"]["spec"]["containers"]
    assert "megascale_graph_hang_threshold" in str(server["env"])
