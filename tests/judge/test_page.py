"""The report of a run: all of it there, nothing of the data alive in it, the same bytes every time."""

import copy
import json
import re
import warnings
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from embedtune import plots
from embedtune.judge import page as pages
from embedtune.judge.page import page
from payloads import PAYLOADS

VOID = {"meta", "br"}
HTML_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "aside", "nav", "footer", "h1"),
    *("h2", "h3", "h4", "p", "ul", "ol", "li", "a", "b", "br", "span", "bdi", "div", "dl", "dt", "dd", "table"),
    *("caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details", "summary", "pre", "code"),
}
SVG_TAGS = {"svg", "g", "path", "text", "use", "defs", "rect", "clippath", "tspan"}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "dir", "scope", "tabindex", "role"),
    *("open", "style", "aria-label", "aria-labelledby", "viewbox", "fill", "stroke-linejoin", "d", "clip-path", "x"),
    *("y", "width", "height", "transform"),
}
ORDER = ["scores", "dimensions", "changed", "training", "data", "averaging", "drift", "limits", "repeat"]
# What each section stands on, so that leaving these out leaves it out.
STANDS_ON = {
    "scores": ["tables"],
    "dimensions": ["dims"],
    "changed": ["changed"],
    "training": ["log"],
    "data": ["profile", "remarks", "examples_of_pairs"],
    "averaging": ["averaging"],
    "drift": ["drift"],
    "repeat": ["repeat", "recipe", "machine"],
}


class Reader(HTMLParser):
    """A page as the standard library reads it: tags with attributes, text without style, unbalanced tags."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.stack, self.wrong = [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [a["id"] for _, a in self.tags if "id" in a]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)

    def handle_comment(self, data):
        self.wrong.append(f"comment {data}")

    def unknown_decl(self, data):
        self.wrong.append(f"declaration {data}")

    def handle_pi(self, data):
        self.wrong.append(f"instruction {data}")

    def of(self, tag):
        return [attributes for t, attributes in self.tags if t == tag]


def score_rows(change=0.0556):
    measures = {"nDCG@10": 0.6456, "MRR@10": 0.6102, "recall@100": 0.9251}
    common = {"change": change, "low": change - 0.03, "high": change + 0.03, "p": 0.00003}
    return [{"measure": name, "base": base, "tuned": base + change, **common} for name, base in measures.items()]


def documents(texts, relevant):
    return [{"text": t, "score": 0.81 - 0.1 * i, "relevant": i == relevant} for i, t in enumerate(texts)]


def change(query, value, base, tuned):
    return {"query": query, "change": value, "base": base, "tuned": tuned}


@pytest.fixture
def story():
    texts = ["Aspirin thins the blood.", "Statins lower lipids.", "A long passage about the heart. " * 40]
    steps = [
        {
            "step": s,
            "epoch": s / 10,
            "loss": 2 / s,
            "lr": 1e-6 * (40 - s),
            "tokens_per_second": 5100.0,
            "seconds": 1.5 * s,
        }
        for s in range(1, 41)
    ]
    scorings = [
        {"step": s, "seconds": 1.5 * s, "dev_loss": 1.0 - s / 100, "dev_nDCG@10": 0.6 + s / 1000, "dev_MRR@10": 0.5}
        for s in (0, 20, 40)
    ]
    return {
        "title": "Cardiology guidelines",
        "base": "all-MiniLM-L6-v2",
        "model": "guidelines-minilm",
        "verdict": {"word": "WIN", "sentence": "It finds more.", "queries": "real", "kept": "tuned"},
        "profile": {
            "rows": 12873,
            "mean_tokens": 243.25,
            "files": ["corpus.jsonl"],
            "kinds": {"title": 3},
            "absent": None,
        },
        "remarks": ["412 of 12,873 rows left out: empty", "1,204 texts were cut at 256 tokens"],
        "log": scorings[:1] + steps[:20] + scorings[1:2] + steps[20:] + scorings[2:],
        "tables": [
            {"name": "clinical questions", "queries": 300, "corpus": 5183, "rows": score_rows()},
            {"name": "drug labels", "queries": 1240, "corpus": 8121, "rows": score_rows(-0.0512)},
        ],
        "measure": "nDCG@10",
        "shown": "held-out pairs",
        "dims": [{"dim": d, "base": 0.4, "tuned": t, "low": 0.01, "high": 0.3} for d, t in ((384, 0.64), (64, 0.608))],
        "changed": {
            "better": [change("what thins blood?", 0.6131, documents(texts, None), documents(texts, 0))],
            "worse": [change("lipids?", -0.5, documents(texts, 1), [])],
        },
        "averaging": {"coefficient": 0.5, "tried": {"1": 0.71, "0": 0.66, "0.25": 0.7, "0.5": 0.72}},
        "drift": {"overlap@10": 0.6132, "rank_correlation": 0.9121, "texts": 2000},
        "examples_of_pairs": [{"anchor": "Aspirin", "positive": texts[0], "generator": "title to body"}],
        "repeat": ["embedtune run guidelines --seed 12"],
        "recipe": 'task = "contrastive"\nseed = 12\n',
        "machine": {"torch": "2.13.0", "seconds": 1843.2},
    }


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take nearly all of the time: these tests are about the words around them."""
    monkeypatch.setattr(plots, "svg", lambda figure, name, label: f'<svg id="{name}" role="img"></svg>')


