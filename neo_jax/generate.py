"""Says what is in an image: a trained model goes on from images of any size and a prompt.

    python -m neo_jax.generate --workdir=runs/quickstart --image=photo.jpg
    python -m neo_jax.generate --workdir=DIR --image=a.png --image=b.png --prompt="<image> or <image>? "
    python -m neo_jax.generate --hf=HF_DIR --image=photo.jpg --prompt="What is this?"

Prints the text up to <|im_end|>.
"""

import argparse
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from data_pipelines import documents, pack, text
from data_pipelines.schema import Document
from neo_jax import decode, restore, workdir as workdir_lib
from neo_jax.errors import UserError, main_guard
from neo_jax.model.mask import Batch
from neo_jax.model.transformer import Transformer
from neo_jax.params import Params, bind
from neo_jax.restore import Trained


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.generate", description="Captions images.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=pathlib.Path, help="folder of a trained run")
    model.add_argument("--hf", type=pathlib.Path, help="folder in Hugging Face's layout, of any family")
    parser.add_argument(
        "--image",
        type=pathlib.Path,
        action="append",
        required=True,
        metavar="FILE",
        dest="images",
        help="PNG, JPEG, WebP, GIF or BMP of any size; repeat for several",
    )
    parser.add_argument(
        "--prompt",
        help="text to go on from; <image> marks the place of each image, without any they all come first "
        "(default: the prompt of training captions in the first language)",
    )
    parser.add_argument("--max_new_tokens", type=int, help="default: config.eval.max_new_tokens")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={args.max_new_tokens}: must be at least 1")
    files = [_read(path) for path in args.images]  # before the slow part

    trained = _load(args.workdir, args.hf, args.step)
    data, evaluation = trained.config.data, trained.config.eval
    prompt = text.prompt_text(data.locales[0]) if args.prompt is None else args.prompt
    max_new_tokens = args.max_new_tokens or evaluation.max_new_tokens
    document = prompt_document(trained, files, [str(path) for path in args.images], prompt)
    [caption] = generate(trained, [document], max_new_tokens)
    if args.json:
        images = [str(path) for path in args.images]
        print(json.dumps({"caption": caption, "images": images, "prompt": prompt, "step": trained.step}))
    else:
        print(caption)


def _load(workdir: pathlib.Path | None, hf: pathlib.Path | None, step: int | None) -> Trained:
    if workdir is not None:
        return restore.load(workdir, workdir_lib.load_config(workdir), step)
    if step is not None:
        raise UserError("--step: is of a run's checkpoints; leave it out with --hf")
    from neo_jax.convert import import_  # the tables of all families

    assert hf is not None
    return import_.load(hf)


def prompt_document(trained: Trained, files: Sequence[bytes], names: Sequence[str], prompt: str) -> Document:
    """Images at the <image> marks of the prompt, in order; before it if it has none.

    Raises:
        DataError: a file is not an image, or the marks are not as many as the images.
    """
    pictures = [trained.picture(data, name) for data, name in zip(files, names, strict=True)]
    mark = text.IMAGE.text
    if mark not in prompt:
        prompt = mark * len(pictures) + prompt
    first, *others = prompt.split(mark)
    pieces = [text.Piece(first)]
    for piece in others:
        pieces += [text.IMAGE, text.Piece(piece)]
    table = documents.table_rules(trained.config, trained.stage.config)
    return text.build_document(trained.tokenizer, pictures, pieces, name="--prompt", **table)


def generate(
    trained: Trained, prompts: Sequence[Document], max_new_tokens: int, batch_size: int = 1
) -> Iterator[str]:
    """Yields what the model answers to each prompt: greedily, up to <|im_end|> or `max_new_tokens`."""
    stop_id = trained.tokenizer.im_end
    for part, batch in prompt_batches(prompts, batch_size, trained.token_side**2 * 3):
        answers = _answer(trained.model, trained.params, batch, stop_id, max_new_tokens)
        for tokens in np.asarray(answers)[: len(part)]:
            yield trained.tokenizer.decode(itertools.takewhile(lambda token: token != stop_id, tokens))


@functools.partial(jax.jit, static_argnames=("model", "stop_id", "max_new_tokens"))
def _answer(model: Transformer, params: Params, batch: Batch, stop_id: int, max_new_tokens: int) -> jax.Array:
    model = bind(model, params)
    return decode.greedy(model, decode.read_prompts(model, batch), stop_id, max_new_tokens)


def prompt_batches(
    prompts: Sequence[Document], batch_size: int, patch_dim: int
) -> Iterator[tuple[Sequence[Document], dict[str, np.ndarray]]]:
    """Yields (prompts, batch with one of them per row), all batches of one shape; the last has empty rows."""
    num_tokens = max((len(prompt.tokens) for prompt in prompts), default=0)
    num_patches = max((len(prompt.patch_hw) for prompt in prompts), default=0)
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        yield part, pack.stack([[p] for p in part], batch_size, num_tokens, num_patches, patch_dim)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--image={path}: {error.strerror}") from error


if __name__ == "__main__":
    main_guard(main)
