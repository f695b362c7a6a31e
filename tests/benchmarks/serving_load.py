"""Load on a server: `python -m tests.benchmarks.serving_load [--clients 200] [--seconds 60] [--url URL]`.

Without --url it starts `anima_jax.serve` with a tiny random model. A tenth of the jobs is cancelled, and of another
tenth the client stops reading. Every other image must arrive, equal seeds with equal pixels. It prints what became of
the jobs, latencies, and the memory of the server over time, which must not grow.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time

import httpx
import numpy as np

from tests.serving.load import Clients
from tests.serving.servers import SMALL, small_files


def figures(url: str) -> dict[str, float]:
    """The server's own figures that have no labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#" and "{" not in line}


async def measure(url: str, clients: int, seconds: float) -> None:
    load, begun = Clients(url, SMALL | {"prompt": "a red circle"}), time.monotonic()
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append((await asyncio.to_thread(figures, url))["anima_memory_bytes"])
            await asyncio.sleep(2)

    watching = asyncio.create_task(watch())
    await load.run(clients, lambda jobs: time.monotonic() - begun < seconds)
    watching.cancel()
    p50, p95 = np.percentile(load.seconds, [50, 95])
    took = time.monotonic() - begun
    print(f"{clients} clients, {took:.0f} s: {dict(load.counts)}; lost: {len(load.lost)} {load.lost[:5]}")
    print(f"{load.counts['done'] / took:.1f} images/s; a job takes {p50:.2f} s (p50), {p95:.2f} s (p95)")
    quarters = [f"{np.mean(part) / 2**20:.0f}" for part in np.array_split(memory, 4)]
    print(f"memory of the server in MiB, mean of each quarter: {', '.join(quarters)}")
    print({name: value for name, value in figures(url).items() if name.startswith("anima_") and "created" not in name})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--url")
    arguments = parser.parse_args()
    if arguments.url:
        asyncio.run(measure(arguments.url.rstrip("/"), arguments.clients, arguments.seconds))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [word for name, file in small_files(folder).items() for word in (f"--{name}", file)]
        command = [sys.executable, "-m", "anima_jax.serve", "--port", "0", "--no_warm_up", "--dtype", "float32", *files]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = (server.stdout.readline().split() or sys.exit("the server did not start"))[-1].rstrip("/")
            asyncio.run(measure(url, arguments.clients, arguments.seconds))
        finally:
            server.terminate()
            print(f"exit code {server.wait()}")


if __name__ == "__main__":
    main()
