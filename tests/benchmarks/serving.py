"""Continuous batching on the quick start's model: `python -m tests.benchmarks.serving MODEL.safetensors`.

Draws the same mixed requests (sizes, samplers, steps, guidance, seeds, prompts) three times in one process: by the
engine, which takes all of them at once; one after the other by `AnimaPipeline.draw`; and in static batches, one
`AnimaPipeline.draw` for each group of requests with the same parameters. Everything is compiled before: each way draws
all requests once, and programs are counted. Then requests arrive at the engine at random (Poisson), at a share of its
throughput, and wait for it. Prints seconds (those of the processors, too, which other users of the machine change
less), ratios, latencies, and how many images are equal bit by bit to those of an engine that draws them one at a time.
"""

import argparse
import itertools
import os
import threading
import time
from typing import Any

from tests.benchmarks.dit import THREADS

SIZES = ((64, 64), (64, 48), (48, 64), (56, 56), (128, 128), (112, 128))
SAMPLERS = ("er_sde", "euler", "euler_ancestral", "dpmpp_2m", "heun")
COLOURS, SHAPES = ("red", "yellow", "orange", "purple", "white"), ("circle", "square", "triangle", "cross")
GUIDANCE = ({"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.4)}, {"guidance_scale": 1.0})


def main() -> None:
    options = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # before XLA starts its threads

    import numpy as np

    from anima_jax.serving.engine import Engine

    pipeline = load(options.model)
    orders = mixed_orders(options.requests)
    print(f"{len(orders)} requests, {options.slots} slots, {THREADS} threads, load average {os.getloadavg()[0]:.1f}")
    programs = Programs()
    engine = Engine(pipeline, slots=options.slots)
    ways = {
        "engine": lambda: [ticket.result() for ticket in [engine.submit(order) for order in orders]],
        "one at a time": lambda: [image for order in orders for image in pipeline.draw([order.request], order.params)],
        "static batches": lambda: static_batches(pipeline, orders, options.slots),
    }
    for name, draw in ways.items():
        compiled, started = programs.count, time.perf_counter()
        draw()
        print(f"{name}, cold: {time.perf_counter() - started:.1f} s, {programs.count - compiled} programs", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    compiled = engine.statistics().compilations
    for _ in range(options.runs):
        for name, draw in ways.items():
            started, before = time.perf_counter(), time.process_time()
            draw()
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - before)
    best = {name: min(found) for name, found in seconds.items()}
    for name, found in best.items():
        cores, least = min(processor[name]), min(processor["engine"])
        print(
            f"{name}: {found:.2f} s, {len(orders) / found:.1f} images/s, {found / best['engine']:.2f} times as long as "
            f"the engine; {cores:.2f} s of processors, {cores / least:.2f} times as much",
            flush=True,
        )
    for share in options.shares:
        waits = latencies(engine, orders, share * len(orders) / best["engine"])
        p50, p95 = np.percentile(waits, [50, 95])
        print(f"Poisson arrivals at {share:.0%} of its throughput: p50 {p50:.3f} s, p95 {p95:.3f} s", flush=True)
    waits = latencies(engine, orders, options.shares[-1] * len(orders) / best["engine"], at_once=1)
    p50, p95 = np.percentile(waits, [50, 95])
    print(f"the same arrivals, one at a time in the engine: p50 {p50:.3f} s, p95 {p95:.3f} s", flush=True)
    together = ways["engine"]()
    alone = [engine.submit(order).result() for order in orders]
    equal = sum(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(together, alone, strict=True))
    print(f"equal bit by bit to the image drawn without company: {equal} of {len(orders)}")
    print(f"programs that the engine compiled after its first pass: {engine.statistics().compilations - compiled}")
    print(engine.statistics())
    engine.close()


class Programs:
    """The number of programs that the process has compiled."""

    def __init__(self) -> None:
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.count += event == "/jax/core/compile/backend_compile_duration"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The serving engine against one image at a time and static batches.")
    parser.add_argument("model", help="the quick start's transformer")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8])
    return parser.parse_args()


def load(model: str) -> Any:
    """The pipeline of configs/shapes.toml."""
    import jax.numpy as jnp

    from anima_jax import AnimaPipeline
    from tests.small_run import ASSETS

    tiny = {name: ASSETS / f"tiny_{file}.safetensors" for name, file in (("vae", "vae"), ("text_encoder", "qwen3"))}
    return AnimaPipeline.load(transformer=model, tokenizers=ASSETS / "tokenizers", dtype=jnp.float32, **tiny)


def mixed_orders(count: int) -> list[Any]:
    """Requests of which hardly two have the same parameters."""
    import numpy as np

    from anima_jax.sampling.request import ImageRequest, SamplingParams
    from anima_jax.serving.orders import Order

    rng = np.random.default_rng(0)
    orders = []
    for seed in range(count):
        width, height = SIZES[rng.integers(len(SIZES))]
        prompt = f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} on a blue background"
        params = SamplingParams(
            sampler=str(rng.choice(SAMPLERS)),
            steps=int(rng.choice([12, 24])),
            shift=1.0,
            **GUIDANCE[rng.integers(len(GUIDANCE))],
        )
        orders.append(Order(ImageRequest(prompt, width, height, seed), params))
    return orders


def static_batches(pipeline: Any, orders: list[Any], most: int) -> None:
    """Draw what can share a batch of the pipeline, at most so many images at a time."""
    for _, group in itertools.groupby(sorted(orders, key=lambda own: repr(own.params)), lambda own: repr(own.params)):
        same = list(group)
        for first in range(0, len(same), most):
            pipeline.draw([order.request for order in same[first : first + most]], same[0].params)


def latencies(engine: Any, orders: list[Any], rate: float, at_once: int = 0) -> list[float]:
    """Seconds from arrival to image of orders that arrive `rate` times a second on average.

    With `at_once` the engine gets only so many at a time, and the others wait outside.
    """
    import numpy as np

    gaps = np.random.default_rng(1).exponential(1 / rate, len(orders))
    gate = threading.Semaphore(at_once or len(orders))
    waits: list[float] = []

    def ask(order: Any) -> None:
        arrived = time.perf_counter()
        with gate:
            engine.submit(order).result()
        waits.append(time.perf_counter() - arrived)

    threads = []
    for order, gap in zip(orders, gaps, strict=True):
        time.sleep(gap)
        threads.append(threading.Thread(target=ask, args=(order,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return waits


if __name__ == "__main__":
    main()
