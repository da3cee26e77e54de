"""Reading Hugging Face's `config.json`: checked values, and the traps that several families share."""

from collections.abc import Mapping
from typing import Any

from neo_jax.errors import UserError

_REQUIRED = object()


def section(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested part of a config.json, such as "llm_config"."""
    value = hf.get(key)
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {key} should be an object, but is {value!r}")
    return value


def read(hf: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """hf[key] as `kind` (int, float, bool or str); `default` where it is absent or null.

    A list of one element is that element: NEO's evaluation kit writes scalars so (specs: neo.md section 1).

    Raises:
        UserError: it is absent without a default, or of another kind.
    """
    value = hf.get(key)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None:
        if default is _REQUIRED:
            raise UserError(f"config.json: {key} is missing; there are {', '.join(sorted(hf))}")
        return default
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"config.json: {key} should be of type {kind.__name__}, but is {value!r}")
    return value


def rope_theta(hf: Mapping[str, Any]) -> float:
    """The rotary base, which newer `transformers` nest in "rope_parameters".

    Raises:
        UserError: positions are scaled (rope_type "yarn", ...), which our rotary does not do. "dynamic"
            (InternLM2) scales only rows longer than max_position_embeddings, which we do not run.
    """
    nested = hf.get("rope_parameters") or {}
    scaling = nested if nested else (hf.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "dynamic"):
        raise UserError(f"config.json: rotary positions of type {kind!r} are not supported, only 'default'")
    return read(nested if "rope_theta" in nested else hf, "rope_theta", float, 10000.0)


def tied(*configs: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings of the first config (inner before outer) that says it; None where none does."""
    for hf in configs:
        value = read(hf, "tie_word_embeddings", bool, None)
        if value is not None:
            return value
    return None
