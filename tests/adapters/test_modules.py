"""Adapters beside stacked layers: PEFT's numbers on random weights, layers with less rank, and dropout by key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from anima_jax.adapters import modules
from anima_jax.adapters.kinds import FACTORS, TRAINABLE
from anima_jax.models import parameters
from anima_jax.models.layers import Linear
from tests.adapters.adapter_files import rank_axes
from tests.golden_files import GRADIENT_TOLERANCE, VALUE_TOLERANCE, relative_error
from tests.models.networks import normal, quick_jit

LAYERS, WIDTH_IN, WIDTH_OUT, RANK, ALPHA = 3, 24, 36, 4, 6.0


class Stack(nnx.Module):
    """Layers that are called one after another on the same input, and their results."""

    def __init__(self, *, rngs):
        make = functools.partial(Linear, WIDTH_IN, WIDTH_OUT, use_bias=True)
        self.blocks = jax.vmap(lambda layer: Block(make, rngs=layer))(rngs.split(LAYERS))

    def __call__(self, x):
        return jax.lax.scan(lambda _, block: (None, block.one(x)), None, self.blocks)[1]


class Block(nnx.Module):
    def __init__(self, make, *, rngs):
        self.one = make(rngs=rngs)


@functools.cache
def adapted(kind: str, ranks: tuple[int, ...] = (RANK,) * LAYERS, factor: int = -1):
    """(structure, random parameters) of a stack with an adapter; what a rank leaves out is zero."""

    def build(rngs):
        model = Stack(rngs=rngs)
        modules.attach(model, specs)
        return model

    specs = {"blocks.one": modules.adapter_spec(kind, (LAYERS, WIDTH_IN, WIDTH_OUT), ranks, factor)}
    graphdef, shapes = parameters.abstract(build)
    params = {path: jnp.asarray(normal(*leaf.shape, seed=seed)) for seed, (path, leaf) in enumerate(shapes.items())}
    for path in filter(modules.is_factor, params):
        for axis in rank_axes(path.rpartition(".")[2]):
            for layer, rank in enumerate(ranks):
                beyond = (slice(rank, None),) if axis == 0 else (slice(None), slice(rank, None))
                params[path] = params[path].at[(layer, *beyond)].set(0.0)
    scales = [ALPHA / rank if rank else 0.0 for rank in ranks]
    params["blocks.one.lora_scale"] = jnp.asarray(scales)
    return graphdef, params


def divided(params):
    trained = {path: value for path, value in params.items() if modules.is_factor(path)}
    return trained, {path: value for path, value in params.items() if path not in trained}


@functools.partial(quick_jit, static_argnums=0)
def loss_and_gradients(graphdef, trained, frozen, x):
    def loss(trained):
        out = parameters.merge(graphdef, trained | frozen)(x)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, has_aux=True)(trained)


def run(graphdef, params, x):
    """The stack's results, and the gradients of the adapter's factors by name."""
    (_, out), grads = loss_and_gradients(graphdef, *divided(params), x)
    return np.asarray(out), {path.rpartition(".")[2]: np.asarray(grad) for path, grad in grads.items()}


@quick_jit
def call(model, x):
    return model(x)


def peft_config(kind: str, factor: int):
    import peft

    shared = {"r": RANK, "target_modules": ["one"]}
    if kind in {"lora", "dora"}:
        return peft.LoraConfig(**shared, lora_alpha=ALPHA, use_dora=kind == "dora")
    if kind == "loha":
        return peft.LoHaConfig(**shared, alpha=ALPHA)
    return peft.LoKrConfig(**shared, alpha=ALPHA, decompose_factor=factor)


NAMES = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "lora_magnitude_vector"}


@pytest.mark.parametrize(("kind", "factor"), [("lora", -1), ("dora", -1), ("loha", -1), ("lokr", -1), ("lokr", 2)])
def test_values_and_gradients_are_pefts(kind, factor):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    graphdef, params = adapted(kind, factor=factor)
    x = normal(5, WIDTH_IN, seed=100)
    out, grads = run(graphdef, params, jnp.asarray(x))
    for layer in range(LAYERS):
        peer = torch.nn.Module()
        peer.one = torch.nn.Linear(WIDTH_IN, WIDTH_OUT)
        peer = peft.inject_adapter_in_model(peft_config(kind, factor), peer)
        own = {path.rpartition(".")[2]: np.asarray(value[layer]) for path, value in params.items()}
        found = {}
        with torch.no_grad():
            peer.one.get_base_layer().weight.copy_(torch.from_numpy(own["kernel"].T.copy()))
            peer.one.get_base_layer().bias.copy_(torch.from_numpy(own["bias"].copy()))
        for name, parameter in peer.named_parameters():
            factor_name = next((f for f in own if f".{NAMES.get(f, f)}." in f"{name}."), None)
            if factor_name and modules.is_factor(factor_name):
                assert tuple(parameter.shape) == own[factor_name].T.shape, name
                parameter.data = torch.from_numpy(own[factor_name].T.copy())
                found[factor_name] = parameter.requires_grad_(True)
        assert found.keys() == grads.keys()
        expected = peer.one(torch.from_numpy(x))
        torch.sin(expected).sum().backward()
        assert relative_error(out[layer], expected.detach()) < VALUE_TOLERANCE
        for name, parameter in found.items():
            assert relative_error(grads[name][layer].T, parameter.grad) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("kind", TRAINABLE)
def test_layers_with_less_rank_or_none_are_as_alone_and_have_no_gradient_beyond_it(kind):
    ranks = (RANK, 2, 0)
    graphdef, params = adapted(kind, ranks)
    x = jnp.asarray(normal(5, WIDTH_IN, seed=100))
    out, grads = run(graphdef, params, x)
    plain = x @ params["blocks.one.kernel"][2] + params["blocks.one.bias"][2]
    np.testing.assert_array_equal(out[2], plain)
    for name, grad in grads.items():
        assert not np.any(grad[2]), name
        for axis in rank_axes(name):
            assert not np.any(np.take(grad[1], range(2, RANK), axis=axis)), name
            assert np.any(np.take(grad[1], range(2), axis=axis)), name


@pytest.mark.parametrize(("kind", "factor"), [*((kind, -1) for kind in TRAINABLE), ("lokr", 1)])
def test_a_fresh_adapter_changes_nothing_and_begins_as_peft_draws_it(kind, factor):
    specs = {"blocks.one": modules.adapter_spec(kind, (LAYERS, WIDTH_IN, WIDTH_OUT), (RANK, 2, 0), factor)}
    graphdef, params = adapted(kind, (RANK, 2, 0), factor)
    fresh = modules.initial(params, specs, 0)
    assert fresh.keys() == divided(params)[0].keys()
    x = jnp.asarray(normal(5, WIDTH_IN, seed=100))
    out = run(graphdef, params | fresh, x)[0]
    plain = jnp.einsum("bi,nio->nbo", x, params["blocks.one.kernel"]) + params["blocks.one.bias"][:, None]
    assert relative_error(out, plain) < 1e-6
    moving = [path for path, grad in run(graphdef, params | fresh, x)[1].items() if np.any(grad)]
    assert moving  # it can learn
    for path, value in fresh.items():
        name = path.rpartition(".")[2]
        axes = rank_axes(name)
        if FACTORS[name].zero:
            assert not np.any(value)
        elif axes:
            # torch's kaiming_uniform_(a = sqrt(5)): within 1 / sqrt(the second size in the file).
            for layer, rank in enumerate((RANK, 2)):
                bound = 1 / np.sqrt(rank if axes[0] == 0 else value.shape[1])
                assert 0.7 * bound < np.abs(value[layer]).max() <= bound


def dropped(kind, keys_b, x, dropout=0.0, rank_dropout=0.0):
    graphdef, params = adapted(kind)
    model = parameters.merge(graphdef, params)
    modules.drop(model, keys_b, dropout, rank_dropout)
    return np.asarray(call(model, x))


def keys(*ids):
    return jax.vmap(jax.random.key)(jnp.array(ids))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_what_an_example_drops_depends_on_its_key_alone(kind):
    options = {"dropout": 0.2, "rank_dropout": 0.3}
    x = jnp.asarray(normal(3, 7, WIDTH_IN, seed=1))
    three = dropped(kind, keys(11, 12, 13), x, **options)
    two = dropped(kind, keys(13, 11), x[jnp.array([2, 0])], **options)
    np.testing.assert_allclose(two, three[:, [2, 0]], rtol=1e-5, atol=1e-5)
    # Padding behind an example's tokens changes nothing that it drops.
    shorter = dropped(kind, keys(11), x[:1, :4], **options)
    np.testing.assert_allclose(shorter[:, 0], three[:, 0, :4], rtol=1e-5, atol=1e-5)
    assert np.abs(dropped(kind, keys(21, 12, 13), x, **options)[:, 0] - three[:, 0]).max() > 0.1
    graphdef, params = adapted(kind)
    assert np.abs(np.asarray(parameters.merge(graphdef, params)(x)) - three).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "options"), [("lora", {"dropout": 0.4}), ("lora", {"rank_dropout": 0.4}), ("loha", {"rank_dropout": 0.4})]
)
def test_the_mean_over_dropout_is_what_is_without(kind, options):
    x = jnp.tile(jnp.asarray(normal(1, 1, WIDTH_IN, seed=1)), (4000, 1, 1))
    out = dropped(kind, keys(*range(4000)), x, **options)
    graphdef, params = adapted(kind)
    expected = np.asarray(parameters.merge(graphdef, params)(x[:1]))
    error = np.abs(out.mean(1, keepdims=True) - expected)
    # Four standard errors of each mean, of which there are a hundred.
    assert np.all(error < 4.5 * out.std(1, keepdims=True) / np.sqrt(4000) + 1e-4)
    layers = [out[n].reshape(4000, -1) for n in range(LAYERS)]
    assert np.corrcoef(layers[0][:, 0], layers[1][:, 0])[0, 1] < 0.1  # each layer drops its own


def test_a_lokr_leaves_whole_outputs_out_and_enlarges_none():
    graphdef, params = adapted("lokr")
    x = jnp.asarray(normal(2, 5, WIDTH_IN, seed=1))
    out = dropped("lokr", keys(1, 2), x, rank_dropout=0.5)
    full = np.asarray(parameters.merge(graphdef, params)(x))
    bare = np.asarray(
        jnp.einsum("bli,nio->nblo", x, params["blocks.one.kernel"]) + params["blocks.one.bias"][:, None, None]
    )
    whole = np.isclose(out, full, atol=1e-4).all(axis=2)
    none = np.isclose(out, bare, atol=1e-4).all(axis=2)
    assert np.all(whole ^ none)
    assert 0.3 < none.mean() < 0.7
    assert np.any(none[0, 0] != none[0, 1])
