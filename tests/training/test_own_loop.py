"""Training in Python: the page that shows it, the data set, and the step on any mesh."""

import contextlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import anima_jax
from anima_jax.adapters.on_model import add_adapter, load_adapter, save_adapter
from anima_jax.checkpoints.models import save_dit
from anima_jax.diffusion.objective import TimeDistribution
from anima_jax.diffusion.randomness import Purpose, example_keys, normal, uniform
from anima_jax.errors import UserError
from anima_jax.models.dit import CONTEXT_ROWS
from anima_jax.models.parameters import merge, split
from anima_jax.training.own_loop import ArrayDataset, make_train_step, trained_model
from tests.small_run import ASSETS, write_transformer

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PAGE = (pathlib.Path(anima_jax.__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Files under the names that the page gives, of small networks."""
    root = tmp_path_factory.mktemp("files")
    for name in ("diffusion_models", "vae", "text_encoders"):
        (root / name).mkdir()
    write_transformer(root / "diffusion_models" / "anima-base-v1.0.safetensors")
    (root / "vae" / "qwen_image_vae.safetensors").symlink_to(ASSETS / "tiny_vae.safetensors")
    (root / "text_encoders" / "qwen_3_06b_base.safetensors").symlink_to(ASSETS / "tiny_qwen3.safetensors")
    return root


@pytest.fixture(scope="module")
def networks(folder):
    return {
        "vae": anima_jax.load_vae(folder / "vae" / "qwen_image_vae.safetensors"),
        "text_encoder": anima_jax.load_text_encoder(folder / "text_encoders" / "qwen_3_06b_base.safetensors"),
        "tokenizers": anima_jax.load_tokenizers(ASSETS / "tokenizers"),
    }


@pytest.fixture(scope="module")
def dit(folder):
    return anima_jax.load_dit(folder / "diffusion_models" / "anima-base-v1.0.safetensors")


@pytest.fixture(scope="module")
def data(networks):
    images = [np.full((32, 48, 3), level, np.uint8) for level in (0, 100, 200)]
    return ArrayDataset.from_images(images, ["a", "b", "c"], **networks, dtype=jnp.float32)


def test_the_page_runs_as_it_is_written(folder, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    for old, new in (
        ("hf://circlestone-labs/Anima/split_files/", f"{folder}/"),
        ("load_tokenizers()", f"load_tokenizers({str(ASSETS / 'tokenizers')!r})"),
        ("steps=200", "steps=40"),
        ("bfloat16", "float32"),
        ("1e-4", "1e-2"),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/python.md", "exec"), {})
    losses = [float(value) for value in re.findall(r"loss (\S+),", capsys.readouterr().out)]
    assert losses[-1] < 0.9 * losses[0]
    assert Image.open("grey.png").size == (64, 64)
    assert len(code.splitlines()) < 50


def randomised(dit, model, seed=0):
    """The model with other numbers in the layers that its adapter changes."""
    rng, graphdef, params = np.random.default_rng(seed), *split(model)
    for path in params.keys() - split(dit)[1].keys():
        stack, _, name = path.rpartition(".")
        if name != "lora_scale":
            used = np.asarray(params[f"{stack}.lora_scale"]) > 0
            value = np.array(params[path])
            value[used] += rng.standard_normal(value[used].shape, np.float32)
            params[path] = jnp.asarray(value)
    return merge(graphdef, params)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_an_adapter_is_the_same_after_its_file(dit, tmp_path, kind):
    targets = {"target_modules": ["self_attn"], "exclude_modules": [r"blocks\.0"]}
    changed = randomised(dit, add_adapter(dit, kind, rank=3, alpha=2.0, **targets))
    save_adapter(tmp_path / "a.safetensors", changed)
    found, expected = (split(model)[1] for model in (load_adapter(dit, tmp_path / "a.safetensors"), changed))
    assert found.keys() == expected.keys() > split(dit)[1].keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_model_with_an_adapter_is_refused_where_one_without_is_needed(dit, tmp_path):
    adapted = add_adapter(dit, rank=2)
    with pytest.raises(UserError, match="has an adapter, which save_adapter writes"):
        save_dit(tmp_path / "x.safetensors", adapted)
    with pytest.raises(UserError, match="already has an adapter"):
        add_adapter(adapted)
    with pytest.raises(UserError, match="has no adapter to write; save_dit writes the transformer"):
        save_adapter(tmp_path / "x.safetensors", dit)
    with pytest.raises(UserError, match=r"dialect 'kohy', expected one of .* \(did you mean 'kohya'\?\)"):
        save_adapter(tmp_path / "x.safetensors", adapted, dialect="kohy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lore"}, r"adapter 'lore', expected one of lora, .* \(did you mean 'lora'\?\)"),
        ({"rank": 0}, "an adapter of rank 0"),
        ({"alpha": float("nan")}, "an adapter of rank 16 and alpha nan"),
        ({"target_modules": ["self_atn"]}, r"'self_atn' fits none of the 32 modules, such as blocks\.0"),
        ({"exclude_modules": ["blocks"]}, "exclude_modules leaves no module"),
        ({"rnk": 3}, r"add_adapter has no setting 'rnk' \(did you mean 'rank'\?\)"),
    ],
)
def test_arguments_of_a_new_adapter(dit, arguments, message):
    with pytest.raises(UserError, match=message):
        add_adapter(dit, **arguments)


def test_the_transformers_file_is_the_same_again(dit, tmp_path):
    save_dit(tmp_path / "x.safetensors", dit)
    found, expected = split(anima_jax.load_dit(tmp_path / "x.safetensors"))[1], split(dit)[1]
    assert all(np.array_equal(found[path], value) for path, value in expected.items())


def test_batches_have_every_example_once_an_epoch_in_an_order_of_the_seed(data):
    def rows(**options):
        return [batch.ids_b2[:, 1].tolist() for batch in data.batches(2, **options)]

    found = rows(steps=6)
    assert [sorted(np.ravel(found)[start : start + 3].tolist()) for start in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert rows(steps=6) == found != rows(steps=6, seed=1)
    epochs = [batch.epochs_b.tolist() for batch in data.batches(2, steps=3)]
    assert epochs == [[0, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            np.zeros((32, 40, 3), np.uint8),
            r"expected \(y, x, 3\) with sides of multiples of 16",
        ),
        (np.zeros((32, 32), np.uint8), r"image 0: shape \(32, 32\), expected"),
        (np.zeros((0, 32, 3), np.uint8), r"image 0: shape \(0, 32, 3\), expected"),
        (np.zeros((2, 32, 32, 3), np.uint8), "image 0 has 2 frames, expected"),
        (np.zeros((32, 32, 3), np.int64), "image 0: int64, expected uint8, or floating-point"),
        (np.full((32, 32, 3), np.nan), r"image 0: float64, expected uint8, or floating-point numbers in \[0, 1\]"),
        (np.full((32, 32, 3), 255.0), "image 0: float64, expected"),
    ],
)
def test_images_of_another_form_are_refused(networks, image, message):
    with pytest.raises(UserError, match=message):
        ArrayDataset.from_images([image], ["x"], **networks)
    with pytest.raises(UserError, match="0 images and 1 captions, expected as many"):
        ArrayDataset.from_images([], ["x"], **networks)


def test_references_are_further_frames_of_an_example(networks):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 48, 3), np.uint8) for _ in range(5)]
    alone = ArrayDataset.from_images(pictures, "abcde", **networks, dtype=jnp.float32)
    tokens = {int(b.ids_b2[0, 1]): b.latents_blc[0] for b in alone.batches(1, steps=5)}
    references = [pictures[2:3], pictures[3:5]]
    edits = ArrayDataset.from_images(pictures[:2], "ab", references=references, **networks, dtype=jnp.float32)
    (batch,) = edits.batches(2, steps=1)
    for row, example in enumerate(batch.ids_b2[:, 1].tolist()):
        frames = [[0, 2], [1, 3, 4]][example]
        assert batch.grid_b3[row].tolist() == [len(frames), 2, 3]
        expected = np.concatenate([tokens[frame] for frame in frames])
        np.testing.assert_allclose(batch.latents_blc[row, : len(expected)], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"image 0: references .* expected pictures of one size"):
        ArrayDataset.from_images(pictures[:1], "a", references=[[np.zeros((32, 32, 3), np.uint8)]], **networks)
    with pytest.raises(UserError, match="2 images and 2 captions and references of 1, expected as many"):
        ArrayDataset.from_images(pictures[:2], "ab", references=[[]], **networks)


@pytest.fixture(scope="module")
def pictures():
    return list(np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8))


def test_a_control_network_is_trained_and_saved(dit, networks, pictures, tmp_path):
    """A step of SGD changes the network alone, by a gradient that depends on the control pictures."""
    steered = anima_jax.add_control(dit, trunk_width=16, embedding_width=8, mlp_width=8, layers=("mlp_layer1",))
    state, step = make_train_step(steered, optax.sgd(0.1), dtype=jnp.float32)
    assert state.params.keys() == split(steered)[1].keys() - split(dit)[1].keys()
    after = []
    for control in pictures[2:4]:
        data = ArrayDataset.from_images(pictures[:1], "a", controls=[control], **networks, dtype=jnp.float32)
        for batch in data.batches(1, steps=1):
            np.testing.assert_array_equal(batch.control_blp[0, 4].reshape(16, 16, 3), control[16:, 16:32])
            found, metrics = step(jax.tree.map(jnp.copy, state), batch)
            after.append((float(metrics.loss), trained_model(steered, found)))
    assert after[0][0] == after[1][0]
    ups = [np.asarray(model.control.blocks.mlp_layer1.up.kernel) for _, model in after]
    assert not np.allclose(*ups, rtol=0.01, atol=0)
    anima_jax.save_control(tmp_path / "c.safetensors", after[0][1].control)
    again = anima_jax.add_control(dit, anima_jax.load_control(tmp_path / "c.safetensors", blocks=2))
    for path, value in split(after[0][1])[1].items():
        np.testing.assert_array_equal(split(again)[1][path], value, err_msg=path)


def test_controls_that_do_not_fit_are_refused(dit, networks, pictures, data):
    def dataset(controls, images=pictures[:1], **more):
        return ArrayDataset.from_images(images, ["a"] * len(images), controls=controls, **more, **networks)

    masked = [np.concatenate([pictures[0], pictures[1][..., :1]], -1)]
    for make, message in (
        (lambda: dataset([]), "1 images and 0 controls, expected as many"),
        (lambda: dataset([pictures[0][:16]]), r"control 0: \(1, 16, 48, 3\) of an image .* expected one of its size"),
        (lambda: dataset([pictures[0][..., :2]]), r"control 0: shape .* expected \(y, x, 3\) or \(y, x, 4\) with"),
        (
            lambda: dataset([pictures[0], *masked], pictures[:2]),
            r"example 1: control patches .* expected uint8 \(6, 768",
        ),
        (lambda: dataset(pictures[:1], references=[pictures[1:2]]), "example 0: a control picture of 2 frames"),
        (lambda: anima_jax.add_control(dit, chanels=4), r"no setting 'chanels' \(did you mean 'channels'\?\)"),
        (lambda: anima_jax.add_control(dit, layers=("q",)), "add_control: no control modules at q, expected some of"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    steered = anima_jax.add_control(dit)
    with pytest.raises(UserError, match="edit True, expected False: a control network works on"):
        make_train_step(steered, optax.sgd(0.1), edit=True)
    for model, batches, message in ((steered, data, "of 0 channels, expected 3"), (dit, dataset(masked), "of 4 .* 0:")):
        state, step = make_train_step(model, optax.sgd(0.1))
        with pytest.raises(UserError, match=message):
            step(state, next(batches.batches(1)))


def test_an_edits_references_are_clean_and_not_scored(dit, networks, pictures):
    """The loss, written out."""
    adapted = add_adapter(dit, rank=2, target_modules=["mlp"])
    references = [pictures[1:2]]
    edits = ArrayDataset.from_images(pictures[:1], "a", references=references, **networks, dtype=jnp.float32)
    (batch,) = edits.batches(1, steps=1)
    state, step = make_train_step(adapted, optax.sgd(0.0), dtype=jnp.float32, edit=True, seed=3)
    _, metrics = step(state, batch)

    @jax.jit
    def written_out(x0):
        noise, level = (example_keys(3, batch.epochs_b, batch.ids_b2, what) for what in (Purpose.NOISE, Purpose.TIME))
        noise, t = normal(noise, x0.shape[1:]), TimeDistribution().times(uniform(level), batch.grid_b3)
        noisy = jnp.concatenate([(1 - t) * x0[:, :6] + t * noise[:, :6], x0[:, 6:]], 1)
        text = batch.text
        context = dit.llm_adapter(text.source_bnd, text.target_ids_bm, text.source_mask_bn, text.target_mask_bm)
        rows = CONTEXT_ROWS - context.shape[1]
        velocity = dit.velocity(noisy, batch.grid_b3, t, context, zero_context=rows)
        return jnp.mean((velocity - (noise - x0))[:, :6] ** 2)

    assert float(metrics.loss) == pytest.approx(float(written_out(batch.latents_blc)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": "logitnormal"}, "times: time distribution 'logitnormal', expected one of"),
        ({"shift": 0.0}, "shift 0.0, expected a number above 0"),
        ({"ema_decay": 1.5}, "ema_decay 1.5, expected a number between 0 and 1"),
        ({"remat": "ful"}, "remat ful, expected one of full"),
        ({"sift": 3.0}, r"make_train_step has no setting 'sift' \(did you mean 'shift'\?\)"),
    ],
)
def test_settings_of_the_step(dit, settings, message):
    with pytest.raises(UserError, match=message):
        make_train_step(dit, optax.sgd(0.1), **settings)


@pytest.mark.slow
def test_the_step_is_the_same_on_another_mesh_and_leaves_the_callers_model_alone(dit, data):
    """One step of SGD, so that a sum in another order cannot grow; an average is made on the way."""
    adapted = add_adapter(dit, rank=2)
    before = {path: np.array(value) for path, value in split(adapted)[1].items()}
    (batch,) = data.batches(2, steps=1)
    meshes = [None, jax.make_mesh((1, 1), ("tensor", "x"))]
    found = []
    for mesh in meshes:
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            state, step = make_train_step(adapted, optax.sgd(1.0), dtype=jnp.float32, ema_decay=0.5)
            state, metrics = step(state, batch)
            found.append((float(metrics.loss), trained_model(adapted, state, ema=True)))
    assert len({loss for loss, _ in found}) == 1
    after = [split(model)[1] for _, model in found]
    for path, value in split(adapted)[1].items():
        np.testing.assert_array_equal(value, before[path])
        assert all(np.array_equal(each[path], after[0][path]) for each in after)
    assert not np.array_equal(after[0]["blocks.mlp.layer1.lora_b"], before["blocks.mlp.layer1.lora_b"])