def replaced(value, kind, by):
    """`value` with everything of type `kind` replaced by `by(old)`, keys of free-form parts too."""
    if isinstance(value, dict):
        return {key: replaced(inner, kind, by) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, kind, by) for inner in value]
    return by(value) if isinstance(value, kind) and not isinstance(value, bool) else value


def hostile(story, payload):
    """The story with `payload` as every name, text, label, file name and command."""
    hurt = replaced(story, str, lambda _: payload)
    hurt["verdict"]["queries"] = story["verdict"]["queries"]
    for part in ("profile", "machine"):
        hurt[part] = {payload: payload, **{f"{payload}{n}": v for n, v in enumerate(hurt[part].values())}}
    hurt["log"] = [{f"dev_{payload}" if key == "dev_nDCG@10" else key: v for key, v in r.items()} for r in story["log"]]
    return hurt


def assert_harmless(text):
    """Nothing but the page's own tags and attributes, links inside the page only, and all of it balanced."""
    read = Reader(text)
    assert not read.wrong and not read.stack
    for tag, attributes in read.tags:
        assert tag in HTML_TAGS | SVG_TAGS, tag
        assert set(attributes) <= ATTRIBUTES, (tag, attributes)
        assert re.fullmatch(r"#[\w-]+", attributes.get("href", "#x"))
        values = " ".join(value or "" for key, value in attributes.items() if key != "aria-label")
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", values)
    assert len(read.of("style")) == 1 and len(read.of("meta")) == 4
    inside = [v for _, attributes in read.tags for k, v in attributes.items() if k in ("clip-path", "href")]
    assert set(re.findall(r"#([\w-]+)", " ".join(inside))) <= set(read.ids)
    return read


def test_all_sections_in_reading_order(story):
    text = page(story)
    read = assert_harmless(text)
    assert [i for i in read.ids if i in ORDER] == ORDER
    assert [a["href"][1:] for a in read.of("a")] == ORDER
    assert text.index("WIN</p>") < text.index(story["verdict"]["sentence"] + "</p>") < text.index('id="scores"')
    for words in (
        *("Cardiology guidelines", "all-MiniLM-L6-v2", "300 real queries", "0.6456 to 0.7012", "+0.0556"),
        *("+0.0256 to +0.0856", "Kept: tuned", "5,183 documents", "< 0.0001", "drug labels"),
        *("384 0.4000 0.6400", "95.0 %", "what thins blood?"),
        *("+0.6131", "\N{MINUS SIGN}0.5000", "40 steps", "4.00 epochs", "12,873", "243.2", "corpus.jsonl", "title: 3"),
        *("412 of 12,873 rows left out", "title to body", "0.50 (taken) 0.7200"),
        *("61.3 %", "0.9121", "2,000 general texts"),
        *("embedtune run guidelines --seed 12", "seed = 12", "2.13.0", "1,843", "nothing found"),
    ):
        assert words in read.text, words
    assert "absent" not in read.text and read.of("html")[0]["lang"] == "en"
    assert len(read.of("svg")) == 4  # two tables, dimensions, training
    assert all(a["role"] == "img" and a["aria-label"] for a in read.of("svg"))
    assert len(read.of("h1")) == 1


