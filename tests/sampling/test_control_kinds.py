"""Control pictures that are made of ordinary ones while drawing: `Control(…, kind=…)` and `--control_from`."""

import numpy as np
import pytest
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.generate import main
from anima_jax.sampling.controls import Control, with_kinds
from tests.golden_files import golden


@pytest.fixture(scope="module")
def reference():
    return golden("control_pictures")


def test_the_network_sees_opencvs_edges_of_the_picture(reference):
    picture = Image.fromarray(reference["picture"])
    seen = Control("net.safetensors", picture, kind="canny:50:150").pixels(picture.size, 3)
    edges = np.unpackbits(reference["canny of picture|50|150"], axis=1)
    assert np.array_equal(seen, np.repeat(2.0 * edges[..., None] - 1.0, 3, axis=2))


def test_each_size_has_edges_of_its_own_width():
    picture = Image.new("RGB", (100, 100))
    picture.paste("white", (50, 0, 100, 100))
    control = Control("net.safetensors", picture, kind="canny")
    for side in (32, 160):
        edge_x = np.flatnonzero(control.pixels((side, side), 3)[side // 2, :, 0] > 0)
        assert len(edge_x) == 1
        assert abs(edge_x[0] - (side / 2 - 0.5)) <= 1


def test_the_kind_mask_is_for_inpainting_networks_alone():
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    picture.paste((255, 0, 0, 0), (0, 0, 16, 32))
    control = Control("net.safetensors", picture, kind="mask")
    pixels = control.pixels((32, 32), 4)
    assert np.array_equal(pixels[0, :, 3], [1.0] * 16 + [-1.0] * 16)
    assert np.array_equal(pixels[..., :3], np.broadcast_to(np.float32([1, -1, -1]), (32, 32, 3)))
    with pytest.raises(UserError, match=r"net\.safetensors: takes no mask"):
        control.pixels((32, 32), 3)
    with pytest.raises(UserError, match="has no transparency"):
        Control("net.safetensors", picture.convert("RGB"), kind="mask").pixels((32, 32), 4)


def test_one_kind_is_for_all_networks_and_several_are_for_one_each():
    controls = [Control("a.safetensors", "a.png"), Control("b.safetensors", "b.png", kind="grey")]

    def kinds(*given):
        return [control.kind for control in with_kinds(controls, given)]

    assert kinds() == [None, "grey"]
    assert kinds("canny:100:150") == ["canny:high=150"] * 2
    assert kinds("tile:4", "none") == ["tile:factor=4", None]
    assert Control("a.safetensors", Image.new("RGB", (8, 8)), kind="tile:4").stored(None).kind == "tile:4"
    with pytest.raises(UserError, match="3 values of --control_from for 2 control networks"):
        kinds("canny", "grey", "none")
    with pytest.raises(UserError, match="none:1: none has no options"):
        kinds("none:1")
    with pytest.raises(UserError, match="there is no control network; give one with --control"):
        with_kinds([], ["canny"])


def test_an_unknown_kind_is_one_line_before_any_file_is_opened(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    control = ["--control", f"{tmp_path}/absent.safetensors={tmp_path}/cat.png", "--control_from", "cany"]
    with pytest.raises(SystemExit) as stopped:
        main(["--prompt", "a cat", "-o", str(tmp_path / "out.png"), *control])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    kinds = "canny, grey, scribble, tile, mask, none"
    assert line == f"error: 'cany' (did you mean 'canny'?) is no control picture, expected {kinds}"
