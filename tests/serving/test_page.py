"""The page in a real browser: what a person does with it, by mouse, touch and keyboard, and what axe says of it.

Every test also checks that nothing went wrong in the browser (no error, no violation of the Content-Security-Policy)
and that the page sent requests to its own server only.
"""

import io
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

for package in ("starlette", "uvicorn", "httpx", "axe_playwright_python"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

from anima_jax.models.control import LAYERS  # noqa: E402
from anima_jax.serving.app import create_app  # noqa: E402
from anima_jax.serving.engine import Engine  # noqa: E402
from anima_jax.serving.http.server import ServerConfig  # noqa: E402
from anima_jax.serving.lora_library import LoraLibrary  # noqa: E402
from tests.serving.servers import SMALL, Running, running_app, small_pipeline  # noqa: E402
from tests.serving.test_lora_library import write_lora  # noqa: E402
from tests.serving.test_loras import write_control  # noqa: E402

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("loras")
    for name in ("style", "anna"):
        write_lora(folder / f"{name}.safetensors", {"modelspec.trigger_phrase": f"{name} words"})
    controls = tmp_path_factory.mktemp("controls")
    write_control(controls / "edges.safetensors", 0, layers=LAYERS[:1])
    library = LoraLibrary(folder, controls=[controls])
    engine = Engine(small_pipeline(str(tmp_path_factory.mktemp("model"))), slots=4, library=library)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served(engine) -> Iterator[Running]:
    with running_app(create_app(engine, ServerConfig(defaults=SMALL))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, served):
    """A function that opens the page; options are those of a browser's context."""
    contexts, asked, wrong = [], [], []

    def opened(url: str = served.url, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("request", lambda request: asked.append((request.url, url)))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.goto(url)
        expect(page.get_by_label("Prompt", exact=True).or_(page.get_by_role("dialog"))).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [to for to, origin in asked if not to.startswith((origin, "data:", "blob:"))]
    assert not [text for text in wrong if "status of 4" not in text and "ERR_INTERNET_DISCONNECTED" not in text]


def draw(page: Page, prompt: str, **values: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.keyboard.press("Control+Enter")


def finished(page: Page) -> Locator:
    """The pictures of the job that is shown, once it is finished."""
    pictures = page.locator(".tiles .open img")
    expect(pictures.first).to_be_visible()
    return pictures


def newest(served: Running) -> tuple[dict[str, Any], Image.Image]:
    entry = served.client.get("/api/images").json()["images"][0]
    return entry, Image.open(io.BytesIO(served.client.get(entry["url"]).content))


def png(image: Image.Image, **text: str) -> bytes:
    data, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, value in text.items():
        chunks.add_text(name, value)
    image.save(data, format="PNG", pnginfo=chunks)
    return data.getvalue()


def drop(page: Page, target: str, data: bytes, name: str = "picture.png") -> None:
    """Drop a file on an element, as a person does who drags it from a folder."""
    transfer = page.evaluate_handle(
        """([bytes, name]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
          return data;
        }""",
        [list(data), name],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(target, event, {"dataTransfer": transfer})


def open_sections(page: Page) -> None:
    for title in page.locator("details:not([open]) > summary").all()[::-1]:
        title.click()


def test_pictures_are_drawn_with_previews_and_come_first_in_the_gallery(visit, served):
    page = visit()
    page.evaluate(
        """window.previews = new Set();
        new MutationObserver((changes) => {
          for (const { target } of changes)
            if (target.src?.startsWith("data:image/jpeg")) window.previews.add(target.src);
        }).observe(document.body, { subtree: true, attributeFilter: ["src"] })"""
    )
    draw(page, "two fish", Pictures=4, Steps=150)
    assert finished(page).count() == 4
    assert page.evaluate("window.previews.size") > 0
    entry, picture = newest(served)
    assert (entry["prompt"], picture.size) == ("two fish", (32, 48))
    expect(page.locator(".gallery .open").first).to_have_attribute("aria-label", "Open: two fish")


def test_a_drawing_is_cancelled(visit, served):
    page = visit()
    draw(page, "slow", Pictures=16, Steps=150)
    page.locator(".stage").get_by_role("button", name="Cancel").click()
    expect(page.locator("#stage-line")).to_have_text("Cancelled")
    assert served.client.get("/api/jobs").json()["jobs"][0]["state"] == "cancelled"


def test_the_queue_shows_what_waits_and_cancels_all(visit, served):
    page = visit()
    for name in ("first", "second", "third"):
        draw(page, name, Pictures=16, Steps=150)
    rows = page.locator(".queue li")
    expect(rows).to_have_count(3)
    expect(rows.nth(1)).to_contain_text("second")
    page.get_by_role("button", name="Cancel second").click()
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="Cancel all").click()
    expect(rows).to_have_count(0)
    assert {job["state"] for job in served.client.get("/api/jobs").json()["jobs"][:3]} == {"cancelled"}


def test_inpainting_changes_what_was_painted_and_nothing_else(visit, served):
    page = visit()
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8))
    page.get_by_text("Start image", exact=True).click()
    drop(page, ".slot", png(start))
    page.get_by_role("button", name="Paint a mask").click()
    box = page.locator(".layer").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 10, steps=5)
    page.mouse.up()
    page.get_by_role("button", name="Use mask").click()
    page.get_by_label("Soft edge in pixels").fill("0")
    draw(page, "a stripe")
    finished(page)
    page.locator(".gallery .open").first.click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.locator(".notice")).to_contain_text(
        re.compile(r"the start image .image-[0-9a-f]{12}\.png. is not in the file")
    )
    _, drawn = newest(served)
    same = (np.asarray(drawn.convert("RGB")) == np.asarray(start)).all(axis=-1)
    assert same[:, :10].all()
    assert same[:, -10:].all()
    assert not same[8:-8, 15:17].any()


