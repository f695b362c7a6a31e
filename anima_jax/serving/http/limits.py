"""What one request may ask for, in one place: every API submits its orders through `RequestLimits.check`."""

import dataclasses
from collections.abc import Sequence

from anima_jax.errors import UserError, plural, size_text
from anima_jax.serving.orders import Order
from anima_jax.text.tokenizers import Tokenizers


class TooLargeError(UserError):
    """A body that is larger than the server reads: status 413."""


class UnavailableError(UserError):
    """The server cannot draw now, but later: status 503."""


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """Largest values of requests. Sizes are in pixels and bytes, times in seconds."""

    max_size: int = 2048
    """Width and height of a drawn image."""
    max_steps: int = 150
    max_batch: int = 16
    """Images of one job."""
    max_body: int = 64 * 2**20
    """Bytes of a request."""
    max_reading: int = 512 * 2**20
    """Bytes of all requests that are being answered."""
    max_pending: int = 4 * 2**30
    """Bytes of the decoded pictures of all jobs that are not finished, and of requests that become jobs."""
    max_picture: int = 2**24
    """Pixels of a picture that a request contains, as its header says: they are checked before anything is decoded."""
    max_text: int = 2**20
    """Characters of the texts of a picture that are parsed: no other thread runs meanwhile."""
    max_prompt: int = 20_000
    """Characters of a prompt, a negative prompt or a region's prompt."""
    max_tokens: int = 4096
    """Tokens of such a prompt: attention takes the square of them, while other prompts wait for it."""
    max_loras: int = 8
    max_controls: int = 4
    max_references: int = 4
    max_regions: int = 16
    max_waiting: int = 256
    """Images that may wait to be drawn."""
    job_timeout: float = 3600.0
    """From a job's submission to its last image."""
    kept_jobs: int = 1000
    """Finished jobs whose state can still be asked for."""
    kept_images: int = 4096
    kept_bytes: int = 2**30
    """Of images in memory, if they are not written to a folder."""
    max_connections: int = 1000
    read_timeout: float = 30.0
    """For a request's headers, and between two parts of its body."""
    body_timeout: float = 300.0
    """For the whole body."""
    write_timeout: float = 60.0
    """For a client to take what is sent to it, or 4 MiB of it."""

    def check_count(self, count: int) -> None:
        """Raise UserError for more images of one request than are allowed, or none."""
        if not 1 <= count <= self.max_batch:
            raise UserError(f"{plural(count, 'image')}, expected 1 to {self.max_batch} at once")

    def check(self, orders: Sequence[Order]) -> None:
        """Raise UserError if the orders of one job ask for more than is allowed."""
        self.check_count(len(orders))
        for order in orders:
            request, params = order.request, order.params
            steps = max(params.steps if not params.sigmas else len(params.sigmas) - 1, 0)
            counts = {
                "width": (request.width, self.max_size),
                "height": (request.height, self.max_size),
                "steps": (steps, self.max_steps),
                "batch_size": (request.batch_size, self.max_batch),
                "loras": (len(order.loras), self.max_loras),
                "controls": (len(request.controls), self.max_controls),
                "references": (len(request.references), self.max_references),
                "regions": (len(request.regions), self.max_regions),
            }
            for name, (value, largest) in counts.items():
                if value > largest:
                    raise UserError(f"{name} {value}, expected at most {largest} on this server")
            for prompt in prompts_of(order):
                if len(prompt) > self.max_prompt:
                    raise UserError(f"a prompt of {len(prompt)} characters, expected at most {self.max_prompt}")

    def check_tokens(self, orders: Sequence[Order], tokenizers: Tokenizers) -> None:
        """Raise UserError if a prompt has too many tokens. No text has more of them than bytes."""
        for prompt in {prompt for order in orders for prompt in prompts_of(order)}:
            if len(prompt.encode()) > self.max_tokens:
                count = int(tokenizers.lengths([prompt]).max())
                if count > self.max_tokens:
                    raise UserError(f"a prompt of {count} tokens, expected at most {self.max_tokens}")

    def too_large(self) -> TooLargeError:
        """Return the error of a body with more bytes than `max_body`."""
        return TooLargeError(f"the request is larger than {size_text(self.max_body)}")


def prompts_of(order: Order) -> tuple[str, ...]:
    """Return an order's prompt, its negative prompt and those of its regions."""
    return order.request.prompt, order.params.negative_prompt, *(region.prompt for region in order.request.regions)