@pytest.mark.parametrize("section", list(STANDS_ON))
@pytest.mark.parametrize("how", ["missing", "none", "empty"])
def test_a_missing_part_leaves_no_heading(story, section, how, undrawn):
    for part in STANDS_ON[section]:
        if how == "missing":
            del story[part]
        else:
            story[part] = None if how == "none" else type(story[part])()
    read = assert_harmless(page(story))
    left = [name for name in ORDER if name != section]
    assert [i for i in read.ids if i in ORDER] == left == [a["href"][1:] for a in read.of("a")]


def test_a_story_of_nothing_but_its_verdict(story):
    few = {key: story[key] for key in ("title", "base", "model", "verdict")}
    read = assert_harmless(page(few))
    assert read.ids == ["limits"] and not read.of("svg") and not read.of("table")


def test_sections_stay_when_only_a_piece_of_them_is_missing(story):
    for part in ("profile", "examples_of_pairs", "recipe", "machine"):
        del story[part]
    story["changed"]["better"] = []
    story["averaging"]["tried"] = {}
    read = assert_harmless(page(story))
    assert [i for i in read.ids if i in ORDER] == ORDER
    for words in ("Better with the tuned model", "Pairs that the training saw", "Where it ran", "The recipe"):
        assert words not in read.text
    assert "412 of 12,873" in read.text


def test_proxies_are_said_before_anything_else(story):
    assert "prox" not in Reader(page(story)).text.lower()
    story["verdict"]["queries"] = "proxy"
    text = page(story)
    notice = text.index("The queries of this test are proxies.")
    assert notice < text.index("<nav") < text.index("<table") and text.index('class="word"') < notice
    read = Reader(text)
    assert "--queries FILE" in read.text and "about 50 questions" in read.text and "300 proxy queries" in read.text


def test_the_verdict_is_not_said_twice(story):
    story["verdict"] |= {"sentence": "WIN: it finds more; the tuned model is kept.", "kept": "the tuned model is kept"}
    read = Reader(page(story))
    assert "WIN It finds more; the tuned model is kept. clinical" in read.text
    assert read.text.count("is kept") == 1 and "Kept:" not in read.text
    story["verdict"]["kept"] = "tuned"
    assert "Kept: tuned" in Reader(page(story)).text


def test_enough_payloads():
    assert len(set(PAYLOADS)) >= 120


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_comes_alive(story, payload, undrawn):
    read = assert_harmless(page(hostile(story, payload)))
    shown = " ".join(payload.replace("\0", "\N{REPLACEMENT CHARACTER}").split())
    assert read.text.count(shown) >= 30, "the words themselves are shown, as they are"


def test_no_payload_comes_alive_in_a_picture(story):
    rows = story["tables"][0]["rows"]
    story["tables"] = [{**story["tables"][0], "rows": [{**rows[0], "measure": payload} for payload in PAYLOADS]}]
    assert_harmless(page(story))
    for payload in (*PAYLOADS[::32], "$\\frac{$"):
        read = assert_harmless(page(hostile({**story, "tables": []}, payload)))
        assert len(read.of("svg")) == 2, "the curve and the dimensions are drawn, whatever the measure is called"


def test_no_naughty_string_comes_alive(story, real_data):
    naughty = json.loads(real_data("blns/blns.json").read_text(encoding="utf-8"))
    story["remarks"] = naughty
    story["profile"] = {text: text for text in naughty}
    story["changed"]["worse"] = [change(t, -0.1, documents([t], 0), []) for t in naughty]
    story["tables"][0]["rows"] = [{**story["tables"][0]["rows"][0], "measure": text} for text in naughty]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page(story)
    assert_harmless(text)
    text.encode("utf-8")


def test_the_same_story_gives_the_same_bytes(story):
    first = page(story)
    assert page(copy.deepcopy(story)) == first
    assert page(json.loads(json.dumps(story))) == first
    rows = tuple(story["tables"])
    assert page({**story, "tables": rows, "remarks": tuple(story["remarks"])}) == first


