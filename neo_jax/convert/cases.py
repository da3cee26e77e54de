"""Recorded cases: what went into an original implementation, and what came out of it.

A case is a safetensors file of one of two forms:

    token table   the fields of a batch (DESIGN: tokens, kinds, ...; [B, ...]) and `logits` [B, L, V]
    recording     what went into NEO, SOLO, EVE, EVEv2 or Fuyu (recordings.py), their hidden states and logits
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from neo_jax.convert import files, recordings
from neo_jax.errors import UserError

TABLE = ("tokens", "kinds", "segment_ids", "image_ids", "coords", "patch_index", "patches", "patch_hw")


class Case(NamedTuple):
    """A batch of ours and what the original says about it."""

    batch: dict[str, np.ndarray]
    logits: np.ndarray  # [B, L, V]; anything at padding
    # The stream [B, L, D]: embeddings, after each layer but the last, after the final norm; or nothing.
    hidden: list[np.ndarray] = []  # noqa: RUF012, never written to


def load(path: pathlib.Path, hf: Mapping[str, Any], model: ConfigDict) -> Case:
    """Reads a case.

    Args:
        path: of a recording, its own config.json lies beside it (except NEO's, whose cases need none).
        hf, model: config.json of its model, and our config of it.

    Raises:
        UserError: it is of no such form, or of another model.
    """
    tensors = recordings.inputs(path)
    logits = tensors.get("logits", tensors.get("out.logits"))
    if logits is None:
        raise UserError(f"--case={path}: has no logits to compare with")
    family = recordings.family_of(tensors)
    if set(TABLE) <= set(tensors):
        case = Case({name: tensors[name] for name in TABLE}, logits)
    elif family is not None:
        recorded = hf if family == "neo" else files.read_json(path.parent / "config.json")
        try:
            batch = recordings.BATCHES[family][1](tensors, recorded, model)
        except KeyError as error:
            raise UserError(f"--case={path}: a recording of {family} without {error}") from error
        except UserError as error:
            raise UserError(f"--case={path}: {error}") from error
        logits = logits.reshape(*batch["tokens"].shape, -1)
        case = Case(batch, logits, recordings.hidden_states(tensors))
    else:
        raise UserError(
            f"--case={path}: neither a token table ({', '.join(TABLE)}) nor a recording of "
            f"{', '.join(recordings.BATCHES)}"
        )
    wanted = (*case.batch["tokens"].shape, model.vocab_size)
    if case.logits.shape != wanted:
        raise UserError(f"--case={path}: logits have shape {case.logits.shape}, not {wanted}")
    if case.hidden:
        found, wanted = (
            (len(case.hidden), case.hidden[0].shape[-1]),
            (model.num_layers + 1, model.hidden_size),
        )
        if found != wanted:
            raise UserError(f"--case={path}: (hidden states, their width) are {found}, not {wanted}")
    return case
