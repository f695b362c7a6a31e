"""The engine: images against those of the pipeline and of other company, and orders that fail or are cancelled."""

import contextlib
import copy
import itertools
import threading
from concurrent.futures import CancelledError

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from anima_jax import AnimaPipeline, UserError
from anima_jax.errors import NotFiniteError
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving import pools
from anima_jax.serving.engine import Engine
from anima_jax.serving.orders import Order
from anima_jax.serving.preparation import draws_alone
from anima_jax.serving.tickets import DrawingError, EngineClosedError, EngineFullError
from anima_jax.serving.warm_up import warm_up
from tests.compilation import quick_compilation
from tests.golden_files import relative_error
from tests.small_run import ASSETS, write_transformer

WAIT = 600
"""Seconds after which something is wrong, however busy the machine is."""

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8))
MASK = Image.new("L", (32, 48))
MASK.paste(255, (8, 16, 24, 40))
VARIANTS = {"cfg_zero_star": True, "rescale_cfg": 0.5, "cfg_norm": 1.0, "apg": True, "apg_momentum": -0.5}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "base.safetensors"
    write_transformer(path)
    tiny = {name: ASSETS / f"tiny_{file}.safetensors" for name, file in (("vae", "vae"), ("text_encoder", "qwen3"))}
    return AnimaPipeline.load(transformer=path, tokenizers=ASSETS / "tokenizers", dtype=jnp.float32, **tiny)


@pytest.fixture(scope="module")
def engine(pipeline):
    engine = Engine(pipeline, slots=3)
    yield engine
    engine.close()


def order(prompt="x", width=32, height=48, seed=5, batch=(1, 0), image=None, mask=None, preview_every=0, **params):
    params = SamplingParams(**{"steps": 3, "sampler": "euler", **params})
    return Order(
        ImageRequest(prompt, width, height, seed, *batch), params, image=image, mask=mask, preview_every=preview_every
    )


MIXED = [
    order(steps=6, sampler="er_sde"),
    order("a red square", 40, 32, guidance_scale=1.0),
    order("a blue cross", 24, 40, 2**40 + 7, steps=4, sampler="euler_ancestral", noise="jax"),
    order(sampler="heun", guidance_interval=(0.3, 0.8), batch=(4, 2)),
    order(steps=7, sampler="sa_solver", image=IMAGE, mask=MASK, **VARIANTS),
    order(steps=5, sampler="dpmpp_2m", denoise=0.7, image=IMAGE),
    order(steps=4, sampler="ddim", image=IMAGE, mask=MASK),
    order("a (red:1.3) cross", steps=18, sampler="euler_cfg_pp", guidance_scale=1.0),
    order(sampler="dpmpp_sde", noise="torch-cuda"),
    order(sampler="er_sde", steps=6, end_at_step=3, return_with_leftover_noise=True),
]
"""Orders of one pool with as little in common as the parameters allow."""


@pytest.fixture
def latents(pipeline, monkeypatch):
    """The latents of finished images, by the identity of their parameters."""
    found = {}
    finish = pipeline.finish

    def recorded(latents, params, **options):
        found[id(params)] = latents[0]
        return finish(latents, params, **options)

    monkeypatch.setattr(pipeline, "finish", recorded)
    return found


def drawn(engine, orders, latents):
    """Return the latents of orders that are submitted together."""
    for ticket in [engine.submit(order) for order in orders]:
        ticket.result(WAIT)
    return [latents[id(order.params)] for order in orders]


def test_images_are_bit_equal_whatever_shares_their_batch_and_nothing_compiles_for_it(engine, latents):
    alone = [drawn(engine, [each], latents)[0] for each in MIXED]
    compiled = engine.statistics().compilations
    for seed in (0, 1):
        shuffled = np.random.default_rng(seed).permutation(len(MIXED))
        together = drawn(engine, [MIXED[index] for index in shuffled], latents)
        assert all(np.array_equal(alone[index], found) for index, found in zip(shuffled, together, strict=True))
    assert engine.statistics().compilations == compiled
    assert engine.statistics().pools == 1


