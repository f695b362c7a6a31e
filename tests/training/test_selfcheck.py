"""What the self-check accepts and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.errors import UserError
from anima_jax.training.selfcheck import GroupNorms, group_norms, norms_table, self_check

RATES = {"llm_adapter": 1e-4, "mlp": 1e-3, "base": 1e-3}
WELL = {"llm_adapter": 0.3, "mlp": 2.0, "base": 1.0}


def check(gradient=WELL, update=WELL, rates=RATES, *, step=1, loss=1.0, adapter=False):
    return self_check(GroupNorms(gradient, update), rates, step=step, attempt=step, loss=loss, adapter=adapter)


def test_a_groups_norm_is_that_of_all_its_parameters():
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=shape).astype("f4") for path, shape in {"a": 3, "b": (2, 4), "c": 5}.items()}
    norms = group_norms({path: jnp.asarray(value) for path, value in values.items()}, {"a": "x", "b": "x", "c": "y"})
    together = np.concatenate([values["a"], values["b"].ravel()])
    assert norms.keys() == {"x", "y"}
    np.testing.assert_allclose([norms["x"], norms["y"]], [np.linalg.norm(together), np.linalg.norm(values["c"])], 1e-6)


def test_groups_that_learn_pass():
    assert check()


@pytest.mark.parametrize("gradient", [WELL | {"llm_adapter": 0.0}, {"mlp": 2.0, "base": 1.0}])
def test_a_group_without_gradient_is_an_error_in_the_second_step(gradient):
    assert not check(gradient)
    with pytest.raises(UserError, match=r"group llm_adapter should learn, but had no .* in step 2"):
        check(gradient, step=2)


def test_a_frozen_group_that_moved_is_an_error():
    with pytest.raises(UserError, match="group mlp should be frozen"):
        check(rates=RATES | {"mlp": 0.0})
    assert check({"llm_adapter": 0.3, "base": 1.0}, {"llm_adapter": 0.1, "base": 0.1}, RATES | {"mlp": 0.0})


def test_an_adapter_has_no_parameters_in_the_group_base():
    norms = {"llm_adapter": 0.3, "mlp": 2.0}
    assert check(norms, norms, adapter=True)
    with pytest.raises(UserError, match="group base"):
        check(norms, norms, step=2)


@pytest.mark.parametrize(("gradient", "loss"), [({**WELL, "mlp": float("nan")}, 1.0), ({**WELL, "mlp": 0.0}, 0.0)])
def test_a_step_without_a_finite_loss_proves_nothing(gradient, loss):
    assert not check(gradient, loss=loss, step=2)


def test_the_table_has_both_norms_of_every_group():
    lines = norms_table(GroupNorms(WELL, {**WELL, "mlp": 0.125})).splitlines()
    assert len(lines) == 1 + len(WELL)
    assert any(line.split() == ["mlp", "2.000e+00", "1.250e-01"] for line in lines)
