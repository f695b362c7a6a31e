"""LoRAs and control networks of orders in the engine: each image its own, as the pipeline draws it, in any company."""

import dataclasses
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from anima_jax import AnimaPipeline, UserError
from anima_jax.checkpoints.control import save_control
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, ControlConfig, ControlNetwork
from anima_jax.sampling.controls import Control
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving.engine import Engine
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.serving.orders import Order
from tests.compilation import quick_compilation
from tests.models.networks import normal, random_params
from tests.serving.test_adapters import TINY, lora
from tests.small_run import CONFIG, write_transformer

PARAMS = SamplingParams(steps=3, sampler="euler", guidance_scale=3.0)
LORAS = (
    (),
    (("style", 0.8),),
    (("light", -6.0), ("style", {"blocks.1": 0.5})),
    (("words", 1.0), ("lokr", 0.5)),
    (("dora", 0.7), ("light", 1.0)),
    (("wide", 0.5),),
    (("norm", 0.8),),
)
"""Adapters of images: none, by row, on the prompts' networks, and those that are merged."""


def write_loras(folder):
    blocks = "lora_unet_blocks_0_mlp_layer1", "lora_unet_blocks_1_adaln_modulation_mlp_1"
    files = {
        "style": lora(blocks[0], 128, 64, 3, 1, alpha=np.float32(2)) | lora(blocks[1], 8, 64, 2, 15),
        "light": lora("diffusion_model.blocks.1.cross_attn.k_proj", 64, 32, 8, 3),
        "words": lora("lora_te_layers_0_self_attn_v_proj", 32, 64, 3, 5)
        | lora("lora_unet_llm_adapter_blocks_0_mlp_2", 32, 64, 2, 7),
        "lokr": {
            f"diffusion_model.blocks.0.mlp.layer2.{name}": values
            for name, values in {
                "lokr_w1": normal(2, 4, seed=20),
                "lokr_w2_a": normal(32, 3, seed=21),
                "lokr_w2_b": 0.2 * normal(3, 32, seed=22),
            }.items()
        },
        "dora": lora(blocks[0], 128, 64, 3, 9, dora_scale=1 + 0.1 * np.abs(normal(128, 1, seed=11))),
        "wide": lora(blocks[0], 128, 64, 24, 12),
        "norm": {"diffusion_model.blocks.0.self_attn.q_norm.diff": 0.5 * normal(16, seed=30)},
    }
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")


def write_control(path, seed, **sizes):
    config = ControlConfig(
        trunk_width=16, embedding_width=8, mlp_width=8, blocks=CONFIG.blocks, width=CONFIG.width, **sizes
    )
    graphdef, shapes = parameters.abstract(lambda rngs: ControlNetwork(config, rngs=rngs))
    save_control(path, parameters.merge(graphdef, random_params(shapes, seed)))


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_transformer(folder / "base.safetensors")
    for name in ("loras", "controls"):
        (folder / name).mkdir()
    write_loras(folder / "loras")
    for seed, name in enumerate(("lines", "edges")):
        write_control(folder / "controls" / f"{name}.safetensors", seed, layers=LAYERS[:1] + LAYERS[4:])
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return AnimaPipeline.load(transformer=folder / "base.safetensors", **TINY)


@pytest.fixture(scope="module")
def engine(pipeline, folder):
    library = LoraLibrary(folder / "loras", controls=[folder / "controls"])
    engine = Engine(pipeline, library=library, slots=3, lora_slots=2, lora_rank=16)
    yield engine
    engine.close()


def order(number: int, loras=(), **inputs) -> Order:
    return Order(ImageRequest("a cat", 32, 48, number, **inputs), PARAMS, tuple(loras))


def drawn(engine, orders) -> list[np.ndarray]:
    tickets = [engine.submit(one) for one in orders]
    return [np.asarray(ticket.result(timeout=600)) for ticket in tickets]


def compiled(engine) -> int:
    return engine.statistics().compilations