def test_the_story_is_left_as_it_was(story):
    before = copy.deepcopy(story)
    page(story)
    assert story == before


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), None])
def test_numbers_that_are_none_are_never_printed(story, wrong):
    broken = replaced(story, float, lambda _: wrong)
    broken["averaging"]["tried"] = dict.fromkeys(("0", "1"), wrong)
    read = assert_harmless(page(broken))
    assert not re.search(r"\b(nan|inf|infinity|none|undefined)\b", read.text.lower())
    assert "nDCG@10 - - - - to - -" in read.text
    assert "svg" not in {tag for tag, _ in read.tags}, "there is nothing to draw"


def test_missing_numbers_of_a_row(story):
    del story["tables"][0]["rows"][1]["p"], story["tables"][0]["rows"][1]["low"]
    story["tables"][0]["rows"][2]["tuned"] = np.float32("nan")
    story["tables"][0]["rows"][0]["base"] = np.float64(0.5)
    read = assert_harmless(page(story))
    assert "MRR@10 0.6102 0.6658 +0.0556 - to +0.0856 -" in read.text
    assert "recall@100 0.9251 - +0.0556" in read.text and "nDCG@10 0.5000 0.7012" in read.text


def test_the_page_asks_the_network_for_nothing(story):
    text = page(story)
    policy = next(a["content"] for a in Reader(text).of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert {"default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"} <= set(policy.split("; "))
    assert "http" not in text.replace("http-equiv", "") and "//" not in text and "@import" not in text
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<style>")


def test_pictures_do_not_clash(story):
    story["tables"] *= 3
    text = page(story)
    read = assert_harmless(text)
    assert [i for i, n in Counter(read.ids).items() if n > 1] == []
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 8
    for picture in drawn:
        ElementTree.fromstring(picture)
        own = set(re.findall(r'\bid="([^"]+)"', picture))
        used = set(re.findall(r"url\(#([^)]+)\)", picture)) | set(re.findall(r'href="#([^"]+)"', picture))
        assert used and used <= own
        assert not re.search(r"(?<!, )#[0-9a-f]{6}", picture), "colours follow the page"


def test_relevant_documents_are_marked_in_words(story):
    read = Reader(page(story))
    assert sum(a.get("class") == "relevant" for a in read.of("li")) == 2
    assert len(re.findall(r"0\.\d{4} relevant ", read.text)) == 2


def test_long_texts_are_clipped_with_the_whole_behind(story):
    long = "word " * 10_000 + "end"
    story["changed"]["better"][0]["base"][0]["text"] = long
    story["examples_of_pairs"][0]["anchor"] = "short"
    text = page(story)
    assert "30,003 more characters are not shown" in text
    assert long[: pages.LONGEST] in text and long not in text
    assert "<details" in text and "A long passage about the heart. " * 40 in text
    assert pages.clip("a b") == "a b" and pages.clip("ab " * 200, 10) == "ab ab ab …"
    assert pages.clip("x" * 20, 10) == "x" * 10 + " …"


def test_halves_of_characters_and_controls_can_be_written(story):
    story["title"], story["remarks"] = "a\ud800b\x1b[31m", ["right\u202eto left", "two\nlines"]
    story["tables"][0]["rows"][0]["measure"] = story["tables"][0]["name"] = "x\udfff\x00"
    text = page(story)
    text.encode("utf-8")
    assert "a\ufffdb\ufffd[31m" in text and "two\nlines" in text and "\x00" not in text


MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("filtered", "values"),
    [
        (pages.signed, {0.05: "+0.0500", -0.05: f"{MINUS}0.0500", 0.0: "0.0000", -0.00001: "0.0000", 12.5: "+12.5000"}),
        (pages.number, {1: "1.0000", 0.12345: "0.1235", -1.5: f"{MINUS}1.5000", "0.5": "-"}),
        (pages.chance, {0.0: "< 0.0001", 0.00009: "< 0.0001", 0.0001: "0.0001", 1.0: "1.0000", None: "-"}),
        (pages.plain, {True: "yes", 12873: "12,873", 0.25: "0.25", 123456.7: "123,457", None: "-", "a": "a"}),
        (pages.percent, {0.6132: "61.3 %", None: "-"}),
    ],
)
def test_formats(filtered, values):
    assert {value: filtered(value) for value in values} == values


