"""The adapters of orders: who shares a batch with whom, with which parameters, and who waits for room."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from anima_jax import AnimaPipeline, UserError
from anima_jax.models import parameters
from anima_jax.serving.adapter_room import MergedSets, RowStore
from anima_jax.serving.adapters import BY_ROW, MERGED, NO_ADAPTERS, OrderAdapters
from anima_jax.serving.lora_library import LoraLibrary
from tests.models.networks import normal, quick_jit
from tests.small_run import ASSETS, write_transformer

TINY = {
    "vae": ASSETS / "tiny_vae.safetensors",
    "text_encoder": ASSETS / "tiny_qwen3.safetensors",
    "tokenizers": ASSETS / "tokenizers",
    "dtype": jnp.float32,
}


def lora(module, out, into, rank, seed, **more):
    factors = {"lora_down": 0.2 * normal(rank, into, seed=seed), "lora_up": normal(out, rank, seed=seed + 1)}
    return {f"{module}.{name}.weight": values for name, values in factors.items()} | {
        f"{module}.{name}": np.asarray(values) for name, values in more.items()
    }


def test_weights_that_no_image_uses_any_more_leave_nothing():
    ready, store = threading.Event(), RowStore({}, 4, jnp.float32)
    sets = MergedSets(lambda source: {}, ready.set)
    for weight in range(3):
        if not sets.take(weight, None):
            assert ready.wait(60)
            assert sets.take(weight, None)
        ready.clear()
        sets.release(weight)
        assert store.take({weight: 2})
        store.release([weight])
    sets.close()
    assert (len(sets._users), len(store._users), store.used) == (0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer, and adapters: some by row, some that are merged, some of the prompts' networks."""
    folder = tmp_path_factory.mktemp("adapters")
    write_transformer(folder / "base.safetensors")
    blocks = "lora_unet_blocks_0_mlp_layer1", "diffusion_model.blocks.1.cross_attn.k_proj"
    files = {
        "style": lora(blocks[0], 128, 64, 3, 1, alpha=np.float32(2)),
        "light": lora(blocks[1], 64, 32, 8, 3),
        "words": lora("lora_te_layers_0_self_attn_v_proj", 32, 64, 3, 5)
        | lora("lora_unet_llm_adapter_blocks_0_mlp_2", 32, 64, 2, 7),
        "dora": lora(blocks[0], 128, 64, 3, 9, dora_scale=1 + 0.1 * np.abs(normal(128, 1, seed=11))),
        "wide": lora(blocks[0], 128, 64, 24, 12),
        "other model": lora(blocks[0], 128, 32, 3, 13),
    }
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return AnimaPipeline.load(transformer=folder / "base.safetensors", **TINY)


def adapters(pipeline, folder, **options):
    return OrderAdapters(pipeline, LoraLibrary(folder), **{"slots": 1, "rank": 8, **options})


def test_the_order_alone_says_which_images_share_a_batch(pipeline, folder):
    own = adapters(pipeline, folder, rank=16)
    pools = {name: own.read([(name, 0.5)]) for name in ("style", "light", "words", "dora", "wide")}
    assert [one.pool for one in pools.values()] == [BY_ROW, BY_ROW, None, MERGED, MERGED]
    assert own.read([("style", 0.0), ("words", 0)]).pool is None
    assert own.read([("style", 1.0), ("light", 1.0)]).pool == BY_ROW
    assert own.read([("style", 1.0), ("light", 1.0), ("style", 0.1)]).pool == MERGED  # 3 pages, of 2
    sets = [own.read(loras).merged_key for loras in ([("dora", 0.5), ("words", 1)], [("dora", 0.6)])]
    assert pools["dora"].merged_key == sets[0] != sets[1]
    assert pools["style"].prompts_key == () != pools["words"].prompts_key
    own.close()


def test_adapters_that_cannot_be_used_are_named(pipeline, folder):
    own = adapters(pipeline, folder)
    for loras, message in (
        ([("styel", 1.0)], r"lora 'styel': there is none of this name \(did you mean 'style'\?\)"),
        ([("style", float("nan"))], "lora 'style': weight nan, expected a number of at most 10000"),
        ([("style", {"blocks.0": True})], "expected a number"),
    ):
        with pytest.raises(UserError, match=message):
            own.check(loras)
    with pytest.raises(UserError, match="lora 'other model'"):
        own.read([("other model", 1.0)])
    own.close()


