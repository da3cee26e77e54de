"""The manifest of a data folder: what is in it, from what it was made, and hashes to prove it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises DataError if the manifest is missing, not JSON or of another format."""
    path = folder / MANIFEST
    remedy = "if data_pipelines.build wrote its folder, delete the folder and build it again"
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(missing(folder)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of format {FORMAT}; {remedy}")
    return manifest


def missing(folder: Path) -> str:
    """What is said of a folder without a manifest."""
    if not folder.exists():
        return f"{folder}: no such folder"
    return f"{folder}: not a folder that data_pipelines.build wrote and finished (it has no {MANIFEST})"


def to_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def json_hash(value: Any) -> str:
    """Returns the sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
