"""The abstract parameter tree: every parameter's shape, logical axes and initialiser, declared once.

Modules declare parameters with `parameter(...)`; `abstract(model)` reads them back as a flat mapping
`path -> ParamSpec` with paths such as "layers/attention/qkv/q/weight". Initial values, counts, weight decay,
trainable subsets, shardings and conversion tables are all derived from that mapping, never listed twice.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from neo_jax.errors import UserError

Params = dict[str, jax.Array]
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it exists. `axes` names each dimension of `shape` (see mesh.RULES)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    decays: bool  # weight decay applies: to matrices and embeddings, not to biases and norms

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def parameter(shape: Iterable[int], axes: Iterable[str], init: Initializer) -> nnx.Param:
    """Declares a float32 matrix or embedding inside a module; its value is filled in by `bind`."""
    return nnx.Param(ParamSpec(tuple(shape), tuple(axes), init, decays=True))


def vector(shape: Iterable[int], axes: Iterable[str], init: Initializer) -> nnx.Param:
    """Declares a float32 bias or norm weight; as `parameter`, but weight decay leaves it alone.

    A bias may have several dimensions, such as (heads, head_dim).
    """
    return nnx.Param(ParamSpec(tuple(shape), tuple(axes), init, decays=False))


def stack(module: nnx.Module, num: int) -> nnx.Module:
    """Gives every parameter of `module` a leading "layers" dimension of size `num`, for lax.scan."""

    def stacked(spec: ParamSpec) -> ParamSpec:
        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.vmap(lambda k: spec.init(k, shape[1:]))(jax.random.split(key, shape[0]))

        return dataclasses.replace(spec, shape=(num, *spec.shape), axes=("layers", *spec.axes), init=init)

    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(stacked, nnx.to_pure_dict(state), is_leaf=_is_spec))


def abstract(module: nnx.Module) -> dict[str, ParamSpec]:
    """The flat mapping path -> ParamSpec of a module whose parameters are not yet bound."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(module)), sep="/")


def bind(module: nnx.Module, params: Mapping[str, jax.Array]) -> nnx.Module:
    """The same module with arrays in place of its specs. Cheap: no array is copied."""
    return nnx.merge(nnx.graphdef(module), traverse_util.unflatten_dict(dict(params), sep="/"))


def init(specs: Mapping[str, ParamSpec], key: jax.Array) -> Params:
    """Draws every parameter. Each stream is folded from its path, so adding one changes no other."""
    return {
        path: spec.init(jax.random.fold_in(key, zlib.crc32(path.encode())), spec.shape)
        for path, spec in specs.items()
    }


def count(specs: Mapping[str, ParamSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def select(specs: Mapping[str, ParamSpec], patterns: Iterable[str]) -> frozenset[str]:
    """Paths whose whole name matches one of the regular expressions.

    Raises:
        UserError: a pattern that matches no parameter of the real tree.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {path for path in specs if re.fullmatch(pattern, path)}
        if not found:
            raise UserError(
                f"trainable pattern {pattern!r} matches no parameter of {', '.join(sorted(specs))}"
            )
        chosen |= found
    return frozenset(chosen)


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, ParamSpec)
