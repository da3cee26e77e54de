"""Starting a model from the parameters of another one, such as a native model from a language model.

`plan` says for every parameter of the new model where it comes from. Parameters of the same path are taken
over; the rest follows the families' rules:

    .../text/..., .../visual/...     both copies from the one of an unrouted model (EVEv2: specs 3.4)
    q_hw                             channels of q, the quarters [1, 3, 1, 3] of each head (NEO: neo.md 7)
    k_hw                             zero: H and W logits vanish, the model is still its base
    token_embed, head                rows up to the smaller vocabulary, the rest zero; a tied base's head is
                                     its word embedding
    patch_embed, pre_buffer, ...     freshly drawn, as without a base
    objectives/...                   the same where the base has none; left behind where the model has none
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from neo_jax import params as params_lib
from neo_jax.errors import UserError
from neo_jax.params import Params, ParamSpec

# Norms of the new H and W channels start at one; they are drawn afresh with what stands in front of a base.
_NEW = re.compile(r"(?!layers/|norm/|token_embed|head).*|layers/.*_norm_[hw]/weight")
# What must agree for the base's weights to mean the same in the new model.
_SHARED = (
    *("norm", "norm_eps", "qk_norm", "mlp", "experts.per_token"),
    *("coords.rope_theta", "coords.rotary_fraction"),
)

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Origin(NamedTuple):
    """Where a parameter comes from."""

    source: str | None  # parameter of the base; None: freshly drawn
    make: Callable[[jax.Array], jax.Array]  # of that parameter


def plan(base: Shapes, specs: Mapping[str, ParamSpec]) -> dict[str, Origin]:
    """The origin of every parameter of a model that starts from parameters of shapes `base`.

    Raises:
        UserError: a parameter of the base has no place in the model, the model needs one that the base lacks,
            or their shapes differ; both are named.
    """
    origins = {path: _origin(path, spec.shape, base) for path, spec in specs.items()}
    used = {origin.source for origin in origins.values()}
    if unused := sorted(path for path in set(base) - used if not path.startswith("objectives/")):
        raise UserError(
            f"the model to start from has {unused[0]} {base[unused[0]]}, for which the config's model has no "
            "place; config.model must describe the same layers"
        )
    return origins


def check_config(base: ConfigDict, model: ConfigDict) -> None:
    """Raises UserError for the first field that gives the base's weights another meaning in the new model."""
    for field in _SHARED:
        ours, theirs = (_get(config, field) for config in (model, base))
        if ours != theirs:
            raise UserError(f"config.model.{field} is {ours!r}, but the model to start from has {theirs!r}")


def grow(
    origins: Mapping[str, Origin], specs: Mapping[str, ParamSpec], base: Params, key: jax.Array
) -> Params:
    """The parameters of the new model; jit it with shardings."""
    return {path: one(path, origin, specs, base.get, key) for path, origin in origins.items()}


def one(
    path: str,
    origin: Origin,
    specs: Mapping[str, ParamSpec],
    load: Callable[[str], Any],
    key: jax.Array,
) -> jax.Array:
    """One parameter of the new model; `load` gives those of the base."""
    if origin.source is None:
        return params_lib.init({path: specs[path]}, key)[path]
    return origin.make(load(origin.source))


def _origin(path: str, shape: Shape, base: Shapes) -> Origin:
    source, make, made = _rule(path, shape, base)
    if source is None:
        if not _NEW.fullmatch(path):
            raise UserError(
                f"the model to start from has no {path}, which the config's model needs; config.model must "
                "describe the same layers"
            )
    elif made != shape:
        raise UserError(
            f"{path} has shape {shape} in the config's model, but {made} in the model to start from"
        )
    return Origin(source, make)


def _rule(
    path: str, shape: Shape, base: Shapes
) -> tuple[str | None, Callable[[jax.Array], jax.Array], Shape]:
    """(parameter of the base or None, what is made of it, the shape that has)."""
    unrouted = re.sub(r"/(text|visual)/", "/", path)
    for source in (path, unrouted):
        if source in base:
            if source in ("token_embed", "head"):
                return _vocabulary(source, shape, base[source], axis=0 if source == "token_embed" else 1)
            return source, lambda x: x, base[source]
    if path == "head" and "token_embed" in base:  # of a tied base
        return _vocabulary("token_embed", shape, base["token_embed"][::-1], axis=1, transposes=True)
    if not path.startswith("pre_buffer/") and "_hw/" in unrouted:
        source = unrouted.replace("_hw/", "/")
        if source in base:
            make = _quarters if "/q_hw/" in unrouted else lambda x: x * 0
            return source, make, base[source]
    return None, lambda x: x, shape


def _vocabulary(
    source: str, shape: Shape, found: Shape, axis: int, transposes: bool = False
) -> tuple[str, Callable[[jax.Array], jax.Array], Shape]:
    """As `_rule`: a matrix with an axis of words, cut or filled up to the size it has in `shape`."""
    size = shape[axis]

    def make(x: jax.Array) -> jax.Array:
        x = x.T if transposes else x
        if x.shape[axis] >= size:
            return x[:size] if axis == 0 else x[:, :size]
        return jnp.pad(jnp.asarray(x), [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    return source, make, (size, found[1]) if axis == 0 else (found[0], size)


def _quarters(x: jax.Array) -> jax.Array:
    """Quarters 1 to 4 of the channels [..., d] -> [1, 3, 1, 3]: the faster rotary pairs, twice."""
    one, _, three, _ = jnp.split(jnp.asarray(x), 4, axis=-1)
    return jnp.concatenate([one, three, one, three], axis=-1)


def _get(config: ConfigDict, dotted: str) -> Any:
    for name in dotted.split("."):
        config = config[name]
    return config
