"""Many clients at once, each of which wants its images and counts what it was told."""

import asyncio
import collections
import io
import json
import random
from collections.abc import Callable

import httpx
from PIL import Image

CANCELLED, GONE = 0.1, 0.1
"""Shares of the jobs that a client cancels, and whose events it stops reading."""


class Clients:
    """Clients of a server, and what became of their jobs: `counts` by outcome, `lost` what should not have happened.

    `settings` are those of every job; a seed stands for one image, so that equal seeds must give equal files.
    """

    def __init__(self, url: str, settings: dict, seeds: int = 20):
        self.url, self.settings, self.seeds = url, settings, seeds
        self.counts: collections.Counter[str] = collections.Counter()
        self.lost: list[str] = []
        self.files: dict[int, bytes] = {}
        self.seconds: list[float] = []

    async def run(self, clients: int, may_go_on: Callable[[int], bool]) -> None:
        """Let clients draw one job after the other while `may_go_on(jobs that this client has finished)`."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
            await asyncio.gather(*(self._client(client, number, may_go_on) for number in range(clients)))

    async def _client(self, client: httpx.AsyncClient, number: int, may_go_on: Callable[[int], bool]) -> None:
        rng, jobs, clock = random.Random(number), 0, asyncio.get_running_loop().time
        while may_go_on(jobs):
            begun = clock()
            try:
                done = await self._job(client, rng)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.lost.append(repr(error))
                done = True
            if done:
                jobs += 1
                self.seconds.append(clock() - begun)

    async def _job(self, client: httpx.AsyncClient, rng: random.Random) -> bool:
        """Order an image and wait for it. Return False if the server was full."""
        seed, fate = rng.randrange(self.seeds), rng.random()
        response = await client.post("/api/jobs", json=self.settings | {"seed": seed, "preview_every": 2})
        if response.status_code == 429:
            self.counts["refused"] += 1
            await asyncio.sleep(min(0.2 * int(response.headers["retry-after"]), 1.0))
            return False
        job = f"/api/jobs/{response.json()['id']}"
        if fate < CANCELLED:
            await client.delete(job)
        last, data = "", {}
        async with client.stream("GET", f"{job}/events") as events:
            async for line in events.aiter_lines():
                if line.startswith("event: "):
                    last = line.removeprefix("event: ")
                    if fate > 1 - GONE:
                        break
                if line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
        self.counts[last if fate <= 1 - GONE or last in ("done", "cancelled", "failed") else "not watched"] += 1
        if last == "done" and "images" in data:
            file = (await client.get(data["images"][0]["url"])).raise_for_status().content
            same = Image.open(io.BytesIO(self.files.setdefault(seed, file))).tobytes()
            if Image.open(io.BytesIO(file)).tobytes() != same:
                self.lost.append(f"seed {seed}: another image than before")
        elif fate >= CANCELLED and fate <= 1 - GONE:
            self.lost.append(f"{job} ended with '{last}'")
        return True
