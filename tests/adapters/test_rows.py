"""Adapters by row: each row of a batch has the values of merged weights, bit-equal in any company and at any place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.adapters.file import Adapter
from anima_jax.adapters.low_rank import adapter_rank, low_rank, low_ranks, rank_of
from anima_jax.adapters.merge import AdapterStack
from anima_jax.adapters.patch import Part, Patch
from anima_jax.adapters.rows import (
    CHOSEN,
    PAGE,
    WEIGHTS,
    attached,
    empty_store,
    pages_of,
    target_shapes,
    with_page,
)
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from tests.models.networks import normal, quick_jit, random_params

CONFIG = DiTConfig(width=32, blocks=2, heads=2, mlp_width=64, context_width=16, adaln_rank=8, adapter=None)
GRAPHDEF, SHAPES = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
PARAMS = random_params(SHAPES, seed=3)
TARGETS = target_shapes(PARAMS)
LAYERS = {path: shape[0] for path, shape in TARGETS.items()}
ROWS_GRAPHDEF = attached(GRAPHDEF, PARAMS)
ROW_PAGES, PAGES = 3, 7


def patch(**parts):
    return Patch({name: Part.of(np.asarray(values, np.float32)) for name, values in parts.items()})


def lora(out, into, rank, seed, **more):
    return patch(lora_A=normal(rank, into, seed=seed), lora_B=0.3 * normal(out, rank, seed=seed + 1), **more)


LORA = Adapter(
    "lora",
    {
        "blocks.0.self_attn.q_proj": lora(32, 32, 3, 10, alpha=2.0),
        "blocks.1.cross_attn.k_proj": lora(32, 16, 5, 12),
        "blocks.1.mlp.layer2": lora(32, 64, 10, 14, alpha=1.0, inv_scale=1 + 0.1 * normal(64, seed=2)),
        "blocks.0.adaln_modulation_mlp.1": lora(8, 32, 2, 16),
        "blocks.1.mlp.layer1": lora(64, 32, 4, 18, lora_mid=normal(4, 4, 1, 1, seed=3)),
    },
)
LOKR = Adapter(
    "lokr",
    {
        "blocks.0.mlp.layer1": patch(
            lokr_w1=normal(4, 2, seed=20),
            lokr_w2_a=normal(16, 3, seed=21),
            lokr_w2_b=0.1 * normal(3, 16, seed=22),
            alpha=1.5,
        ),
        "blocks.1.self_attn.output_proj": patch(
            lokr_w1_a=normal(2, 1, seed=23),
            lokr_w1_b=normal(1, 4, seed=24),
            lokr_w2=0.1 * normal(16, 8, seed=25),
        ),
    },
)
LOHA = Adapter(
    "loha",
    {
        "blocks.0.cross_attn.v_proj": patch(
            hada_w1_a=normal(32, 3, seed=30),
            hada_w1_b=normal(3, 16, seed=31),
            hada_w2_a=normal(32, 2, seed=32),
            hada_w2_b=0.2 * normal(2, 16, seed=33),
            alpha=1.0,
        )
    },
)
ADAPTERS = {"lora": LORA, "lokr": LOKR, "loha": LOHA}
PAGES_OF = {name: -(-(adapter_rank(adapter, LAYERS) or 0) // PAGE) for name, adapter in ADAPTERS.items()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_factors_are_those_of_the_exact_change(name):
    for module, one in ADAPTERS[name].patches.items():
        down, up = low_rank(one)
        assert len(down) == rank_of(one), module
        np.testing.assert_allclose(up.T @ down, one.update(), rtol=1e-5, atol=1e-5)


def test_what_is_not_such_a_product_says_so():
    magnitude = lora(32, 32, 3, 10, dora_scale=np.ones((32, 1)))
    for one in (
        magnitude,
        lora(32, 32, 3, 10, diff_b=np.ones(32)),
        lora(16, 32, 3, 10).with_parts({**lora(16, 32, 3, 10).parts, "reshape_weight": Part.of(np.array([32, 32]))}),
        patch(set_weight=normal(32, 32)),
        patch(diff=normal(32)),
        patch(oft_blocks=normal(4, 8, 8)),
        patch(**{"a1": normal(3, 32), "a2": normal(32, 3), "b1": normal(32, 3), "b2": normal(3, 32)}),
    ):
        assert rank_of(one) is None
    assert rank_of(patch(diff=normal(32, 8))) == 8
    assert (
        adapter_rank(Adapter("", {"blocks.0.mlp.layer1": lora(64, 32, 3, 1), "x_embedder.proj.1": magnitude}), LAYERS)
        is None
    )
    assert adapter_rank(LORA, LAYERS) == 10


# ---- rows of a batch -------------------------------------------------------------------------------------------------

LATENTS, TIMES = jnp.asarray(normal(3, 8, 64, seed=40)), jnp.asarray([0.9, 0.5, 0.2])
CONTEXT = jnp.asarray(normal(3, 4, 16, seed=41))


@functools.partial(quick_jit, static_argnums=0)
def velocities(graphdef, params):
    model = parameters.merge(graphdef, params)
    known = model.keys_values(CONTEXT)
    return model.velocity(LATENTS, (1, 2, 4), TIMES, known), known


def stored(places):
    """A store with these adapters from these pages on."""
    put = quick_jit(with_page)
    store = empty_store(TARGETS, PAGES, jnp.float32)
    for name, first in places.items():
        for number, page in enumerate(pages_of(low_ranks(ADAPTERS[name], LAYERS), TARGETS, np.float32)):
            store = put(store, first + number, page)
    return store


def row_params(store, places, rows):
    """The parameters of a batch: for each row, names and weights."""
    pages, scales = np.zeros((len(rows), ROW_PAGES), np.int32), np.zeros((len(rows), ROW_PAGES), np.float32)
    for row, chosen in enumerate(rows):
        lists = [
            (places[name] + n, w) for name, w in chosen for n in range(-(-adapter_rank(ADAPTERS[name], LAYERS) // PAGE))
        ]
        for place, (page, weight) in enumerate(lists):
            pages[row, place], scales[row, place] = page, weight
    own = {CHOSEN: pages, WEIGHTS: scales}
    return (
        PARAMS
        | store
        | {
            f"{path}.{name}": jnp.broadcast_to(values, (n, *values.shape))
            for path, n in LAYERS.items()
            for name, values in own.items()
        }
    )


def by_rows(places, *rows):
    return velocities(ROWS_GRAPHDEF, row_params(stored(places), places, rows))


def test_each_row_has_the_values_of_its_own_merged_weights():
    rows = [("lora", 0.7)], [("lokr", -1.5), ("loha", 1.0)], []
    found, (keys, values) = by_rows({"lora": 1, "lokr": 3, "loha": 5}, *rows)
    for row, chosen in enumerate(rows):
        stack = AdapterStack([ADAPTERS[name] for name, _ in chosen], PARAMS, {})
        params = PARAMS | stack.params_for([weight for _, weight in chosen])[0]
        expected, known = velocities(GRAPHDEF, params)
        assert row == 2 or np.max(np.abs(expected - velocities(GRAPHDEF, PARAMS)[0])[row]) > 0.05
        # Sums of float32 products in another order.
        for own, merged in (
            (found[row], expected[row]),
            (keys[:, row], known.keys[:, row]),
            (values[:, row], known.values[:, row]),
        ):
            np.testing.assert_allclose(own, merged, rtol=2e-4, atol=2e-4)


def test_a_row_is_bit_equal_in_any_company_and_wherever_its_adapters_are():
    own = [("lora", 0.7), ("loha", 0.4)]
    first, _ = by_rows({"lora": 1, "loha": 3, "lokr": 4}, own, [("lokr", 1.0)], [])
    moved = stored({"loha": 1, "lokr": 2, "lora": 4})
    broken = {path: values.at[:, 6].set(jnp.inf) for path, values in moved.items()}
    places = {"loha": 1, "lokr": 2, "lora": 4, "broken": 6}
    params = row_params(broken, places, [own, own, [("lora", -3.0)]])
    again, _ = velocities(ROWS_GRAPHDEF, params)
    np.testing.assert_array_equal(again[0], first[0])
    none, _ = velocities(ROWS_GRAPHDEF, row_params(broken, places, [[], [], []]))
    plain, _ = velocities(GRAPHDEF, PARAMS)
    np.testing.assert_allclose(none, plain, rtol=1e-5, atol=1e-5)


def test_adapters_for_another_number_of_rows_are_refused():
    params = row_params(stored({}), {}, [[], []])
    with pytest.raises(ValueError, match="3 rows for a layer with the adapters of 2"):
        jax.eval_shape(lambda params: velocities(ROWS_GRAPHDEF, params), params)
