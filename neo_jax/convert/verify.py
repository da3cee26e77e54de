"""Proof that a Hugging Face folder and our model are the same function.

The folder is read as `import` reads it and run by our code; the other side is a recorded case, or the folder
itself run by PyTorch in `transformers`, on text and, where its model sees images, on images.
"""

import datetime
import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert import cases, files, recordings
from neo_jax.convert.cases import Case
from neo_jax.convert.import_ import Source
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer

CARD = "VERIFICATION.md"
NUM_TOKENS = 24  # random ones, as text: some templates write nothing of a prompt without images
PROMPT = "<image>What is shown here? <image>And here?"
PICTURE_SIZES = ((40, 90), (61, 50))  # (height, width) of its pictures


def run(hf: pathlib.Path, case: pathlib.Path | None) -> dict[str, Any]:
    """Compares, and returns max_abs_error, mean_abs_error, kl and greedy_agreement over all positions.

    A recording also has `layers`: the largest error of each of its hidden states (Case.hidden).

    Args:
        hf: folder with config.json and safetensors; or a recording's, as its cases' model.
        case: a recorded case (cases.py); None: the folder's own PyTorch code, which is run.

    Raises:
        UserError: the folder or the case is wrong.
    """
    described = None
    if case is not None and (hf / "config.json").is_file():
        described = recordings.describe(files.read_json(hf / "config.json"), case.stem)
    source = Source(hf, described)
    if case is None:
        pairs, against = torch_cases(source), "its PyTorch model in transformers"
    else:
        pairs, against = [cases.load(case, source.hf, source.model)], f"the recorded case {case.name}"
    ours, theirs, layers = [], [], []
    for pair in pairs:
        real = pair.batch["segment_ids"] > 0
        found, hidden = outputs(source, pair.batch)
        ours.append(found[real])
        theirs.append(pair.logits[real])
        if pair.hidden:
            both = zip(hidden, pair.hidden, strict=True)
            layers = [float(np.abs(x[real] - np.reshape(y, x.shape)[real]).max()) for x, y in both]
    numbers: dict[str, Any] = compare(np.concatenate(ours), np.concatenate(theirs))
    numbers |= {"layers": layers} if layers else {}
    write_card(source, against, len(np.concatenate(ours)), numbers)
    return numbers


def outputs(source: Source, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Our logits, float32 [B, L, V], and the stream, [B, L, D] each as in Case.hidden.

    Text and visual tokens keep to no budgets here, so routed layers run without a cut (model/route.py). An
    export of ours says how it was trained; what is compared is float32 throughout.
    """
    config = source.model.copy_and_resolve_references()
    config.route.visual_share = 0.0
    config.dtype, config.reduce_dtype, config.quantization = "float32", "float32", "none"
    model = Transformer(config)
    params = {path: jnp.asarray(source.load(path)) for path in source.specs}

    def forward(
        params: params_lib.Params, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        bound = params_lib.bind(model, params)
        final, taps, _ = bound.taps(batch, range(config.num_layers + 1))
        return bound.logits(final), list(taps.values())

    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(forward)(params, dict(batch)))


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Of logits [positions, V]; kl is the mean of KL(theirs || ours) in nats."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    error = np.abs(ours - theirs)
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    return {
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "greedy_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def torch_cases(source: Source) -> list[Case]:
    """The folder's own model on text, and on text with images where it has a patch embedding.

    Raises:
        UserError: torch or transformers is missing, or they cannot load the folder.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"verify without --case needs torch and transformers ({error}): install .[hf]"
        ) from error
    sees = source.model.embed.kind != "none"
    loader = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    try:
        model = loader.from_pretrained(source.folder, trust_remote_code=True, dtype=torch.float32).eval()
        processor = (
            transformers.AutoProcessor.from_pretrained(source.folder, trust_remote_code=True)
            if sees
            else None
        )
    except (ValueError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source.folder}: transformers cannot load it ({reason}); try --case") from error
    rng = np.random.default_rng(0)
    words = torch.as_tensor(rng.integers(0, source.model.vocab_size, (1, NUM_TOKENS)))
    inputs: list[dict[str, Any]] = [{"input_ids": words}]
    if processor is not None:
        pictures = [picture(rng, size) for size in PICTURE_SIZES]
        inputs.append(processor(text=PROMPT, images=pictures, return_tensors="pt"))
    found = []
    for prompt_inputs in inputs:
        with torch.no_grad():
            theirs = model(**prompt_inputs).logits.float().numpy()
        arrays = {name: np.asarray(x) for name, x in prompt_inputs.items()}
        found.append(Case(as_batch(arrays, source), theirs))
    return found


