"""Cached examples per second through the loader, against plain .npy files: `python -m tests.benchmarks.loader`.

400 examples of one megapixel (latents of 4096 tokens × 64, bfloat16, 512 KiB each) in a store, read in the plan's order
in batches, by the threads that training uses. The baseline reads the same bytes from one .npy file per example in the
same threads, so the ratio is the cost of the store, its record format and its checksums. Both run on two cores, taking
turns, with files in the page cache; the best of a few runs counts. Target: 700 examples per second.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from anima_jax.data.batch_plan import BatchPlan, Tier
from anima_jax.data.loader import prefetched
from anima_jax.data.store import Store, pack, unpack

THREADS = 2
TOKENS, CHANNELS = 4096, 64
TARGET = 700


def main() -> None:
    arguments = argparse.ArgumentParser(description="The loader on cached latents.")
    arguments.add_argument("--examples", type=int, default=400)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=THREADS)
    arguments.add_argument("--epochs", type=int, default=3, help="epochs per run")
    arguments.add_argument("--runs", type=int, default=5)
    options = arguments.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    print(f"load average {os.getloadavg()[0]:.1f}, {THREADS} cores, {options.threads} threads")
    plan = BatchPlan([Tier("1024", np.arange(options.examples), TOKENS, options.batch)], seed=0)
    steps = plan.steps_for(options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        readers = write(pathlib.Path(folder), options.examples)
        rates = dict.fromkeys(readers, 0.0)
        for _ in range(options.runs):
            for name, read in readers.items():
                begun = time.perf_counter()
                for batch in prefetched(assembled(plan, read), 0, steps, threads=options.threads):
                    assert batch.shape == (options.batch, TOKENS, CHANNELS)
                rates[name] = max(rates[name], steps * options.batch / (time.perf_counter() - begun))
    for name, rate in rates.items():
        print(f"{name}: {rate:,.0f} examples/s, {rate * TOKENS * CHANNELS * 2 / 2**20:,.0f} MiB/s")
    print(f"store / npy: {rates['store'] / rates['npy']:.2f}; target {TARGET} examples/s")


def write(folder: pathlib.Path, count: int) -> dict[str, Callable[[int], np.ndarray]]:
    """Write the same examples in two formats; return for each the function that reads one: latents (l, c)."""
    rng = np.random.default_rng(0)
    names = [f"{index:032d}" for index in range(count)]
    store, records = Store(folder / "store"), []
    for name in names:
        latents_lc = rng.standard_normal((TOKENS, CHANNELS), np.float32).astype(ml_dtypes.bfloat16)
        records.append((name.encode(), pack({"kind": "latents"}, {"latents": latents_lc})))
        np.save(folder / f"{name}.npy", latents_lc.view(np.uint16))
    for first in range(0, count, 100):
        store.write_part(records[first : first + 100])
    return {
        "store": lambda index: unpack(store.read(names[index].encode()))[1]["latents"],
        "npy": lambda index: np.load(folder / f"{names[index]}.npy").view(ml_dtypes.bfloat16),
    }


def assembled(plan: BatchPlan, read: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """Return a function that assembles a step's batch as training does, padded to the tier's tokens."""

    def load(step: int) -> np.ndarray:
        planned = plan.batch(step)
        shape = (len(planned.indices), plan.tiers[planned.tier].tokens, CHANNELS)
        latents_blc = np.zeros(shape, ml_dtypes.bfloat16)
        for row, index in enumerate(planned.indices.tolist()):
            latents_lc = read(index)
            latents_blc[row, : len(latents_lc)] = latents_lc
        return latents_blc

    return load


if __name__ == "__main__":
    main()
