"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import json
import os
import shutil

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("there is no Chromium here (Debian: apt-get install chromium)", allow_module_level=True)

from serving import listening  # noqa: E402

from embedtune.search.index import create  # noqa: E402
from embedtune.search.rows import Record  # noqa: E402
from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402
from embedtune.serve.shelf import open_all  # noqa: E402
from payloads import PAYLOADS  # noqa: E402

HOSTILE = [
    "<script>alert(1)</script> lora", "<img src=x onerror=alert(1)> lora", "lora\"><svg onload=alert(1)>",
    "javascript:alert(1) lora", "</textarea><script>alert(1)</script> lora", "lora &lt;b&gt; \u202e \u0000 x",
]  # fmt: skip
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    """(address, file of votes) of a server over two indexes."""
    home = tmp_path_factory.mktemp("page")
    texts = [f"{['bade', 'fima', 'lora'][n % 3]} sentence number {n}. " * (8 + n % 6) for n in range(60)]
    records = [Record(f"t{n}", text, {"kind": "abc"[n % 3]}) for n, text in enumerate(texts + HOSTILE)]
    for kind in ("bert", "distilbert"):
        create(home / kind, str(tiny_model(kind)), records)
    folders = [str(home / "bert"), str(home / "distilbert")]
    service = Service(lambda: open_all(str(tiny_model("bert")), folders, "fp32", 2048), Limits(), home / "votes.jsonl")
    with listening(service) as port:
        yield f"http://127.0.0.1:{port}", home / "votes.jsonl"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, served):
    """A page on which nothing may go wrong: no error, no dialog, no request to another place."""
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    made.on("pageerror", lambda error: wrong.append(f"error {error}"))
    made.on("console", lambda said: wrong.append(f"console {said.text}") if said.type == "error" else None)
    made.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    made.on(
        "request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((served[0], "data:")) else None
    )
    made.goto(served[0])
    made.wait_for_selector("#atlas:not([hidden])")
    yield made
    made.close()
    assert not wrong


def until(page, expression):
    """Wait for it from outside: the page's own policy forbids to evaluate a string inside of it."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {expression}")


def search(page, words):
    page.fill("#query", words)
    page.press("#query", "Enter")
    page.wait_for_selector("article")
    until(page, "document.querySelector('#status').textContent.includes(' ms')")


def test_a_search_shows_both_models_what_moved_and_the_best_passage(page):
    search(page, "lora sentence")
    assert page.locator(".model").count() == 2 and page.locator(".model h2").all_text_contents() == [
        "bert",
        "distilbert",
    ]
    assert page.locator(".model >> nth=0 >> article").count() == 10
    assert page.locator(".moved:not(:empty)").count() == 10
    assert any(text.strip() for text in page.locator("mark").all_text_contents())
    page.select_option("#top", "5")
    until(page, "document.querySelectorAll('.model article').length === 10")  # five beside five
    page.select_option("#kind", "a")
    until(page, "[...document.querySelectorAll('.columns')].every((c) => c.textContent === 'kind: a')")


def test_hostile_texts_are_shown_as_texts(page):
    for words in HOSTILE[:4]:
        search(page, words)
    page.select_option("#top", "50")
    until(page, "document.querySelectorAll('.model article').length > 60")
    shown = "\n".join(page.locator(".text").all_text_contents())
    assert all(text in shown for text in HOSTILE[:5])
    assert page.locator("#results script, #results img, #results svg").count() == 0


def test_no_payload_runs_on_the_page(browser, tiny_model, tmp_path):
    """As texts, columns, values, ids of an index, and as queries; `page` above fails where anything runs."""
    records = [Record(f"{n} {p}", f"lora {p}", {"kind": p, "a": p}) for n, p in enumerate(PAYLOADS)]
    create(tmp_path / "idx", str(tiny_model("bert")), records)
    service = Service(
        lambda: open_all(str(tiny_model("bert")), [str(tmp_path / "idx")], "fp32", 2048), Limits(), tmp_path / "votes"
    )
    with listening(service) as port:
        made, wrong = browser.new_page(), []
        made.on("pageerror", lambda error: wrong.append(f"error {error}"))
        made.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        made.on("request", lambda asked: wrong.append(asked.url) if f":{port}/" not in asked.url else None)
        made.goto(f"http://127.0.0.1:{port}")
        made.wait_for_selector("#atlas:not([hidden])")
        made.select_option("#top", "50")
        for payload in PAYLOADS[::24]:
            search(made, "lora " + payload.replace("\0", "").replace("\n", " "))
            assert made.locator("#results script, #results img, #results svg, #results iframe").count() == 0
        made.close()
    assert not [each for each in wrong if not each.startswith("data:")]


def test_votes_are_written(page, served):
    search(page, "fima")
    page.locator("button[data-verdict=up]").first.click()
    page.wait_for_selector("button[data-verdict=up][aria-pressed=true]")
    row = json.loads(served[1].read_text().splitlines()[-1])
    assert (
        row["query"] == "fima" and row["verdict"] == "up" and row["text"] in page.locator(".text").first.text_content()
    )


def test_the_map_answers_pointer_and_keys(page):
    assert "66 texts" in page.text_content("#atlas-about")
    canvas = page.locator("#canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    first = page.text_content("#point")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert first.startswith("t") and page.text_content("#point") != first
    page.fill("#find", "lora")
    page.select_option("#colour", "cluster")
    assert page.locator("#legend li").count() >= 2


def test_it_is_used_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Tab")
    page.keyboard.type("bade")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.verdict"))
    assert {"mode", "top", "kind", "up", "down"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_phone_and_the_dark_are_fine_and_axe_finds_nothing_serious(page, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    search(page, "lora")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing stands out to the right"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(light.split("(")[1].split(",")[0]) > 128) == (scheme == "light")
    found = axe.Axe().run(page).response["violations"]
    assert not [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
