"""The part of JobSet's published schema that our manifests use, made strict.

    python -m launch.crd CRD.yaml --version=TEXT

reads the CustomResourceDefinition of a JobSet release (`SOURCE` in its repository) and writes
launch/jobset.schema.json. The CRD has 800 kB, as it repeats all of Kubernetes' pod; `KEEP` names what we
write. A cluster drops or refuses fields it does not know; here every object is closed, so that a misspelt
field is an error before anything is submitted.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from neo_jax.errors import UserError, main_guard

FILE = Path(__file__).with_name("jobset.schema.json")
VERSION = "v1alpha2"
SOURCE = "kubernetes-sigs/jobset: config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"

_POD = "spec.replicatedJobs.template.spec.template"
_CONTAINER_FIELDS = (
    *("name", "image", "command", "args", "restartPolicy", "securityContext.privileged"),
    *("env.name", "env.value", "env.valueFrom.fieldRef", "ports", "resources.limits", "volumeMounts"),
)
# Paths of fields; lists are passed through, and the last field brings all that is in it.
KEEP = (
    *("apiVersion", "kind", "spec.ttlSecondsAfterFinished", "spec.network", "spec.failurePolicy"),
    *("spec.successPolicy", "spec.startupPolicy", "spec.coordinator"),
    *("spec.replicatedJobs.name", "spec.replicatedJobs.replicas", "spec.replicatedJobs.template.metadata"),
    *(
        f"spec.replicatedJobs.template.spec.{field}"
        for field in ("parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy")
    ),
    f"{_POD}.metadata",
    *(
        f"{_POD}.spec.{field}"
        for field in (
            *(
                "restartPolicy",
                "hostNetwork",
                "dnsPolicy",
                "terminationGracePeriodSeconds",
                "priorityClassName",
            ),
            *("nodeSelector", "tolerations"),
            *(f"{kind}.{field}" for kind in ("containers", "initContainers") for field in _CONTAINER_FIELDS),
            *("volumes.name", "volumes.emptyDir", "volumes.hostPath", "volumes.persistentVolumeClaim"),
            *("volumes.csi.driver", "volumes.csi.readOnly", "volumes.csi.volumeAttributes"),
        )
    ),
)
_COPIED = ("type", "format", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "maxLength")
_NAMES = {"type": "object", "additionalProperties": {"type": "string"}}


def reduce(schema: Mapping[str, Any], keep: Sequence[str] = KEEP) -> dict[str, Any]:
    """A JSON schema of the kept fields from the CRD's openAPIV3Schema.

    Raises:
        UserError: the CRD lacks a field that is kept, or demands one that is not.
    """
    reduced = _reduce(schema, [path.split(".") for path in keep], "")
    # Of metadata a CRD says nothing, as all kinds share it.
    reduced["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 63},
            "namespace": {"type": "string"},
            "labels": _NAMES,
            "annotations": _NAMES,
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    reduced["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **reduced}


def _reduce(schema: Mapping[str, Any], keep: list[list[str]], here: str) -> dict[str, Any]:
    """`keep`: the paths below this node; an empty one keeps all."""
    if schema.get("x-kubernetes-int-or-string"):
        text = {"type": "string", **{key: schema[key] for key in ("pattern",) if key in schema}}
        return {"anyOf": [{"type": "integer"}, text]}
    reduced = {key: schema[key] for key in _COPIED if key in schema}
    if "items" in schema:
        reduced["items"] = _reduce(schema["items"], keep, f"{here}[]")
    if isinstance(schema.get("additionalProperties"), Mapping):
        reduced["additionalProperties"] = _reduce(schema["additionalProperties"], [[]], f"{here}{{}}")
    if "properties" not in schema:
        return reduced
    properties = schema["properties"]
    whole = [] in keep
    names = list(properties) if whole else list(dict.fromkeys(path[0] for path in keep))
    for name in names:
        if name not in properties:
            raise UserError(f"the CRD has no field {here}.{name}; is it of {VERSION}?")
    required = list(schema.get("required", ()))
    if missing := sorted(set(required) - set(names)):
        raise UserError(f"the CRD requires {here}.{missing[0]}; add it to KEEP")
    reduced["properties"] = {
        name: _reduce(
            properties[name],
            [[]] if whole else [path[1:] for path in keep if path[0] == name],
            f"{here}.{name}",
        )
        for name in sorted(names)
    }
    if required:
        reduced["required"] = sorted(required)
    reduced["additionalProperties"] = False
    return reduced


def load() -> dict[str, Any]:
    """The schema that is part of this package."""
    return json.loads(FILE.read_text())["schema"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.crd", description=__doc__.partition("\n")[0])
    parser.add_argument("crd", type=Path, help="jobset.x-k8s.io_jobsets.yaml of a JobSet release")
    parser.add_argument("--version", required=True, help="release or commit that the file is of")
    args = parser.parse_args(argv)
    if not args.crd.is_file():
        raise UserError(f"{args.crd}: no such file")
    crd = yaml.safe_load(args.crd.read_text())
    try:
        generator = crd["metadata"]["annotations"]["controller-gen.kubebuilder.io/version"]
        found = {version["name"]: version for version in crd["spec"]["versions"]}
        schema = found[VERSION]["schema"]["openAPIV3Schema"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{args.crd}: no CustomResourceDefinition of JobSet {VERSION} ({error!r})") from error
    record = {
        "source": f"{SOURCE} (Apache-2.0)",
        "version": args.version,
        "controller_gen": generator,
        "schema": reduce(schema),
    }
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {FILE.name}: {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main_guard(main)
