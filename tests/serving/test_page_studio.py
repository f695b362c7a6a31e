"""The Run and Data tabs in a browser: curves, samples, checkpoints; captions, tags and filters; keys, phone, axe."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
pytest.importorskip("axe_playwright_python")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from anima_jax.checkpoints.models import save_dit  # noqa: E402
from anima_jax.sampling.images import save_image  # noqa: E402
from anima_jax.serving.lora_library import LoraLibrary  # noqa: E402
from anima_jax.training.samples import sample_grid  # noqa: E402
from tests.serving.servers import SMALL, Running, running_server, small_pipeline  # noqa: E402
from tests.serving.test_dataset_api import picture  # noqa: E402
from tests.serving.test_lora_library import write_lora  # noqa: E402
from tests.serving.test_page import FLAGS, WCAG  # noqa: E402

LOSSES = [2.0, 1.0, 0.5, 0.25]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two runs in `runs` and a data set in `set`."""
    folder = tmp_path_factory.mktemp("studio")
    for name, factor in (("20260101_10-00-00", 2.0), ("20260102_10-00-00", 1.0)):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        rows = [{"step": n * 10, "loss": loss * factor, "learning_rate/base": 1e-3} for n, loss in enumerate(LOSSES)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    evaluated = [{"step": n, "held/loss": 1.5 - n / 10, "held/loss_quantile_0.10": 2.0} for n in range(3)]
    (run / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in evaluated))
    for step in (0, 20):
        grid = sample_grid([Image.new("RGB", (128, 128), (step, 9, 9))] * 4, ["a cat", "a dog"] * 2)
        text = {"anima_jax_samples": json.dumps({"prompts": ["a cat", "a dog"], "seeds": [1, 2], "step": step})}
        save_image(grid, run / "samples" / f"step{step:06d}.png", text)
    (folder / "set").mkdir()
    for number, caption in enumerate(["cat, red", "dog, red", "cat, blue", ""]):
        picture(number, 200 + 40 * number, 160).save(folder / "set" / f"p{number}.png")
        (folder / "set" / f"p{number}.txt").write_text(caption)
    data = f"resolutions = [64]\nenable_ar_bucket = true\nar_buckets = [1.0, 2.0]\n[[directory]]\npath = '{folder}/set'"
    (folder / "data.toml").write_text(data)
    return folder


@pytest.fixture(scope="module")
def served(folder) -> Iterator[Running]:
    params = small_pipeline(str(folder)).dit_params
    run = folder / "runs" / "20260102_10-00-00"
    (run / "step30").mkdir()
    save_dit(run / "step30" / "model.safetensors", {path: value * 1.5 for path, value in params.items()})
    write_lora(run / "epoch1" / "adapter_model.safetensors")
    settings: dict[str, Any] = {"run": folder / "runs", "dataset": folder / "data.toml", "defaults": SMALL}
    with running_server(str(folder), library=LoraLibrary(), **settings) as running:
        running.app.state.dataset.view.wait(60)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, served):
    """A function that opens a tab of the page; it checks that nothing went wrong in the browser."""
    contexts, wrong = [], list[str]()

    def opened(tab: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.goto(f"{served.url}/#/{tab}")
        expect(page.get_by_role("tabpanel", name=tab.capitalize()).locator(".card").first).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [text for text in wrong if "status of 4" not in text]


def values_of(page: Page, title: str) -> list[list[str]]:
    """The table of a chart."""
    chart = page.locator(f'[data-chart="{title}"]')
    chart.get_by_text("Table").click()
    expect(chart.locator("tbody tr").first).to_be_visible()
    return [row.locator("th, td").all_inner_texts() for row in chart.locator("tbody tr").all()]


def test_curves_have_the_values_of_the_run_and_are_read_by_keys(visit):
    page = visit("run")
    assert values_of(page, "Loss") == [[str(n * 10), f"{loss:g}"] for n, loss in enumerate(LOSSES)]
    page.get_by_label("Smoothing").fill("0")
    chart = page.locator('[data-chart="Loss"]')
    chart.locator(".plotarea").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(chart.locator(".readout")).to_have_text("Step 10: 1")
    path = chart.locator("path.curve").first.get_attribute("d") or ""
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    falls = np.diff(heights)
    np.testing.assert_allclose(falls / falls[0], np.diff(LOSSES) / (LOSSES[1] - LOSSES[0]), atol=0.01)  # of 0.1 pixels
    page.get_by_label("Logarithmic").check()
    path = chart.locator("path.curve").first.get_attribute("d") or ""
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    np.testing.assert_allclose(np.diff(heights) / (heights[1] - heights[0]), 1.0, atol=0.01)  # halves: a straight line


def test_runs_are_compared_and_new_steps_appear_by_themselves(visit, folder):
    page = visit("run")
    page.get_by_text("Compare with").click()
    page.get_by_label("20260101_10-00-00").check()
    chart = page.locator('[data-chart="Loss"]')
    expect(chart.locator(".legend li")).to_have_count(2)
    path = folder / "runs" / "20260102_10-00-00" / "metrics.jsonl"
    before = path.read_text()
    with open(path, "a") as file:
        file.write('{"step": 40, "loss": 7.0}\n{"step": 50, "lo')
    expect(page.locator(".runfacts")).to_contain_text("Loss7")
    rows = values_of(page, "Loss")
    path.write_text(before)
    assert (rows[0], rows[-1]) == (["0", "2", "4"], ["40", "7", ""])


def test_samples_are_shown_by_step_beside_each_other_and_over_steps(visit):
    page = visit("run")
    samples = page.get_by_role("region", name="Samples")
    expect(samples.get_by_role("img", name="Samples of step 20")).to_be_visible()
    samples.get_by_role("button", name="Earlier step").click()
    expect(samples.get_by_role("img", name="Samples of step 0")).to_be_visible()
    samples.get_by_label("Beside it").select_option("Step 20")
    expect(samples.locator("figure")).to_have_count(2)
    samples.get_by_label("Show").select_option("a dog, seed 2, over steps")
    expect(samples.locator("figcaption")).to_have_text(["Step 0", "Step 20"])
    expect(page.locator('[data-chart="Evaluation loss"]')).to_be_visible()


def test_a_checkpoint_is_drawn_with_and_an_adapter_is_chosen_as_lora(visit, served):
    before = {path: np.asarray(value) for path, value in served.server.engine.pipeline.dit_params.items()}
    page = visit("run")
    page.get_by_role("button", name="Draw with step30").click()
    expect(page.get_by_text("Drawing with it")).to_be_visible()
    now = served.server.engine.pipeline.dit_params
    assert all((np.asarray(now[path]) == value * np.asarray(1.5, value.dtype)).all() for path, value in before.items())
    page.get_by_role("button", name="Draw with epoch1").click()
    expect(page.get_by_role("tab", name="Draw")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".lora")).to_contain_text("20260102_10-00-00/epoch1")