def test_prompts_of_about_as_many_tokens_share_programs(engine):
    """Clients choose how long their prompts are: not every 512 rows may compile programs."""
    with quick_compilation():
        found = engine._prepare(order("x " * 600))  # type: ignore[reportPrivateUsage]
    assert found.key.context == found.context.rows_bnd.shape[1] == 2048
    assert found.lengths_p.tolist() == [512, 1201]


def test_images_are_those_of_the_pipeline(engine, pipeline, latents):
    """With the most carried arrays of all samplers, noise, a mask, and all variants of guidance."""
    each = next(own for own in MIXED if own.params.sampler == "sa_solver")
    (found,) = drawn(engine, [each], latents)
    with quick_compilation():
        pipeline.draw([each.request], each.params, image=each.image, mask=each.mask, callback=lambda *_: None)
    # Two programs of the same mathematics round differently, which the steps of a random network amplify.
    assert relative_error(found, latents[id(each.params)]) < 1e-4


def test_what_cannot_share_evaluations_is_drawn_beside_the_others(engine, pipeline):
    adaptive = order(sampler="dpm_adaptive", steps=2, sampler_options={"rtol": 0.5, "atol": 0.5}, preview_every=1)
    assert draws_alone(adaptive)
    assert not draws_alone(MIXED[0])
    with quick_compilation():
        tickets = [engine.submit(each) for each in (adaptive, MIXED[0])]
        found = [ticket.result(WAIT) for ticket in tickets]
        (expected,) = pipeline.draw([adaptive.request], adaptive.params)
    assert found[0] == expected
    assert tickets[0].done == tickets[0].total > 0
    most = tickets[0].total - 1
    message = f"'dpm_adaptive': not finished after {most} evaluations"
    with contextlib.closing(Engine(pipeline, max_evaluations=most)) as limited, pytest.raises(UserError, match=message):
        limited.submit(adaptive).result(WAIT)


def test_a_ticket_reports_states_evaluations_and_previews(engine):
    seen, previews, finished = [], set(), threading.Event()

    def note(ticket):
        seen.append((ticket.state, ticket.done, ticket.total))
        previews.add(ticket.preview and ticket.preview.size)
        if ticket.finished:
            finished.set()

    ticket = engine.submit(order(preview_every=1, steps=2))
    ticket.subscribe(note)
    assert ticket.result(WAIT).size == (32, 48)
    assert finished.wait(WAIT)
    states = list(dict.fromkeys(state for state, _, _ in seen))
    assert states[-2:] == ["decoding", "done"]
    assert sorted({done for _, done, _ in seen}) in ([0, 1, 2], [1, 2])
    assert ticket.position == 0
    assert previews <= {None, (32, 48)}


def test_an_image_that_is_not_finite_fails_alone(engine, latents):
    (expected,) = drawn(engine, [MIXED[0]], latents)
    hostile, other = engine.submit(order("(x:3e38)", steps=2)), engine.submit(MIXED[0])
    other.result(WAIT)
    with pytest.raises(NotFiniteError, match="evaluation 1 of 2"):
        hostile.result(WAIT)
    assert np.array_equal(latents[id(MIXED[0].params)], expected)
    # The next image in its slot starts from clean arrays.
    assert all(np.array_equal(each, expected) for each in drawn(engine, [MIXED[0]] * 3, latents))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "out of memory for 32×48 pixels; fewer slots"),
        (RuntimeError("broken\npipe"), "could not be drawn: RuntimeError: broken"),
        (UserError("not so"), "not so"),
    ],
)
def test_an_error_fails_the_orders_concerned_and_the_engine_goes_on(engine, monkeypatch, error, message):
    def fail(self):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(pools.Pool, "evaluate", fail)
        ticket = engine.submit(order())
        with pytest.raises(type(error) if isinstance(error, UserError) else DrawingError, match=message):
            ticket.result(WAIT)
    assert ticket.state == "failed"
    assert engine.submit(order()).result(WAIT).size == (32, 48)