A1111 = """two cats in a box, <lora:missing:0.7>
Negative prompt: a dog
Steps: 7, Sampler: Euler a, Schedule type: Karras, CFG scale: 5.5, Seed: 18446744073709551615, Size: 48x64"""


def test_a_dropped_picture_brings_its_settings_and_says_what_is_lost(visit):
    page = visit()
    drop(page, "body", png(Image.new("RGB", (48, 64)), parameters=A1111), "cats.png")
    expect(page.get_by_role("heading", name="Settings of cats.png")).to_be_visible()
    expect(page.get_by_label("Negative prompt")).to_have_value("a dog")
    read = {name: page.get_by_label(name, exact=True).input_value() for name in ("Steps", "CFG scale", "Width", "Seed")}
    assert read == {"Steps": "7", "CFG scale": "5.5", "Width": "48", "Seed": "18446744073709551615"}
    chosen = page.get_by_label("Sampler", exact=True).input_value(), page.get_by_label("Schedule").input_value()
    assert chosen == ("euler_ancestral", "karras")
    assert page.locator(".notice li").count() > 0


def test_a_lora_is_found_by_its_trigger_and_drawn_with(visit, served):
    page = visit()
    page.get_by_text("LoRAs", exact=True).click()
    page.get_by_role("button", name="Add LoRA").click()
    page.get_by_label("Search LoRAs").fill("ANNA wor")
    expect(page.locator(".picker button")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_label("anna weight")).to_be_focused()
    page.keyboard.type("0.5")
    page.get_by_role("button", name="anna words").click()
    page.keyboard.press("Control+Enter")
    finished(page)
    entry = newest(served)[0]
    assert entry["prompt"] == "anna words"
    data = served.client.get(entry["url"]).content
    answer = served.client.post("/api/settings", content=data, headers={"content-type": "image/png"}).json()
    assert answer["settings"]["loras"] == [{"name": "anna", "weight": 0.5}]


def test_a_control_network_sees_the_picture_it_is_given(visit, served):
    page = visit()
    page.get_by_text("Control", exact=True).click()
    page.get_by_role("button", name="Add control").click()
    draw(page, "controlled", Steps=5)
    expect(page.locator(".problem")).to_have_text("The control network edges has no picture yet.")
    drop(page, ".control .slot", png(Image.new("RGB", (32, 48), "red")))
    page.get_by_label("Make it from the picture").select_option("grey")
    page.get_by_label("Strength").fill("0.5")
    with page.expect_request("**/api/jobs") as asked:
        draw(page, "controlled", Steps=5)
    sent = asked.value.post_data_json["controls"][0]
    assert sent.pop("image").startswith("data:image/png;base64,")
    assert sent == {"name": "edges", "kind": "grey", "strength": 0.5, "start": 0, "end": 1}
    finished(page)
    assert newest(served)[0]["prompt"] == "controlled"


