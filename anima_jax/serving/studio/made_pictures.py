"""Pictures that are made from files for the page, and kept."""

import asyncio
from collections.abc import Callable, Hashable

from starlette.responses import Response

from anima_jax.errors import UserError
from anima_jax.serving.http.routes import NotFoundError
from anima_jax.serving.http.server import Server
from anima_jax.serving.studio.dataset_pictures import ImageCache

DECODERS = 2
"""Pictures that are decoded at the same time: each may be large."""


class MadePictures:
    """The last pictures that were made, and room to make others. For the event loop's thread."""

    def __init__(self) -> None:
        self._cache, self._decoders = ImageCache(), asyncio.Semaphore(DECODERS)

    async def response(self, server: Server, key: Hashable, make: Callable[[], bytes], kind: str) -> Response:
        """Return a picture of a media type, from memory if it was made before.

        Raises NotFoundError if `make` cannot read its file.
        """

        def made() -> bytes:
            if (data := self._cache.get(key)) is None:
                try:
                    data = self._cache.put(key, make())
                except UserError as error:
                    raise NotFoundError(str(error)) from None
            return data

        async with self._decoders:
            data = await server.in_studio(made)
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})
