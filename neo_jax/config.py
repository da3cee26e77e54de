"""From a config file and the command line to one checked, frozen config, before any device is touched.

    args = config.parse_args(parser, argv)  # --config=FILE.py[:ARG] and any number of --config.a.b=VALUE
    cfg = config.load(args.config, args.overrides)

`configs/base.py` is the schema: its fields, their types and their defaults. A config may use no other field
(names of stages, sources, objectives and mixture entries are free), so a misspelt one is an error that names
the nearest. What values must be is in `validate.py`. Neither imports JAX.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from configs import base
from data_pipelines.errors import mistake_in
from neo_jax import validate
from neo_jax.errors import UserError

Overrides = Sequence[tuple[str, str]]  # (dotted field, text as typed), applied in order

_FREE_NAMES = ("mixture", "objectives")  # fields of a stage that map names to weights, which names is open

# Command line and files


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, required: bool = True
) -> argparse.Namespace:
    """Parses a command's own flags together with the config flags, which it adds to `parser`."""
    add_flag(parser, required=required)
    return parse(parser, argv)


def add_flag(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds --config to a command, or to one of its subcommands."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE.py[:ARG]",
        help="experiment file; change single fields with --config.FIELD=VALUE, as in "
        "--config.model.num_layers=6 --config.data.locales=en,de --config.stage.full.mixture=\"{'noto': 1}\"",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses flags, --config.FIELD=VALUE among them.

    Returns a namespace with the command's flags and `overrides` beside `config` ("FILE.py[:ARG]" or None).
    Ends the process with usage and exit code 2 on a malformed flag, as argparse does.
    """
    overrides, rest = [], []
    for argument in argv:
        if argument.startswith("--config."):
            field, equals, text = argument.removeprefix("--config.").partition("=")
            if not equals:
                parser.error(f"{argument}: write --config.{field}=VALUE")
            overrides.append((field, text))
        else:
            rest.append(argument)
    args = parser.parse_args(rest)
    args.overrides = tuple(overrides)
    return args


def load(spec: str, overrides: Overrides = ()) -> FrozenConfigDict:
    """Runs `get_config()` of "FILE.py", or `get_config(ARG)` of "FILE.py:ARG", and resolves the result."""
    match = re.fullmatch(r"(.+\.py)(?::(.*))?", spec)
    if match is None:
        raise UserError(f"--config={spec}: a config is a Python file, FILE.py or FILE.py:ARG")
    file, arg = Path(match[1]), match[2]
    if not file.is_file():
        raise UserError(f"--config={spec}: no such file")
    try:
        return resolve(_run_config_file(file, arg), overrides)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _run_config_file(file: Path, arg: str | None) -> Any:
    """What the file's `get_config` returns. An exception in the file becomes a UserError with its line."""
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None, file
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError("has no function get_config()")
        return module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(mistake_in(file, error)) from error


# Resolve


def resolve(config: Mapping[str, Any] | ConfigDict, overrides: Overrides = ()) -> FrozenConfigDict:
    """Applies overrides, checks every field and every combination, and freezes.

    Values take the type of their field in `configs/base.py` (int for float, list for tuple), so that equal
    experiments are equal configs with equal hashes. Raises UserError for the first field that is wrong.
    """
    if not isinstance(config, (Mapping, ConfigDict)):
        raise UserError(f"expected a config (ConfigDict) from get_config(), got {type(config).__name__}")
    values = _plain(config)
    schema = _schema(values)
    values = _typed(values, schema, "", schema)
    for field, text in overrides:
        try:
            _override(values, schema, field, text)
        except UserError as error:
            raise UserError(f"--config.{error}") from error
    for field, value in _leaves(values):
        validate.check_field(field, value)
    resolved = FrozenConfigDict(values)
    validate.check_together(resolved)
    return resolved


def _plain(value: Any) -> Any:
    """The same value with ConfigDicts as fresh dicts."""
    if isinstance(value, (Mapping, ConfigDict)):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _schema(values: dict[str, Any]) -> dict[str, Any]:
    """`configs/base.py` as nested dicts of defaults, with the stages, sources, objectives of `values`."""
    schema = _plain(base.get_config())
    stages = values.get("stage")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if not re.fullmatch(r"\w+", str(name)):
            raise UserError(f"stage.{name}: a stage name is made of letters, digits and _")
        schema["stage"][name] = _plain(base.stage(1))
        for section in _FREE_NAMES:
            weights = stage.get(section) if isinstance(stage, dict) else None
            if isinstance(weights, dict):
                schema["stage"][name][section] = _weights_like(section, weights)
    data = values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for name in sources if isinstance(sources, dict) else ():
        if not re.fullmatch(r"\w+", str(name)):
            raise UserError(f"data.sources.{name}: a source name is made of letters, digits and _")
        schema["data"]["sources"][name] = _plain(base.source("", ""))
    return schema


_RAMP = ((0.0, 0.0),)  # the schema of a weight that changes with the step


def _weights_like(section: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of named weights: floats, and in a mixture also (step, weight) pairs."""
    ramps = {name for name, weight in weights.items() if isinstance(weight, (tuple, list))}
    return {name: _RAMP if section == "mixture" and name in ramps else 1.0 for name in weights}


def _override(values: dict[str, Any], schema: dict[str, Any], field: str, text: str) -> None:
    """Sets one field of `values` from its text on the command line; `schema` grows by a new source."""
    *sections, name = field.split(".")
    parent: Any = schema
    for section in sections:
        if not isinstance(parent, dict) or section not in parent:
            raise _unknown(field, schema)
        parent, values = parent[section], values[section]
    section = "".join(sections[2:]) if sections[:1] == ["stage"] else ""
    if isinstance(parent, dict) and section in _FREE_NAMES:
        ramps = section == "mixture" and text.startswith(("(", "["))
        parent[name] = _RAMP if ramps else 1.0
    if not isinstance(parent, dict) or name not in parent:
        raise _unknown(field, schema)
    value = _parsed(text, parent[name])
    if name in _FREE_NAMES and isinstance(value, dict):
        parent[name] = _weights_like(name, value)
    values[name] = _typed(value, parent[name], field, schema)


def _parsed(text: str, default: Any) -> Any:
    """The value that `text` means for a field with this default; `_typed` refuses what does not fit."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            return text
    if isinstance(default, tuple) and not text.startswith(("(", "[")):
        items = [item.strip() for item in text.split(",")]
        return tuple(_parsed(item, _element(default)) for item in items if item)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _element(default: tuple[Any, ...]) -> Any:
    """A value of the type that the elements of this tuple have; an empty default holds names."""
    return default[0] if default else ""


def _typed(value: Any, default: Any, field: str, schema: dict[str, Any]) -> Any:
    """`value` in the type of `default`, field by field. Raises UserError where they do not match."""
    if isinstance(default, dict):
        prefix = f"{field}." if field else ""
        if not isinstance(value, dict):
            raise UserError(f"{field}: expected fields of its own, got {value!r}")
        for key in value:
            if key not in default:
                raise _unknown(f"{prefix}{key}", schema)
        for key in default:
            if key not in value:
                raise UserError(f"{prefix}{key}: missing; start from base.get_config() and base.stage()")
        return {key: _typed(value[key], default[key], f"{prefix}{key}", schema) for key in default}
    if isinstance(default, tuple):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{field}: expected a tuple of {type(_element(default)).__name__}, got {value!r}")
        return tuple(_typed(item, _element(default), f"{field}[{i}]", schema) for i, item in enumerate(value))
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{field}: expected {type(default).__name__}, got {value!r} ({type(value).__name__})")
    return value


def _unknown(field: str, schema: dict[str, Any]) -> UserError:
    """The error for a field that does not exist, with the field that looks most like it."""
    nearest = validate.nearest(field, list(_fields(schema)))
    return UserError(f"{field}: no such field; did you mean {nearest}?")


def _fields(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and fields."""
    for key, value in schema.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all fields."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# Identity: hash, difference, JSON


def config_hash(config: FrozenConfigDict) -> str:
    """12 hex digits that identify a resolved config, the same on every machine."""
    canonical = json.dumps(_plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def diff(old: FrozenConfigDict, new: FrozenConfigDict) -> list[str]:
    """One line "field: old -> new" per field that differs; "(absent)" where a config lacks it."""
    before, after = dict(_leaves(_plain(old))), dict(_leaves(_plain(new)))
    lines = []
    for field in sorted(before | after):
        texts = [repr(side[field]) if field in side else "(absent)" for side in (before, after)]
        if texts[0] != texts[1]:
            lines.append(f"{field}: {texts[0]} -> {texts[1]}")
    return lines


def to_json(config: FrozenConfigDict) -> str:
    """A resolved config as indented JSON with sorted keys."""
    return json.dumps(_plain(config), indent=2, sort_keys=True)


def from_json(text: str) -> FrozenConfigDict:
    """The config that `to_json` wrote, checked again. Raises UserError if it is not one."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error}") from error
    return resolve(values)