def test_a_comfyui_graph_is_dropped(visit, served):
    page = visit()
    draw(page, "from a graph", Steps=5)
    finished(page)
    graph = png(Image.new("RGB", (32, 48)), prompt=newest(served)[1].info["prompt"])
    draw(page, "something else", Steps=3)
    drop(page, "body", graph)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("from a graph")
    assert page.get_by_label("Steps", exact=True).input_value() == "5"


def test_a_picture_without_settings_can_be_the_start_image(visit):
    page = visit()
    drop(page, "body", png(Image.new("RGB", (32, 48))))
    page.get_by_role("button", name="Use as start image").click()
    expect(page.get_by_alt_text("start image")).to_be_visible()
    page.reload()
    expect(page.locator(".section .note", has_text="In use")).to_be_visible()


def test_a_gallery_picture_is_drawn_again_with_its_seed(visit, served):
    page = visit()
    page.get_by_text("Fixed").click()
    draw(page, "again", Seed="18446744073709551614")
    expect(page.locator(".gallery .open").first).to_have_attribute("aria-label", "Open: again")
    _, before = newest(served)
    page.get_by_text("Random", exact=True).click()
    page.get_by_label("Prompt", exact=True).fill("something else")
    count = page.locator(".gallery li").count()
    page.locator(".gallery .open").first.click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("18446744073709551614")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".gallery li")).to_have_count(count + 1)
    expect(page.locator("#stage-line")).to_contain_text("seed 18446744073709551614")
    assert (np.asarray(newest(served)[1]) == np.asarray(before)).all()


def test_a_value_that_the_server_refuses_is_told_at_its_field(visit):
    page = visit()
    draw(page, "too much", Steps=5000)
    steps = page.get_by_label("Steps", exact=True)
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_be_focused()
    assert "steps" in page.locator(f"#{steps.get_attribute('id')}-error").inner_text().lower()
    steps.fill("3")
    expect(steps).not_to_have_attribute("aria-invalid", "true")


def test_settings_survive_a_reload_and_a_server_that_is_away(visit):
    page = visit()
    page.get_by_label("Prompt", exact=True).fill("kept")
    page.get_by_label("Steps", exact=True).fill("11")
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("kept")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("11")
    page.context.set_offline(True)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#server")).to_contain_text("Server is away")
    page.context.set_offline(False)
    expect(page.locator("#server")).to_have_text("Connected again")


def test_the_page_asks_for_the_key_and_shows_pictures_with_it(visit, engine):
    config = ServerConfig(defaults=SMALL, api_key="secret word")
    with running_app(create_app(engine, config)) as running:
        page = visit(running.url)
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.get_by_role("button", name="Use key").click()
        expect(page.get_by_text("The server does not accept this key.")).to_be_visible()
        page.get_by_role("textbox", name="API key").fill("secret word")
        page.get_by_role("button", name="Use key").click()
        draw(page, "behind a key")
        for picture in (finished(page).first, page.locator(".gallery img").first):
            expect(picture).to_have_attribute("src", re.compile("^blob:"))
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 32


def focus(page: Page) -> dict[str, Any]:
    """What has the focus: its name, whether that can be seen, and its place."""
    return page.evaluate(
        """() => {
          const element = document.activeElement, style = getComputedStyle(element);
          const marked = element.matches("input.unseen") ? getComputedStyle(element.nextElementSibling) : style;
          const label = element.labels?.[0]?.innerText;
          return {tag: element.tagName, name: element.getAttribute("aria-label") || label || element.innerText,
                  visible: marked.outlineStyle !== "none" && parseFloat(marked.outlineWidth) > 0};
        }"""
    )