def test_prompts_and_merged_sets_have_the_parameters_that_the_pipeline_loads(pipeline, folder):
    ready = threading.Event()
    own = adapters(pipeline, folder, wake=ready.set)
    weight = {"": -0.5, "text_encoder": 2.0}
    chosen = own.read([("words", weight), ("dora", 0.7)])
    expected = AnimaPipeline.load(
        transformer=folder / "base.safetensors",
        loras=[(folder / "words.safetensors", weight), (folder / "dora.safetensors", 0.7)],
        **TINY,
    )
    assert own.enter(chosen) or (ready.wait(600) and own.enter(chosen))
    transformer, text_encoder = own.prompt_params(chosen)
    drawn, graphdef = own.network(chosen.pool, [chosen, chosen])
    assert graphdef is pipeline.dit_graphdef
    for path, value in expected.dit_params.items():
        found = (transformer if path.startswith("llm_adapter.") else drawn)[path]
        np.testing.assert_array_equal(found, value, err_msg=path)
    for path, value in expected.text_encoder_params.items():
        np.testing.assert_array_equal(text_encoder[path], value, err_msg=path)
    assert transformer["blocks.mlp.layer1.kernel"] is pipeline.dit_params["blocks.mlp.layer1.kernel"]
    own.close()


def test_an_image_that_finds_no_room_waits_and_none_overtakes_it(pipeline, folder):
    own = adapters(pipeline, folder)
    style, light, again, plain = (own.read(loras) for loras in ([("style", 1)], [("light", 1)], [("style", 2)], []))
    # `again` has an adapter that is in the store, but if it entered before `light`, that might wait for ever.
    assert [own.enter(image) for image in (style, light, again, plain)] == [True, False, False, True]
    assert own.statistics() == (1, 1, 1, 0, 2)
    own.leave(style)
    assert [own.enter(image) for image in (again, light, again)] == [False, True, False]
    own.leave(again)  # It was cancelled.
    own.leave(light)
    assert own.enter(style)
    assert own.statistics() == (1, 1, 1, 0, 0)
    own.close()


def test_an_adapter_that_cannot_be_written_keeps_no_room(pipeline, folder, monkeypatch):
    def fail(*_):
        raise MemoryError

    own = adapters(pipeline, folder)
    style, light = own.read([("style", 1)]), own.read([("light", 1)])
    with monkeypatch.context() as patched:
        patched.setattr(RowStore, "write", fail)
        with pytest.raises(MemoryError):
            own.enter(style)
    assert own.enter(light)
    own.leave(light)
    assert own.enter(style)
    assert own.statistics() == (1, 1, 1, 0, 0)
    own.close()


def test_rows_have_the_values_of_merged_weights(pipeline, folder):
    own = adapters(pipeline, folder, slots=2, rank=16)
    both, one = own.read([("style", 0.8), ("light", -1.5)]), own.read([("light", {"blocks.1.cross_attn": 0.5})])
    assert own.enter(both)
    assert own.enter(one)
    params, graphdef = own.network(BY_ROW, [one, NO_ADAPTERS, both])
    x, times, rows = jnp.asarray(normal(3, 8, 64)), jnp.asarray([0.2, 0.5, 0.9]), jnp.asarray(normal(3, 4, 32, seed=1))

    def velocity(graphdef):
        return quick_jit(lambda params: parameters.merge(graphdef, params).velocity(x, (1, 2, 4), times, rows))

    found, plain = velocity(graphdef)(params), velocity(pipeline.dit_graphdef)
    style, light = folder / "style.safetensors", folder / "light.safetensors"
    loaded = AnimaPipeline.load(transformer=folder / "base.safetensors", loras=[(style, 0), (light, 0)], **TINY)
    for row, weights in enumerate(((0, 0.5), (0, 0), (0.8, -1.5))):
        loaded.set_lora_weights(weights)
        expected = plain(loaded.dit_params)[row]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)  # sums in another order
        assert row == 1 or np.max(np.abs(expected - plain(pipeline.dit_params)[row])) > 0.01
    own.close()