def test_a_caption_is_edited_by_keys_alone_and_only_its_file_changes(visit, folder):
    before = {path.name: path.read_bytes() for path in (folder / "set").iterdir()}
    page = visit("data")
    page.locator(".tilebutton").first.focus()
    page.keyboard.press("Enter")
    editor = page.get_by_role("region", name="Caption")
    box = editor.get_by_role("textbox", name="Caption")
    expect(box).to_be_focused()
    page.keyboard.press("Control+End")
    page.keyboard.type(", tall")
    expect(editor.get_by_text("Not saved")).to_be_visible()
    page.keyboard.press("Control+s")
    expect(editor.get_by_text("Saved", exact=True)).to_be_visible()
    page.keyboard.press("Alt+ArrowRight")
    expect(box).to_have_value("dog, red")
    box.fill("dog, black")
    page.keyboard.press("PageDown")  # saves what was not saved
    expect(box).to_have_value("cat, blue")
    after = {path.name: path.read_bytes() for path in (folder / "set").iterdir()}
    assert after == before | {"p0.txt": b"cat, red, tall", "p1.txt": b"dog, black"}
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#toasts")).to_contain_text("Undone: the caption of p1.png")
    assert (folder / "set" / "p1.txt").read_text() == "dog, red"


def test_tags_filters_and_what_is_left_out(visit, folder):
    page = visit("data")
    expect(page.locator(".tilebutton")).to_have_count(4)
    page.locator("summary", has_text="Tags").click()
    page.get_by_role("button", name="cat 2").click()
    expect(page.locator(".datagrid .tilename")).to_have_text(["p0.png", "p2.png"])
    form = page.get_by_role("form", name="Change a tag")
    form.get_by_label("In all pictures shown").select_option("rename")
    form.get_by_label("Tag", exact=True).fill("cat")
    form.get_by_label("New name").fill("kitten")
    form.get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Change 2 captions").click()
    expect(page.get_by_text("2 captions changed").first).to_be_visible()
    assert (folder / "set" / "p2.txt").read_text() == "kitten, blue"
    page.locator("summary", has_text="Left out").click()
    expect(page.get_by_text("1 picture: left out with an empty caption (skip_empty_caption)")).to_be_visible()
    page.locator("summary", has_text="Buckets").click()
    expect(page.get_by_role("region", name="Buckets").locator("tbody tr")).to_have_count(2)


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}}])
@pytest.mark.parametrize("tab", ["run", "data"])
def test_axe_finds_nothing_and_a_phone_needs_no_sideways_scrolling(visit, tab, options):
    page = visit(tab, **options)
    if tab == "data":
        page.locator(".tilebutton").first.click()
        expect(page.locator(".editor textarea")).to_be_visible()
    else:
        page.locator('[data-chart="Loss"]').get_by_text("Table").click()
    found = Axe().run(page, options={"runOnly": WCAG}).response["violations"]
    assert not [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