def test_everything_is_reached_and_done_with_the_keyboard(visit, served):
    page = visit()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        found = focus(page)
        if found["tag"] == "BODY":
            break
        reached.append(found)
        if found["name"] == "Prompt":
            page.keyboard.type("typed")
    names = [found["name"] for found in reached]
    in_order = [
        "Skip to content",
        "Draw",
        "Prompt",
        "Negative prompt",
        "Width",
        "Steps",
        "Sampler",
        "LoRAs",
        "Pictures",
    ]
    assert [name for name in names if name in in_order][: len(in_order)] == in_order
    assert all(found["name"] and found["visible"] for found in reached)
    page.keyboard.press("Control+Enter")
    finished(page)
    assert newest(served)[0]["prompt"] == "typed"


def test_the_viewer_is_used_with_arrow_keys(visit):
    page = visit()
    for name in ("older", "newer"):
        draw(page, name)
        expect(page.locator(".gallery .open").first).to_have_attribute("aria-label", f"Open: {name}")
    page.locator(".gallery .open").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".viewer .prompt")).to_have_text("newer")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".viewer .prompt")).to_have_text("older")
    count = page.locator(".gallery li").count()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete").last.click()
    expect(page.locator(".gallery li")).to_have_count(count - 1)
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)


def test_a_mask_is_painted_with_keys(visit):
    page = visit()
    page.get_by_text("Start image", exact=True).click()
    drop(page, ".slot", png(Image.new("RGB", (64, 64), "blue")))
    page.get_by_role("button", name="Paint a mask").click()
    painted = """canvas => [...canvas.getContext("2d").getImageData(0, 0, 64, 64).data]
        .filter((value, at) => at % 4 === 3 && value > 127).length"""
    layer = page.locator(".layer")
    expect(layer).to_be_focused()
    page.keyboard.press("Space")
    one = layer.evaluate(painted)
    page.keyboard.down("Shift")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.up("Shift")
    assert layer.evaluate(painted) > one > 0
    page.get_by_role("button", name="Invert").click()
    inverted = layer.evaluate(painted)
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert layer.evaluate(painted) == one
    assert inverted > 3000
    page.get_by_role("button", name="Clear").click()
    assert layer.evaluate(painted) == 0


def test_a_phone_shows_everything_without_sideways_scrolling(visit):
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    width = "document.documentElement.scrollWidth"
    draw(page, "a word that is much too long: " + "x" * 200, Pictures=3)
    finished(page)
    open_sections(page)
    assert page.evaluate(width) == 360
    page.locator(".gallery .open").first.tap()
    assert page.locator(".viewer").evaluate("element => element.scrollWidth <= 360")
    page.get_by_role("button", name="Use as start image").tap()
    page.get_by_role("button", name="Paint a mask").tap()
    expect(page.locator(".layer")).to_be_visible()
    assert page.locator(".mask-editor").evaluate("element => element.parentElement.scrollWidth <= 360")
    page.get_by_role("button", name="Use mask").tap()
    page.get_by_role("tab", name="Data").tap()
    assert page.evaluate(width) == 360


def test_dark_mode_follows_the_system_until_one_chooses(visit):
    page = visit(color_scheme="dark")
    brightness = """() => getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g)
        .slice(0, 3).reduce((sum, value) => sum + Number(value), 0)"""
    assert page.evaluate(brightness) < 120
    page.get_by_role("button", name="System theme, change").click()
    assert page.evaluate(brightness) > 600
    page.reload()
    assert page.evaluate(brightness) > 600


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, scheme):
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    draw(page, "accessible", Pictures=2)
    finished(page)
    open_sections(page)
    drop(page, ".slot", png(Image.new("RGB", (32, 48))))
    page.get_by_role("button", name="Add control").click()
    found = [violations(page)]
    page.get_by_role("button", name="Paint a mask").click()
    found.append(violations(page))
    page.keyboard.press("Escape")
    page.locator(".gallery .open").first.click()
    found.append(violations(page))
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Run").click()
    found.append(violations(page))
    assert found == [[], [], [], []]


def violations(page: Page) -> list[tuple[str, list[str]]]:
    response = Axe().run(page, options={"runOnly": WCAG}).response
    return [(found["id"], [node["html"] for node in found["nodes"]]) for found in response["violations"]]
