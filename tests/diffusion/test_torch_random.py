"""torch's CPU noise stream, as recorded from torch."""

import numpy as np
import pytest

from anima_jax.diffusion.torch_random import randn
from tests.golden_files import golden

DATA = golden("torch_cpu_randn")


@pytest.mark.parametrize("key", DATA)
def test_noise_is_torchs(key):
    seed, _, shape = key.partition("|")
    # 1e-6: torch's vectorised sine, cosine and logarithm differ from numpy's in the last bits.
    noise = randn(tuple(map(int, shape.split("x"))), int(seed))
    np.testing.assert_allclose(noise, DATA[key], atol=1e-6)