def lines_at(axis, colour):
    return [line for line in axis.lines if line.get_color() == colour and len(line.get_xdata()) == 2]


def test_intervals_are_drawn_where_they_lie():
    rows = [
        {"measure": "up", "change": 0.05, "low": 0.02, "high": 0.08},
        {"measure": "down", "change": -0.05, "low": -0.08, "high": -0.02},
        {"measure": "either", "change": 0.01, "low": -0.02, "high": 0.04},
        {"measure": "no interval", "change": 0.01, "low": float("nan"), "high": 0.04},
        {"measure": "nothing", "change": None, "low": 0.0, "high": 0.0},
    ]
    axis = plots.changes_plot(rows, (-0.1, 0.1)).axes[0]
    assert [list(line.get_xdata()) for line in lines_at(axis, plots.INK)] == [[0.02, 0.08]]
    assert [list(line.get_xdata()) for line in lines_at(axis, plots.ACCENT)] == [[-0.08, -0.02]]
    assert [-0.02, 0.04] in [list(line.get_xdata()) for line in lines_at(axis, "black")]
    points = [line for line in axis.lines if len(line.get_xdata()) == 1]
    marks = {line.get_ydata()[0]: (line.get_marker(), line.get_markerfacecolor()) for line in points}
    assert marks == {0: ("o", plots.INK), 1: ("s", plots.ACCENT), 2: ("o", "white"), 3: ("o", "white")}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["up", "down", "either", "no interval"]
    assert axis.get_xlim() == (-0.1, 0.1)
    assert plots.changes_plot([rows[-1]]) is None and plots.changes_plot([]) is None


def test_dimensions_ascend_and_bars_start_at_the_base():
    dims = [{"dim": d, "base": 0.4, "tuned": 0.6, "low": 0.1, "high": 0.3} for d in (384, 32, 128)]
    axis = plots.dims_plot(dims, "nDCG@10").axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["32", "128", "384"]
    bars = [list(line.get_ydata()) for line in axis.lines if line.get_color() == plots.SOFT]
    assert bars == [[pytest.approx(0.5), pytest.approx(0.7)]] * 3
    assert plots.dims_plot([{"dim": 1, "base": None, "tuned": 1.0}], "x") is None


def test_the_curve_has_a_panel_for_what_the_log_has(story):
    log = story["log"]
    titles = lambda found: [axis.get_title(loc="left") for axis in found.axes]  # noqa: E731
    assert titles(plots.measures_curve(log, "MRR@10")) == ["loss", "dev MRR@10", "learning rate"]
    assert titles(plots.measures_curve(log, "unknown")) == ["loss", "dev nDCG@10", "learning rate"]
    assert titles(plots.measures_curve([r for r in log if "loss" not in r], "x")) == ["loss", "dev nDCG@10"]
    assert titles(plots.measures_curve([r for r in log if "loss" in r], "x")) == ["loss", "learning rate"]
    assert plots.measures_curve([], "x") is None
    best = plots.measures_curve(log, "nDCG@10").axes[1].lines[-1]
    assert list(best.get_xdata()) == [40] and best.get_label() == "best 0.6400"
    long = [{"step": s, "loss": 1.0, "lr": 1e-5} for s in range(1000)]
    assert len(plots.measures_curve(long, "x").axes[0].lines[0].get_xdata()) == plots.BINS // 3


def test_svg_says_its_label_and_leaves_words_alone():
    words = 'id="x" #000000 </text><script>'

    def drawn(name):
        figure = plots.changes_plot([{"measure": words, "change": 0.1, "low": 0.0, "high": 0.2}])
        return plots.svg(figure, name, 'say "this" <b>')

    root = ElementTree.fromstring(drawn("one"))
    assert root.get("aria-label") == 'say "this" <b>'
    assert words in [element.text for element in root.iter("text")]
    assert drawn("one") == drawn("one") != drawn("two")
    assert not {"metadata", "style", "script"} & {element.tag for element in root.iter()}
