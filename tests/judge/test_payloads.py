"""Scripts as names on the pages of drift and of certificates, and as everything in a report in a real browser."""

import itertools
import os
import shutil
from types import SimpleNamespace

import pytest
from test_page import Reader, replaced, story, undrawn  # noqa: F401 - two of them are fixtures

from embedtune import plots
from embedtune.judge import drift_page
from embedtune.judge.page import page as report
from embedtune.refine import certificate_page
from payloads import PAYLOADS

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def tags(html):
    """The tags of a page with the names of their attributes, in order: what a payload adds would show."""
    read = Reader(html)
    return [(tag, sorted(attributes)) for tag, attributes in read.tags], read.stack, read.wrong


def test_names_add_no_tag_to_the_pages_of_drift_and_of_certificates(monkeypatch):
    monkeypatch.setattr(plots, "svg", lambda figure, name, label: f'<svg id="{name}" role="img"></svg>')
    monkeypatch.setattr(certificate_page, "picture", lambda found: None)

    def pages(name):
        # What the page asks of a certificate; measuring one takes probes, and no name changes them.
        said = SimpleNamespace(
            word="LEAKS", concept=name, model=name, seed=0, digests={name: name},
            sentences=lambda: [name], figures=lambda: [(name, name, name)], costs=lambda: [name],
        )  # fmt: skip
        return tags(certificate_page.page(said)), tags(drift_page.page([], {name: [name, name]}))

    plain = pages("plain")
    assert [payload for payload in PAYLOADS if pages(payload) != plain] == []


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def test_none_of_them_runs_in_a_report_in_a_browser(browser, story, undrawn, tmp_path):  # noqa: F811
    """Every payload as every name, text, label and command of a report, opened from the disk as users do."""
    opened, wrong, asked = browser.new_page(), [], []
    opened.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    turn, used, pages = itertools.cycle(PAYLOADS), set(), 0
    while used != set(PAYLOADS):
        hurt = replaced(story, str, lambda _: (used.add(each := next(turn)), each)[1])
        hurt["verdict"]["queries"] = story["verdict"]["queries"]
        text = report(hurt)
        (tmp_path / f"{pages}.html").write_text(text, encoding="utf-8")
        opened.goto(f"file://{tmp_path}/{pages}.html")
        pages += 1
    opened.close()
    assert not wrong and len(asked) == pages, "no script ran, and no other page was asked for"


def test_a_script_that_is_not_escaped_would_be_seen(browser, tmp_path):
    """That the test above can fail."""
    opened, wrong = browser.new_page(), []
    opened.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    (tmp_path / "a.html").write_text(f"<body>{PAYLOADS[0]}</body>")
    opened.goto(f"file://{tmp_path}/a.html")
    opened.close()
    assert wrong == ["1"]