def test_each_image_has_its_own_adapters_whatever_its_company_and_nothing_compiles_for_another(
    engine, pipeline, folder
):
    orders = [order(number, loras) for number, loras in enumerate(LORAS)]
    images = drawn(engine, orders)
    plain = drawn(engine, [dataclasses.replace(one, loras=()) for one in orders])
    for one, image, without in zip(orders, images, plain, strict=True):
        files = [(folder / "loras" / f"{name}.safetensors", weight) for name, weight in one.loras]
        alone = AnimaPipeline.load(transformer=folder / "base.safetensors", loras=files, **TINY) if files else pipeline
        (expected,) = alone.draw([one.request], one.params)
        # Sums of products in another order can move a value of 8 bits over the border between two.
        assert np.max(np.abs(image - np.asarray(expected, np.float32))) <= 1, one.loras
        assert not one.loras or np.max(np.abs(image.astype(int) - without)) > 4, one.loras
    before = compiled(engine)
    write_more = lora("lora_unet_blocks_0_self_attn_q_proj", 64, 64, 5, 40)
    save_file(write_more, folder / "loras" / "new.safetensors")
    again = drawn(engine, [order(50, [("new", 1.0)]), *orders[::-1], order(51, [("dora", -0.2)])])
    assert compiled(engine) == before
    for image, other in zip(images[::-1], again[1:-1], strict=True):
        np.testing.assert_array_equal(image, other)


def test_an_image_waits_for_room_and_all_are_drawn(engine):
    orders = [order(number, [(name, 0.3 + number / 10)]) for number in range(4) for name in ("style", "light", "new")]
    assert len({image.tobytes() for image in drawn(engine, orders)}) == len(orders)
    assert engine.statistics().adapters._replace(adapters=0, merged=0) == (4, 0, 0, 0, 0)


def test_an_image_that_waits_for_merged_parameters_can_be_cancelled(engine):
    begun, first = threading.Event(), order(1, [("dora", 0.7)])
    drawing = engine.submit(dataclasses.replace(first, params=dataclasses.replace(PARAMS, steps=1000)))
    drawing.subscribe(lambda ticket: ticket.done and begun.set())
    assert begun.wait(600)
    waiting = engine.submit(order(2, [("norm", 0.8)]))
    while not engine.statistics().adapters.waiting:
        pass
    waiting.cancel()
    next_one = engine.submit(order(3, [("norm", 0.9)]))
    drawing.cancel()
    assert next_one.result(600).size == (32, 48)
    for ticket in (drawing, waiting):
        with pytest.raises(CancelledError):
            ticket.result(600)
    assert engine.statistics().adapters.waiting == 0


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 32, 3), np.uint8))


def test_images_have_their_own_control_networks_pictures_and_strengths(engine, pipeline):
    library = engine.library
    lines, edges = (library.control(name) for name in ("lines", "edges"))
    inputs = (
        [Control(lines, picture(1))],
        [Control(lines, picture(2), strength=-0.5, start_percent=0.3, end_percent=0.9)],
        [Control(edges, picture(1), strength=0.7)],
    )
    orders = [order(9, controls=tuple(controls)) for controls in inputs]
    steered = dataclasses.replace(orders[0], loras=(("style", 0.8),))
    images = drawn(engine, orders[:2])
    before = compiled(engine)
    images += drawn(engine, orders[2:])
    assert compiled(engine) == before  # another network of the same sizes
    for image, one in zip(images, orders, strict=True):
        (expected,) = pipeline.draw([one.request], one.params)
        assert np.max(np.abs(image - np.asarray(expected, np.float32))) <= 1
    assert len({image.tobytes() for image in (*images, *drawn(engine, [order(9), steered]))}) == len(orders) + 2
    again = drawn(engine, orders[::-1])[::-1]
    for image, other in zip(images, again, strict=True):
        np.testing.assert_array_equal(image, other)


def test_what_the_library_does_not_have_is_refused_at_once(engine, pipeline):
    with pytest.raises(UserError, match=r"lora 'styl': there is none of this name \(did you mean 'style'\?\)"):
        engine.submit(order(0, [("styl", 1.0)]))
    bare = Engine(pipeline)
    with pytest.raises(UserError, match="lora 'style': the server has no folder for it, expected --lora_dir"):
        bare.submit(order(0, [("style", 1.0)]))
    bare.close()
