"""One of two processes that save checkpoints together; one then damages the newest, and both look for an intact one."""

import json
import logging
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anima_jax.checkpoints.orbax import RunCheckpoints, errors_reported_once
from anima_jax.parallel import hosts


def main(folder: str, port: str, number: str) -> None:
    """Save steps 1 to 3, keep two, flip a bit of the newest and restore; print the step and this process's numbers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hosts.join(f"localhost:{port}", 2, int(number))
    rows = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))

    def items(step: int) -> dict:
        return {"params": {"w": jax.jit(lambda: jnp.arange(8.0) * step, out_shardings=rows)()}}

    checkpoints = RunCheckpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, items(step), {})
        checkpoints.wait()
        assert checkpoints.failure is None
    hosts.barrier("saved")
    if number == "1":
        path = max(pathlib.Path(folder, "3", "params").glob("ocdbt*/d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    hosts.barrier("damaged")
    step = checkpoints.newest_intact()
    found = checkpoints.restore(step, items(0))["params"]["w"]
    own = np.concatenate([shard.data for shard in found.addressable_shards])
    print(json.dumps([step, own.tolist()]), flush=True)
    checkpoints.close()


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    with errors_reported_once():
        main(*sys.argv[1:])