def test_a_fault_of_the_loop_leaves_nobody_waiting(engine, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("no pools")

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "_start_waiting", fail)
        ticket = engine.submit(order())
        with pytest.raises(DrawingError, match="ZeroDivisionError: no pools"):
            ticket.result(WAIT)
    assert engine.submit(order()).result(WAIT).size == (32, 48)


def test_faults_beside_the_loop_leave_nobody_waiting(engine, pipeline, monkeypatch):
    def fail(*_):
        raise RuntimeError("lost")

    def taken_once(*arrays):
        return next(results)(*arrays)

    (pool,) = engine._ready_pools()  # type: ignore[reportPrivateUsage]
    results = itertools.chain([pool._taken], itertools.repeat(fail))  # type: ignore[reportPrivateUsage]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "not_finite", fail)
        patched.setattr(pool, "_taken", taken_once)
        # Two that end together, of which the second fails when the first has left its slot.
        tickets = [engine.submit(order("(x:3e38)", steps=2)), *(engine.submit(order(steps=9)) for _ in range(2))]
        failed = 0
        for ticket in tickets:
            try:
                ticket.result(WAIT)
            except DrawingError as error:
                failed += "lost" in str(error)
    assert failed >= 2
    assert engine.submit(order()).result(WAIT).size == (32, 48)


def test_other_parameters_are_used_for_the_orders_after_them(engine, pipeline, latents, monkeypatch):
    reached, go = threading.Event(), threading.Event()
    encode, base = AnimaPipeline.encode, pipeline.dit_params

    def slow(self, prompts):
        reached.set()
        go.wait(WAIT)
        return encode(self, prompts)

    # The same tokens in words that are not the same, so that one of them is not in the cache of prompts.
    (before,) = drawn(engine, [order("(held:1.0)")], latents)
    monkeypatch.setattr(AnimaPipeline, "encode", slow)
    cancelled = engine.submit(order("held"))
    assert reached.wait(WAIT)
    cancelled.cancel()
    changed = {path: value * 1.5 if path.startswith("llm_adapter.") else value for path, value in base.items()}
    replaced = engine.replace_params(changed)
    assert not replaced.cancel()
    replaced.result(WAIT)
    go.set()
    found = drawn(engine, [order("held"), order("(held:1.0)")], latents)
    engine.replace_params(base).result(WAIT)
    assert np.array_equal(*found)
    assert not np.array_equal(found[0], before)
    assert np.array_equal(before, *drawn(engine, [order("held")], latents))


def test_values_that_are_not_finite_are_looked_for_in_the_files_of_the_parameters_in_use(pipeline, tmp_path):
    save_file({"x": np.array([np.nan], np.float32)}, tmp_path / "broken.safetensors")
    other = copy.copy(pipeline)
    other.use_transformer(pipeline.dit_params, [tmp_path / "broken.safetensors"])
    assert ["broken" in str(one.not_finite("x")) for one in (other, pipeline)] == [True, False]


def test_pools_beyond_a_number_are_forgotten_and_made_again_without_compiling(engine, latents, monkeypatch):
    orders = [order(), order(sampler="er_sde")]
    expected = drawn(engine, orders, latents)
    monkeypatch.setattr(pools, "KEPT_POOLS", 1)
    engine._pools.clear()
    before = engine.statistics().compilations
    found = [drawn(engine, [each], latents)[0] for each in (*orders, orders[0])]
    assert (engine.statistics().pools, engine.statistics().compilations) == (1, before)
    assert all(map(np.array_equal, found, [*expected, expected[0]]))


