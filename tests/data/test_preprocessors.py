"""Control pictures are those of OpenCV and of the usual annotators, and the command makes them for whole folders."""

import numpy as np
import pytest
from PIL import Image

from anima_jax.data.preprocessors import KINDS, Preprocessor, canny, control_picture, grey, scribble, tile
from anima_jax.errors import UserError
from convert.__main__ import main
from tests.golden_files import golden


@pytest.fixture(scope="module")
def reference():
    return golden("control_pictures")


@pytest.mark.parametrize("case", ["picture 100 200", "picture 50 150", "picture 20 40", "smooth 100 200"])
def test_canny_finds_opencvs_edges(reference, case):
    picture, low, high = case.split()
    key = f"canny of {picture}|{low}|{high}"
    edges = canny(reference[picture], int(low), int(high))
    assert np.array_equal(np.packbits(edges[..., 0] > 0, axis=1), reference[key])
    assert np.array_equal(edges, canny(reference[picture], int(high), int(low)))


def test_the_edge_of_a_square_is_the_last_pixel_before_each_step():
    pixels = np.zeros((40, 50, 3), np.uint8)
    pixels[10:30, 15:35, 1] = 255
    edges = canny(pixels)[..., 0] == 255
    # Both pixels of a step have the same gradient: the first one counts.
    assert np.flatnonzero(edges[20]).tolist() == [14, 34]
    assert np.flatnonzero(edges[:, 20]).tolist() == [9, 29]
    assert 2 * (20 + 20) - 4 <= edges.sum() <= 2 * (20 + 20)  # corners may be cut


def test_scribble_is_white_where_all_channels_are_darker_than_around(reference):
    difference = reference["difference of Gaussians"].astype(np.float32)
    for threshold in (32, 12):
        lines = scribble(reference["picture"], threshold)[..., 0] == 255
        clear = np.abs(2.0 * difference - threshold) > 0.1  # the file has half precision
        assert clear.mean() > 0.99
        assert np.array_equal(lines[clear], 2.0 * difference[clear] > threshold)


def test_a_tile_is_the_mean_of_squares_scaled_up_as_by_opencv(reference):
    for factor in (4, 8):
        assert np.array_equal(tile(reference["picture"], factor), reference[f"tile|{factor}"])
    picture = reference["picture"][:61, :67]
    assert tile(picture).shape == picture.shape


def test_grey_is_opencvs_brightness(reference):
    # Pillow and OpenCV round differently.
    off = grey(reference["picture"]).astype(int) - reference["grey"][..., None]
    assert np.abs(off).max() <= 1


def test_a_mask_is_what_is_transparent():
    picture = Image.new("RGBA", (4, 3), (10, 20, 30, 255))
    picture.putpixel((2, 1), (10, 20, 30, 127))
    made = Preprocessor.parse("mask")(picture)
    assert made[..., :3].reshape(-1, 3).tolist() == [[10, 20, 30]] * 12
    assert np.argwhere(made[..., 3]).tolist() == [[1, 2]]
    assert control_picture(picture, "mask").getpixel((2, 1))[3] == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mask"])
def test_a_picture_is_scaled_and_cropped_to_the_drawing_before_anything_else(reference, kind):
    picture = Image.fromarray(reference["picture"])  # 72×64
    middle = picture.crop((4, 0, 68, 64))
    larger = middle.resize((128, 128), Image.Resampling.BICUBIC)
    assert np.array_equal(control_picture(picture, kind, (64, 64)), control_picture(middle, kind))
    assert np.array_equal(control_picture(middle, kind, (128, 128)), control_picture(larger, kind))
    half = picture.resize((36, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(control_picture(picture, f"{kind}:resolution=32", (128, 128)), control_picture(half, kind))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "CMYK", "RGBA"])
def test_pictures_of_any_mode_become_rgb(reference, mode):
    picture = Image.fromarray(reference["picture"])
    picture = Image.new("I;16", (72, 64), 9000) if mode == "I;16" else picture.convert(mode)
    for kind in ("canny", "grey", "scribble", "tile"):
        assert (made := control_picture(picture, kind)).mode == "RGB"
        assert made.size == (72, 64)