def picture(rng: np.random.Generator, size: tuple[int, int]) -> Any:
    """A random image (PIL) of (height, width)."""
    from PIL import Image

    return Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8))


def as_batch(inputs: Mapping[str, np.ndarray], source: Source) -> dict[str, np.ndarray]:
    """One prompt as the exported processor lays it out (or only its input_ids), as a batch of ours."""
    tokens: np.ndarray = inputs["input_ids"].astype(np.int32)
    B, L = tokens.shape
    if "kinds" not in inputs and len(inputs) > 1:
        raise UserError(f"{source.folder}: its processor is not one that `export` writes; try --case")
    kinds = inputs.get("kinds", np.full((B, L), schema.TEXT)).astype(np.int32)
    t = np.broadcast_to(np.arange(L, dtype=np.float32), (B, L))
    side = source.model.embed.patch_size * source.model.embed.merge_size
    patches = inputs.get("patches", np.zeros((0, 3 * side**2), np.uint8))
    places = inputs.get("patch_hw", np.zeros((0, 2)))
    if not len(patches):  # a row of patches that is shown nowhere
        patches, places = np.zeros((1, 3 * side**2), np.uint8), np.zeros((1, 2))
    is_patch = kinds == schema.PATCH
    return {
        "tokens": tokens,
        "kinds": kinds,
        "segment_ids": np.ones((B, L), np.int32),
        "image_ids": inputs.get("image_ids", np.zeros((B, L))).astype(np.int32),
        "coords": inputs.get("coords", np.stack([t, t * 0, t * 0], -1)).astype(np.float32),
        "patch_index": np.where(is_patch, np.cumsum(is_patch, axis=1) - 1, -1).astype(np.int32),
        "patches": patches[None].astype(np.uint8),
        "patch_hw": places[None].astype(np.int32),
        "loss_weights": np.zeros((B, L), np.float32),
    }


def layer_errors(numbers: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The largest error of each recorded hidden state, with its name for people."""
    layers = numbers.get("layers", [])
    names = ["embeddings", *(f"after layer {i}" for i in range(1, len(layers) - 1)), "after the final norm"]
    return [(f"largest error {name}", x) for name, x in zip(names, layers, strict=False)]


def write_card(source: Source, against: str, positions: int, numbers: Mapping[str, Any]) -> None:
    """VERIFICATION.md beside the weights, or in the current folder where that one is read-only."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy")]
    lines = [
        f"# Verification of {source.folder.name or source.folder}",
        "",
        f"The weights in this folder ({source.family_name}, {params_lib.count(source.specs):,} parameters), "
        f"run by neo_jax in float32, against {against}, over {positions} positions.",
        "",
        "| number | value |",
        "|---|---|",
        f"| largest difference of a logit | {numbers['max_abs_error']:.3g} |",
        f"| mean difference of a logit | {numbers['mean_abs_error']:.3g} |",
        f"| KL divergence, nats a token | {numbers['kl']:.3g} |",
        f"| positions with the same likeliest token | {numbers['greedy_agreement']:.2%} |",
        *(f"| {name} | {error:.3g} |" for name, error in layer_errors(numbers)),
        "",
        f"{datetime.date.today().isoformat()}, {', '.join(packages)}, {jax.default_backend()}",
    ]
    text = "\n".join(lines) + "\n"
    try:
        (source.folder / CARD).write_text(text)
    except OSError:
        pathlib.Path(CARD).write_text(text)
