"""One process of a group, as tests start several of: `python -m tests.neo_jax.member COMMAND FOLDER MESH`.

MESH is "data=4" or "data=2,fsdp=2". Commands:
    save     saves a checkpoint of `state(mesh)` as step 1
    restore  restores it onto the mesh, compares it bit for bit, and saves it as the next step
    barrier  process 0 waits 2 s for the others, which do not come, and ends with the error's message
    remember saves step 1 to last and steps 2 and 3 into the hosts' memory, and waits to be killed
    recall   restores step 3 out of memory, then, without the files of the last process, step 1
    rows     writes the batch that this process loads first to rows-INDEX.npz, and that the mesh then holds
"""

import pathlib
import shutil
import sys
import time

import jax
import numpy as np

from data_pipelines.loader import train_loader
from neo_jax import config as config_lib, distributed, mesh as mesh_lib
from neo_jax.checkpoint import Checkpoints
from neo_jax.emergency import EmergencyCheckpoints
from neo_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = {"a/weight": (8, 12), "b/weight": (4, 4), "c": (3,)}
AXES = {"a/weight": ("embed", "mlp"), "b/weight": ("batch", "width"), "c": ("width",)}


def values() -> dict[str, np.ndarray]:
    """What the arrays hold, whatever the mesh: every bit pattern matters, so nothing round."""
    random = np.random.default_rng(7)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def state(mesh: jax.sharding.Mesh, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    def put(name: str, x: np.ndarray) -> jax.Array:
        sharding = jax.sharding.NamedSharding(mesh, mesh_lib.partition(AXES[name]))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return {name: put(name, x) for name, x in arrays.items()}


def assert_holds(found: dict[str, jax.Array], arrays: dict[str, np.ndarray]) -> None:
    """Every shard that this process holds has exactly the bits it should."""
    for name, x in found.items():
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), arrays[name][shard.index], err_msg=name)


def in_memory(command: str, folder: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
    arrays = {name: x for name, x in values().items() if name != "b/weight"}  # split over the slices

    def open_checkpoints() -> EmergencyCheckpoints:
        return EmergencyCheckpoints(folder / "steps", 10, (), folder / "memory", mesh)

    def at(step: int) -> dict[str, np.ndarray]:
        return {name: x * np.float32(step) for name, x in arrays.items()}

    def recall(step: int) -> None:
        with open_checkpoints() as checkpoints, jax.set_mesh(mesh):
            assert checkpoints.latest == step
            restored, record = checkpoints.restore(step, state(mesh, at(0)))
            assert record == {"step": step, "position": [0.1, "a"]}
            assert_holds(restored, at(step))

    if command == "remember":
        with open_checkpoints() as checkpoints, jax.set_mesh(mesh):
            for step in (1, 2, 3):
                record = {"step": step, "position": [0.1, "a"]}
                checkpoints.save(step, state(mesh, at(step)), record, lasting=step == 1)
            checkpoints.wait()
            print("remembered", flush=True)
            time.sleep(600)
    recall(3)
    if jax.process_index() == jax.process_count() - 1:
        for path in (folder / "memory").glob(f"*/process-{jax.process_index()}"):
            shutil.rmtree(path)
    recall(1)


def main(command: str, folder: pathlib.Path, axes: str) -> None:
    sizes = dict(part.split("=") for part in axes.split(","))
    count = int(np.prod([int(size) for size in sizes.values()]))
    overrides = [(f"mesh.{axis}", size) for axis, size in sizes.items()] + [("mesh.num_devices", str(count))]
    config = config_lib.load(f"{ROOT}/configs/quickstart.py:smoke", overrides)
    group = distributed.start(config.mesh)
    mesh = mesh_lib.make(config.mesh)
    print(group.describe(mesh), flush=True)
    if command == "barrier":
        if group.leads:
            try:
                group.barrier("the meeting", 2)
            except UserError as error:
                print(error, flush=True)
        distributed.leave(0)
    if command == "rows":
        share = mesh_lib.share(mesh)
        stage = config.stage.full
        with train_loader(
            config, stage, seed=3, process_index=share.index, process_count=share.count
        ) as loader:
            batch = next(loader)
        np.savez(folder / f"rows-{group.index}.npz", **batch)
        held = mesh_lib.put_batch(mesh, batch)
        whole = {
            name: jax.jit(lambda x: x, out_shardings=mesh_lib.replicated(mesh))(x) for name, x in held.items()
        }
        if group.leads:
            np.savez(
                folder / "held.npz", **{name: np.asarray(x.addressable_data(0)) for name, x in whole.items()}
            )
        return
    if command in ("remember", "recall"):
        in_memory(command, folder, mesh)
        return
    with Checkpoints(folder, keep=10) as checkpoints, jax.set_mesh(mesh):
        arrays = values()
        if command == "save":
            checkpoints.save(1, state(mesh, arrays), {"saved by": group.count})
            return
        step = checkpoints.latest
        blank = {name: np.zeros_like(x) for name, x in arrays.items()}
        restored, _ = checkpoints.restore(step, state(mesh, blank))
        assert_holds(restored, arrays)
        checkpoints.save(step + 1, restored, {"saved by": group.count})


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