def test_a_text_names_a_kind_and_its_options_by_name_or_in_order():
    assert Preprocessor.parse("canny:50:150") == Preprocessor.parse("canny:high=150:low=50")
    for text in ("canny", "canny:low=50", "tile:factor=4:resolution=512"):
        assert str(Preprocessor.parse(text)) == text
    assert str(Preprocessor.parse("canny:100:200")) == "canny"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("cany", "'cany' (did you mean 'canny'?) is no control picture, expected canny, grey, scribble, tile, mask"),
        ("canny:lw=1", "canny:lw=1: 'lw=1' (did you mean 'low'?) is no option of canny: its options are low, high, "),
        ("canny:1:2:3", "'3' is no option of canny"),
        ("grey:3", "'3' is no option of grey: its options are resolution"),
        ("mask:resolution=64", "no option of mask: it has no options"),
        ("tile:factor=6", "tile:factor=6: factor: found '6', expected a power of 2 from 2 to 64"),
        ("canny:-1", "low: found '-1', expected a whole number from 0 to 2040"),
        ("scribble:threshold=", "threshold: found '', expected a whole number from 1 to 510"),
    ],
)
def test_a_text_that_says_no_control_picture_is_refused(text, error):
    with pytest.raises(UserError) as refused:
        Preprocessor.parse(text)
    assert error in str(refused.value)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4, 1), np.uint8), np.zeros((0, 4), np.uint8)])
def test_pixels_of_another_form_are_refused(pixels):
    with pytest.raises(UserError, match="expected uint8"):
        control_picture(pixels, "grey")


# The command


@pytest.fixture
def pictures(tmp_path, reference):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("cat.png", "cat.webp", "sub/dog.bmp", ".hidden/not.png"):
        Image.fromarray(reference["picture"]).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "in" / "film.mp4").write_bytes(b"no picture either")
    (tmp_path / "in" / "cat.txt").write_text("a cat")
    return tmp_path


def make(folder, capsys, *arguments):
    main(["control-pictures", str(folder / "in"), str(folder / "in" / "out"), *arguments])
    out, err = capsys.readouterr()
    return out.replace(str(folder), ""), err.replace(str(folder), "").splitlines()


def test_a_folder_gets_a_control_picture_for_each_picture_under_its_base_name(pictures, capsys, reference):
    out, skipped = make(pictures, capsys, "--kind", "canny")
    assert out == "/in/out: 2 made, 3 skipped\n"
    assert [line.split(": ")[1] for line in skipped] == ["/in/broken.png", "/in/cat.webp", "/in/film.mp4"]
    written = {path.name: np.array(Image.open(path)) for path in (pictures / "in" / "out").rglob("*.png")}
    assert written.keys() == {"cat.png", "dog.png"}
    assert all(np.array_equal(each, canny(reference["picture"])) for each in written.values())


def test_what_is_made_is_kept_until_the_picture_or_the_kind_changes(pictures, capsys, reference):
    make(pictures, capsys, "--kind", "canny")
    assert make(pictures, capsys, "--kind", "canny:100")[0] == "/in/out: 2 kept, 3 skipped\n"
    Image.fromarray(reference["smooth"]).save(pictures / "in" / "cat.png")
    assert make(pictures, capsys, "--kind", "canny")[0] == "/in/out: 1 made, 1 kept, 3 skipped\n"
    assert make(pictures, capsys, "--kind", "grey")[0] == "/in/out: 2 made, 3 skipped\n"
    Image.new("RGB", (8, 8)).save(pictures / "in" / "out" / "cat.png")  # someone else's
    out, skipped = make(pictures, capsys, "--kind", "grey")
    assert out == "/in/out: 1 kept, 4 skipped\n"
    assert any("/in/out/cat.png: exists and was not made by this command; --force replaces it" in s for s in skipped)


@pytest.mark.parametrize(
    ("source", "target", "error"),
    [
        ("absent.png", "out.png", "absent.png: cannot be read: No such file or directory"),
        ("in/broken.png", "out.png", "in/broken.png: not a readable"),
        ("in/cat.png", "out.jpg", "out.jpg: expected a name that ends in .png, or a folder that exists"),
        ("in/cat.png", "in/cat.png", "in/cat.png: exists and was not made by this command"),
        ("in", "in", "in: is IN itself; choose another OUT"),
        ("in", "in/cat.png", "in/cat.png: is a file, expected a folder for the control pictures of"),
    ],
)
def test_mistakes_are_one_line(pictures, capsys, source, target, error):
    with pytest.raises(SystemExit) as stopped:
        main(["control-pictures", str(pictures / source), str(pictures / target), "--kind", "grey"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert error in line
