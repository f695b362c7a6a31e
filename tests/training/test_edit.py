"""A step with reference pictures: diffusers' transformer on latents joined by hand, in plain torch, is the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.diffusion import objective
from anima_jax.diffusion.objective import Loss
from anima_jax.models import parameters
from anima_jax.models.dit import CONTEXT_ROWS, AnimaDiT, DiTConfig, patchify
from anima_jax.models.llm_adapter import LLMAdapterConfig, Text
from anima_jax.training.step import StepConfig, TrainBatch, example_losses
from tests.golden_files import GRADIENT_TOLERANCE, VALUE_TOLERANCE, channel_last, relative_error
from tests.models import dit_peer
from tests.models.networks import normal, quick_jit, random_params, randomise

CONFIG = DiTConfig(60, 2, 3, 120, 16, 12, adapter=LLMAdapterConfig(16, 1, 2, 32, 12, 16, 30))
GRIDS = ((2, 3, 4), (3, 2, 4), (1, 5, 3))
"""One reference, two, none: frames, rows and columns of patches."""
TOKENS = 32
TIMES = np.array([0.3, 0.8, 0.55], np.float32)
EDIT = StepConfig(compute_dtype=jnp.float32, edit=True, loss=Loss("mse", 0.0, 0.5))


def latents(seed: int, frames: int = 0) -> list[np.ndarray]:
    """Values for each example, (1, c, t, y, x); all frames, or the first `frames`."""
    return [normal(1, 16, frames or t, 2 * y, 2 * x, seed=seed + i) for i, (t, y, x) in enumerate(GRIDS)]


def tokens(examples: list[np.ndarray], filler: float) -> np.ndarray:
    """The examples as one batch of tokens; what follows each must not count, whatever it is."""
    padded = np.full((len(examples), TOKENS, 4 * examples[0].shape[1]), filler, np.float32)
    for row, example in zip(padded, examples, strict=True):
        own = patchify(jnp.asarray(channel_last(example)))[0]
        row[: len(own)] = own
    return padded


def batch(mask_blp: np.ndarray) -> TrainBatch:
    text = Text(
        normal(3, 5, 12, seed=7), np.ones((3, 5), np.int32), np.arange(12).reshape(3, 4), np.ones((3, 4), np.int32)
    )
    unused = np.zeros((3, 2), np.uint32), np.zeros(3, np.int32)
    return TrainBatch(tokens(latents(10), 0.0), np.array(GRIDS, np.int32), *unused, text, mask_blp)


def torch_losses(peer, context_bnd: np.ndarray, masks: list[np.ndarray]):
    """The loss of each example, of torch tensors, written out for (1, c, y, x)."""
    import torch

    losses = []
    joined = zip(latents(10), latents(20, 1), TIMES.tolist(), torch.from_numpy(context_bnd), masks, strict=True)
    for clean, drawn, t, context, mask in joined:
        x0, noise = torch.from_numpy(clean[:, :, :1]), torch.from_numpy(drawn)
        noisy = torch.cat([(1 - t) * x0 + t * noise, torch.from_numpy(clean[:, :, 1:])], dim=2)
        velocity = dit_peer.velocity_tensor(peer, noisy, torch.tensor([t]), context[None])[:, :, 0]
        error = velocity - (noise - x0)[:, :, 0]
        pooled = torch.nn.functional.avg_pool2d(error, 2)
        losses.append(((error**2 * torch.from_numpy(mask)).mean() + 0.5 * (pooled**2).mean()) / 1.5)
    return torch.stack(losses)


def test_loss_and_gradients_of_a_mixed_batch_equal_torchs_on_joined_latents(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.setattr(objective, "MULTISCALE_MIN_SIDE", 0.0)
    bare = dataclasses.replace(CONFIG, adapter=None)
    peer = randomise(dit_peer.transformer(bare)).requires_grad_(True)
    graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    params = random_params(shapes) | dit_peer.our_params(peer, bare)
    masks = [np.abs(normal(1, 1, 1, 2 * y, 2 * x, seed=40 + y)) for _, y, x in GRIDS]
    data = batch(tokens(masks, 9.0))
    noise_blc = tokens(latents(20, 1), 5.0)  # whatever noise the references have must not be used

    @quick_jit
    def ours(params):
        def loss_of(params):
            losses_b = example_losses(parameters.merge(graphdef, params), data, noise_blc, TIMES, EDIT)
            return jnp.mean(losses_b), losses_b

        model = parameters.merge(graphdef, params)
        context_bnd = model.llm_adapter(data.text.source_bnd, data.text.target_ids_bm)
        return *jax.value_and_grad(loss_of, has_aux=True)(params), context_bnd

    (_, losses_b), grads, context_bnd = ours(params)
    rows_bnd = np.pad(context_bnd, [(0, 0), (0, CONTEXT_ROWS - context_bnd.shape[1]), (0, 0)])
    expected = torch_losses(peer, rows_bnd, masks)
    assert relative_error(losses_b, expected.detach().numpy()) < VALUE_TOLERANCE
    expected.mean().backward()
    state = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in peer.named_parameters()}
    for path, grad in dit_peer.our_arrays(state, bare).items():
        assert relative_error(grads[path], grad) < GRADIENT_TOLERANCE, path
