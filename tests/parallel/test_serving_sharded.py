"""The engine on meshes of eight devices: images of one device, and the same bits in any company."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax import AnimaPipeline
from anima_jax.parallel.mesh import make_mesh
from anima_jax.parallel.rules import AXES
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving.engine import Engine
from anima_jax.serving.orders import Order
from tests.compilation import quick_compilation
from tests.small_run import ASSETS, write_transformer

ORDERS = [
    Order(ImageRequest("a red square", 32, 48, 5), SamplingParams(steps=4)),
    Order(ImageRequest("a red circle", 48, 32, 6), SamplingParams(steps=3, sampler="heun", guidance_scale=1.0)),
    Order(ImageRequest("a red cross", 32, 32, 7), SamplingParams(steps=5, sampler="euler", cfg_norm=1.0)),
]


def drawn_on(sizes, transformer):
    """The images of orders that come one after the other, and of the same orders together, in the other order."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    # Programs of one device are those of tests/serving/test_engine.py: compiled well, but once.
    with contextlib.nullcontext() if mesh.size == 1 else quick_compilation(), jax.set_mesh(mesh):
        pipeline = AnimaPipeline.load(
            transformer=transformer,
            vae=ASSETS / "tiny_vae.safetensors",
            text_encoder=ASSETS / "tiny_qwen3.safetensors",
            tokenizers=str(ASSETS / "tokenizers"),
            dtype=jnp.float32,
        )
        engine = Engine(pipeline, slots=3)
        alone = [np.asarray(engine.submit(order).result(600)) for order in ORDERS]
        tickets = [engine.submit(order) for order in [*ORDERS, *ORDERS][::-1]]
        together = [np.asarray(ticket.result(600)) for ticket in tickets][::-1]
        engine.close()
    return alone, together


def test_images_are_those_of_one_device_and_bit_equal_in_any_company(on_eight, tmp_path):
    transformer = tmp_path / "base.safetensors"
    write_transformer(transformer)
    alone, together = on_eight(drawn_on, {"data": 2, "fsdp": 1, "tensor": 2, "context": 2}, transformer)
    expected, _ = drawn_on(dict.fromkeys(AXES, 1), transformer)
    for number, image in enumerate(together):
        assert np.array_equal(image, alone[number % len(ORDERS)])
    for image, other in zip(alone, expected, strict=True):
        # Sums over devices have another order: a value next to the border of two grey levels may fall on either side.
        assert np.abs(image.astype(int) - other).max() <= 1
