"""float16: gradients as in float32 at thousands of tokens, and the loss scale that PyTorch would have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.adapters import modules
from anima_jax.diffusion.randomness import split_ids
from anima_jax.models import parameters
from anima_jax.models.attention import attention
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig, Text
from anima_jax.training import loss_scale
from anima_jax.training.loss_scale import LossScale
from anima_jax.training.step import StepConfig, TrainBatch, apply_gradients, init_state, loss_and_gradients
from tests.models.networks import quick_jit, random_params

CONFIG = DiTConfig(32, 1, 1, 64, 16, 4, adapter=LLMAdapterConfig(16, 1, 2, 32, 24, 16, 30))
SIDE = 64  # patches: 4,096 tokens, an image of 1024²


def network(kind):
    """Return graphdef, trained and frozen parameters of a network whose parameters are all random."""

    def build(rngs):
        model = AnimaDiT(CONFIG, rngs=rngs)
        if kind:
            targets = modules.target_shapes(model)
            specs = {
                path: modules.adapter_spec(kind, shape, [4] * shape[0])
                for path, shape in targets.items()
                if path.startswith("blocks.")
            }
            modules.attach(model, specs)
        return model

    graphdef, shapes = parameters.abstract(build)
    params = random_params(shapes)
    for path, value in params.items():
        if modules.is_factor(path):
            params[path] = 0.2 * value  # about as large as a trained adapter's
    if not kind:
        return graphdef, params, {}
    trained = {path: value for path, value in params.items() if modules.is_factor(path)}
    return graphdef, trained, {path: value for path, value in params.items() if path not in trained}


def batch(weight):
    rng = np.random.default_rng(0)
    text = Text(
        rng.normal(size=(1, 8, 24)).astype(np.float32),
        np.ones((1, 8), np.int32),
        rng.integers(0, 30, (1, 8)).astype(np.int32),
        np.ones((1, 8), np.int32),
    )
    latents = rng.normal(size=(1, SIDE**2, 64)).astype(np.float32)
    mask = jnp.full((1, SIDE**2, 4), weight, jnp.float32)
    return TrainBatch(latents, np.array([[1, SIDE, SIDE]]), split_ids(np.array([5])), np.zeros(1, "i4"), text, mask)


@pytest.mark.parametrize("kind", [None, "loha"])
def test_gradients_in_float16_are_those_of_float32_at_a_loss_of_a_fifth_and_4096_tokens(kind):
    graphdef, trained, frozen = network(kind)

    def run(dtype, weight):
        config = StepConfig(compute_dtype=jnp.dtype(dtype), seed=3)
        function = functools.partial(loss_and_gradients, graphdef=graphdef, config=config)
        own = parameters.cast_to_compute(frozen, dtype)
        return quick_jit(lambda params, batch: function(params, own, batch, None))(trained, batch(weight))

    loss, gradients = run("float32", 1.0)
    weight = 0.2 / float(loss)
    loss, found = run("float16", weight)
    assert float(loss) == pytest.approx(0.2, rel=1e-3)
    for path, gradient in gradients.items():
        expected, own = (np.asarray(x, np.float64) for x in (weight * gradient, found[path]))
        for layer in np.ndindex(gradient.shape[:1] if gradient.ndim > 2 else ()):
            norms = np.linalg.norm(expected[layer]), np.linalg.norm(own[layer])
            assert norms[1] == pytest.approx(norms[0], rel=0.02), (path, layer)
            assert np.sum(expected[layer] * own[layer]) > 0.999 * norms[0] * norms[1], (path, layer)


def test_attentions_gradients_in_float16_do_not_vanish_without_any_loss_scale():
    """With equal weights of 1 / 4096 and gradients of 1e-4, products are near float16's smallest number, 6e-8."""
    q, k, v, grad = (
        jnp.asarray(np.random.default_rng(n).normal(size=(1, 4096 if n else 16, 1, 8)), jnp.float16) for n in range(4)
    )

    @functools.partial(quick_jit, static_argnames="dtype")
    def gradients(dtype):
        back = jax.vjp(lambda *x: attention(*x, implementation="xla"), *(x.astype(dtype) for x in (q, k, v)))[1]
        return back(1e-4 * grad[:, :16].astype(dtype))

    for name, own, expected in zip("qkv", gradients(jnp.float16), gradients(jnp.float32), strict=True):
        # What is left is the rounding of the results themselves, to steps of 6e-8.
        np.testing.assert_allclose(own.astype(jnp.float32), expected, rtol=2e-2, atol=4e-8, err_msg=name)


def test_the_scale_follows_pytorchs(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.0)
    own = loss_scale.initial(jnp.float16)
    assert own is not None
    assert scaler.get_scale() == float(own.scale) == 2.0**16
    scales = []
    for finite in np.random.default_rng(0).uniform(size=40) < 0.8:
        scaler.scale(weight.sum()).backward()
        weight.grad = torch.ones(1) if finite else torch.full((1,), torch.inf)
        scaler.step(optimizer)
        scaler.update()
        own = loss_scale.adjusted(own, jnp.float32(0.2), jnp.asarray(finite))
        scales.append((float(own.scale), scaler.get_scale()))
    assert [a for a, _ in scales] == [b for _, b in scales]
    assert len({a for a, _ in scales}) > 3


@pytest.mark.parametrize(
    ("loss", "gradient", "scale", "expected"),
    [
        (1.0, 1.0, 8.0, (8.0, 0, 0)),
        (1.0, np.inf, 8.0, (4.0, 0, 1)),
        (np.nan, np.nan, 8.0, (8.0, 1, 1)),
        (1.0, np.nan, 1.0, (1.0, 1, 1)),
    ],
    ids=["applied", "too large a scale", "a loss of NaN", "the smallest scale"],
)
def test_only_what_the_scale_cannot_mend_counts_towards_the_end_of_the_run(loss, gradient, scale, expected):
    config = StepConfig(compute_dtype=jnp.float16)
    params, optimizer = {"a": jnp.ones(3)}, optax.sgd(1.0)
    state = init_state(params, optimizer, config)._replace(loss_scale=LossScale(jnp.float32(scale), jnp.int32(0)))
    new, metrics = apply_gradients(
        state, jnp.float32(loss), {"a": jnp.full(3, gradient)}, optimizer=optimizer, config=config
    )
    assert (float(new.loss_scale.scale), int(new.skipped), int(new.total_skipped)) == expected
    assert float(metrics.loss_scale) == scale
    assert bool(np.all(new.params["a"] == 1.0)) == (expected[2] == 1)
    assert init_state(params, optimizer, StepConfig()).loss_scale is None