def test_a_full_queue_refuses_and_cancelled_orders_leave_it(pipeline, engine):
    reached, go = threading.Event(), threading.Event()

    def stop(ticket):
        if ticket.done == 1:
            reached.set()
            go.wait(WAIT)

    engine._max_waiting = 1  # type: ignore[reportPrivateUsage]
    first = engine.submit(order(steps=100))
    first.subscribe(stop)
    assert reached.wait(WAIT)
    second = engine.submit(order())
    with pytest.raises(EngineFullError, match="1 order already waiting"):
        engine.submit(order())
    second.cancel()
    with pytest.raises(UserError, match="width"):
        engine.submit(order(width=33))
    third = engine.submit(order())
    first.cancel()
    go.set()
    for ticket in (first, second):
        with pytest.raises(CancelledError):
            ticket.result(WAIT)
    assert third.result(WAIT).size == (32, 48)
    engine._max_waiting = 256


def test_after_a_warm_up_the_first_image_compiles_nothing_and_the_warm_up_takes_no_place_in_the_queue(pipeline):
    with quick_compilation():
        engine = Engine(pipeline, slots=2, max_waiting=1)
        engine._max_waiting = 0
        warm_up(engine, [(32, 48)])
        engine._max_waiting = 1
        before = engine.statistics().compilations
        assert engine.submit(order(preview_every=1, sampler="er_sde")).result(WAIT).size == (32, 48)
        assert (before > 0, engine.statistics().compilations) == (True, before)
        engine.close()


def test_a_decoder_that_takes_its_time_holds_up_no_evaluation(engine, pipeline, monkeypatch):
    reached, go, finish = threading.Event(), threading.Event(), pipeline.finish

    def slow(*arguments, **options):
        reached.set()
        assert go.wait(WAIT)
        return finish(*arguments, **options)

    monkeypatch.setattr(pipeline, "finish", slow)
    first = engine.submit(order(steps=2))
    assert reached.wait(WAIT)
    others = [engine.submit(order(seed=seed, steps=4)) for seed in range(5)]  # more than there are slots
    evaluated = [threading.Event() for _ in others]
    for ticket, event in zip(others, evaluated, strict=True):
        ticket.subscribe(lambda ticket, event=event: ticket.state == "decoding" and event.set())
        if ticket.state == "decoding":
            event.set()
    assert all(event.wait(WAIT) for event in evaluated)
    assert {ticket.state for ticket in (first, *others)} == {"decoding"}
    go.set()
    assert all(ticket.result(WAIT).size == (32, 48) for ticket in (first, *others))


def test_pools_take_turns_and_none_waits_for_the_long_images_of_another(engine, monkeypatch):
    with quick_compilation():
        engine.submit(order(width=128, height=192)).result(WAIT)  # compiles the other pool's programs
    rounds, evaluate = [], pools.Pool.evaluate

    def noted(pool):
        rounds.append({drawing.ticket for drawing in pool.used})
        return evaluate(pool)

    monkeypatch.setattr(pools.Pool, "evaluate", noted)
    begun = threading.Event()
    long = [engine.submit(order(seed=seed, steps=1000)) for seed in range(4)]  # one more than there are slots
    long[0].subscribe(lambda ticket: ticket.done and begun.set())
    assert begun.wait(WAIT)
    short = [engine.submit(order(width=128, height=192, seed=seed, steps=5)) for seed in range(4)]
    for ticket in short:
        ticket.result(WAIT)
    assert [ticket.state for ticket in long] == ["drawing"] * 3 + ["waiting"]
    for ticket in short:
        first, *_, last = own = [index for index, tickets in enumerate(rounds) if ticket in tickets]
        assert own == [*range(first, last + 1, 2)]
        assert all(long[0] in rounds[index] for index in range(first + 1, last, 2))
    for ticket in long:
        ticket.cancel()


def test_a_drained_engine_takes_no_orders(pipeline):
    engine = Engine(pipeline, slots=3)
    ticket = engine.submit(order(denoise=0, image=IMAGE))
    assert engine.drain(WAIT)
    assert ticket.result(0).size == IMAGE.size
    with pytest.raises(EngineClosedError, match="no orders any more"):
        engine.submit(order())
    engine.close()
