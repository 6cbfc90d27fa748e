"""An index, killed at every call that changes the disk: the old one or the new one is there, whole, and can go on."""

import json
import shutil
import signal

import pytest

from conftest import corpus
from embedtune.encoder.encode import open_encoder
from embedtune.search import index as searching
from embedtune.search.rows import Record
from reliability import ledger
from reliability.conftest import place

pytestmark = pytest.mark.target("E1")
pytest.importorskip("bm25s")
PLACE = {"watch": "start", "place": "idx"}
TEXTS = sorted({line for line in corpus(150, seed=5).split("\n") if len(line) > 12})


@pytest.fixture(scope="module")
def folder(zygote, tiny_model, tmp_path_factory):
    """A folder with idx, an index of 40 texts of which one is deleted, and files to go on with."""
    folder = place(tmp_path_factory.mktemp("index"), tiny_model("minilm"))
    for name, first, last in (("a", 0, 40), ("b", 40, 60)):
        rows = [json.dumps({"id": f"t{i}", "text": TEXTS[i], "kind": i % 2}) for i in range(first, last)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    for words in (["index", "a.jsonl", "--model", "model", "--out", "idx"], ["delete", "idx", "t7"]):
        ended = zygote.run(["search", *words], folder)
        assert ended.status == 0, ended.said
    return folder


def there(folder, encoder):
    """The ids of an index, after a check that it is whole and that every text finds itself."""
    opened = searching.open_with(folder, encoder)
    found = opened.places()
    texts = {f"t{i}": text for i, text in enumerate(TEXTS)}
    for mode in ("exact", "lexical"):
        hits = opened.search([texts[key] for key in found], 1, mode=mode)
        assert [hit[0].text for hit in hits] == [texts[key] for key in found]
    return set(found)


@pytest.mark.parametrize(
    "words, change",
    [
        (["index", "b.jsonl", "--model", "model", "--out", "idx-2"], None),
        (["add", "idx", "b.jsonl"], (set(range(40, 60)), set())),
        (["delete", "idx", "t3", "t4"], (set(), {3, 4})),
        (["compact", "idx"], (set(), set())),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_killed_at_any_call(zygote, folder, tmp_path, words, change):
    start = tmp_path / "start"
    shutil.copytree(folder, start, ignore=shutil.ignore_patterns("said-*"))
    counted = tmp_path / "counted"
    shutil.copytree(start, counted)
    ended = zygote.run(["search", *words], counted, fault={**PLACE, "kind": "count"})
    assert ended.status == 0, ended.said
    calls = next(line for line in ended.said.splitlines() if line.startswith("COUNTED ")).split("|")
    assert len(calls) > 10
    places = list(range(1, len(calls) + 1))
    ended = zygote.run(["search", *words], start, fault={**PLACE, "kind": "kill", "each": places, "to": str(tmp_path)})
    assert ended.status == 0, ended.said
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    assert set(statuses.values()) == {-signal.SIGKILL}
    encoder = open_encoder(str(folder / "model"))
    old = {f"t{i}" for i in range(40)} - {"t7"}
    seen = set()
    for number in places:
        ledger.count()
        if change is None:
            made = tmp_path / str(number) / "idx-2"
            assert not made.exists() or there(made, encoder) == {f"t{i}" for i in range(40, 60)}
            seen.add(made.exists())
            continue
        idx = tmp_path / str(number) / "idx"
        new = (old | {f"t{i}" for i in change[0]}) - {f"t{i}" for i in change[1]}
        found = there(idx, encoder)
        assert found in (old, new)
        seen.add(found == new)
        if number % 9 == 0:  # what the kill left lying about is gone after the next change
            searching.open_with(idx, encoder).add([Record("t100", "more", {})])
            opened = searching.open_with(idx, encoder)
            named = {name.split("/")[0] for name in opened.manifest.files} | {"index.json", ".lock"}
            assert {path.name for path in idx.iterdir()} == named
    if words[0] in ("add", "delete"):  # a build is counted up to the rename that publishes it
        assert seen == {True, False}
