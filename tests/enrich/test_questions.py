"""Questions by a model behind an address: parsing, waiting, resuming, counting; never a key."""

import json
import sys
import traceback

import pytest

from embedtune.data.read import Counts, Row
from embedtune.encoder import calls
from embedtune.enrich.documents import documents
from embedtune.enrich.questions import GIVE_UP, Asking, Passage, Tally, parse, passages, write_questions
from embedtune.enrich.spans import write_pairs
from embedtune.errors import UserError
from service import serve

pytest.importorskip("openai")
KEY = "sk-test-0123456789abcdefSECRET"


def chat(content, tokens=(10, 5)):
    used = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": used}


def about(request):
    """Two questions that name the last word of the passage."""
    word = request["messages"][0]["content"].split()[-1].strip(".")
    return chat(json.dumps([f"What is {word}?", f"Who knows {word}?"]))


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as running:
        running.reply = about
        yield running


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(calls, "sleep", found.append)
    return found


PASSAGES = [Passage(f"f:{i}", f"A passage that speaks at length of thing{i}.") for i in range(6)]


def asking(service, **more):
    return Asking(address=service.address, model="chat", concurrency=1, **more)


def prompts(service):
    return [request["messages"][0]["content"] for request in service.requests]


def test_questions_become_pairs_in_the_order_of_the_passages(service, tmp_path):
    tally, counts = Tally(prices=(1.0, 2.0)), Counts()
    made = list(write_questions(PASSAGES, asking(service), tmp_path / "j", tally=tally, counts=counts))
    assert [(p.anchor, p.positive, p.group, p.generator) for p in made[:3]] == [
        ("What is thing0?", PASSAGES[0].text, "f:0", "questions"),
        ("Who knows thing0?", PASSAGES[0].text, "f:0", "questions"),
        ("What is thing1?", PASSAGES[1].text, "f:1", "questions"),
    ]
    assert len(made) == tally.questions == 12 and tally.passages == tally.requests == 6
    assert (tally.tokens_in, tally.tokens_out) == (60, 30) and tally.cost == pytest.approx(120e-6)
    assert counts.rows == counts.used == 6
    assert service.requests[0]["path"] == "/v1/chat/completions" and service.requests[0]["model"] == "chat"
    assert "Write 2 question(s)" in prompts(service)[0] and PASSAGES[0].text in prompts(service)[0]
    assert write_pairs(tmp_path / "pairs.jsonl", made) == 12


def test_many_at_once_give_the_same_pairs(service, tmp_path):
    one = list(write_questions(PASSAGES, asking(service), tmp_path / "one"))
    many = Asking(address=service.address, model="chat", concurrency=5)
    assert list(write_questions(PASSAGES, many, tmp_path / "many")) == one


def test_a_stopped_run_goes_on_and_a_torn_line_is_asked_again(service, waits, tmp_path):
    journal = tmp_path / "j.jsonl"
    service.script = [None, None, None, *[(500, {}, {})] * 99]
    with pytest.raises(UserError, match="HTTP 500"):
        list(write_questions(PASSAGES, asking(service), journal))
    lines = journal.read_text().splitlines()
    assert len(lines) == 3
    journal.write_text("\n".join(lines)[:-7])  # as a kill in the middle of a write leaves it
    service.script, service.requests = [], []
    tally = Tally()
    made = list(write_questions(PASSAGES, asking(service), journal, tally=tally))
    assert len(made) == 12 and tally.resumed == 2 and tally.passages == 4
    assert (tally.earlier_in, tally.tokens_in) == (20, 40)
    assert [prompt.split()[-1] for prompt in prompts(service)] == [f"thing{i}." for i in (2, 3, 4, 5)]
    service.requests = []
    assert list(write_questions(PASSAGES, asking(service), journal)) == made
    assert service.requests == [], "all is there, also behind the torn line"


def test_another_prompt_model_or_number_is_asked_anew(service, tmp_path):
    journal = tmp_path / "j"
    list(write_questions(PASSAGES, asking(service), journal))
    for changed in (
        asking(service, prompt="Ask of {passage}"),
        asking(service, per_passage=1),
        Asking(address=service.address, model="other", concurrency=1),
    ):
        service.requests = []
        list(write_questions(PASSAGES, changed, journal))
        assert len(service.requests) == 6


def test_braces_in_a_passage_and_in_a_prompt_are_left_alone(service, tmp_path):
    list(write_questions([Passage("f", "{count} {0}")], asking(service, prompt='{"x": {passage}}'), tmp_path / "j"))
    assert prompts(service) == ['{"x": {count} {0}}']


def test_a_busy_or_torn_service_is_asked_again(service, waits, tmp_path):
    service.script = [(429, {"retry-after": "2"}, {}), "torn", (503, {}, {})]
    tally = Tally()
    assert len(list(write_questions(PASSAGES[:1], asking(service), tmp_path / "j", tally=tally))) == 2
    assert waits == [2.0, 2.0, 4.0] and tally.retries == 3


def test_a_refused_passage_is_counted_and_asked_again_next_time(service, tmp_path):
    counts = Counts()
    service.script = [None, (400, {}, {"error": {"message": "content filter"}})]
    made = list(write_questions(PASSAGES, asking(service), tmp_path / "j", counts=counts))
    assert len(made) == 10 and counts.rejected == {"refused by the service": 1}
    assert counts.examples["refused by the service"] == ["f:1"]
    assert len(list(write_questions(PASSAGES, asking(service), tmp_path / "j"))) == 12


def test_a_service_that_refuses_everything_is_given_up(service, tmp_path):
    service.script = [(400, {}, {"error": {"message": f"unknown model, {KEY}"}})] * 99
    with pytest.raises(UserError, match="unknown model") as caught:
        list(write_questions(PASSAGES, asking(service), tmp_path / "j"))
    assert len(service.requests) <= GIVE_UP + 1
    assert KEY not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(UserError, match="unknown model"):
        list(write_questions(PASSAGES[:2], asking(service), tmp_path / "j"))


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_name_ends_it_at_once(service, tmp_path, status, capfd, caplog):
    said = []
    service.script = [(status, {}, {"error": {"message": f"no: {KEY}"}})] * 99
    many = Asking(address=service.address, model="chat", concurrency=3)
    with pytest.raises(UserError, match=f"HTTP {status}") as caught:
        list(write_questions(PASSAGES, many, tmp_path / "j", note=said.append))
    whole = (
        "".join(traceback.format_exception(caught.value)) + "".join(said) + caplog.text + "".join(capfd.readouterr())
    )
    assert KEY not in whole and len(service.requests) <= 3
    assert not [path for path in tmp_path.iterdir() if KEY in path.read_text()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no question in the answer"),
        ("I cannot help with that.", "no question in the answer"),
        ('["???"]', "no question in the answer"),
        ('["What does the passage say?"]', "question about the passage itself"),
        ('["' + "why " * 60 + '"]', "question too long"),
        ('["What is \\ud800?"]', "no question in the answer"),
        ('["speaks at length of"]', "question is a part of the passage"),
    ],
)
def test_answers_of_no_use_are_counted(service, tmp_path, content, reason):
    counts = Counts()
    service.script = [lambda request: chat(content)]
    assert list(write_questions(PASSAGES[:1], asking(service), tmp_path / "j", counts=counts)) == []
    assert counts.rejected == {reason: 1} and counts.rows == 1


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [None]}, {"choices": 3, "usage": "many"}])
def test_an_answer_of_another_shape_has_no_question(service, tmp_path, answer):
    service.script = [lambda request: answer]
    counts, tally = Counts(), Tally()
    list(write_questions(PASSAGES[:1], asking(service), tmp_path / "j", counts=counts, tally=tally))
    assert counts.rejected == {"no question in the answer": 1} and tally.tokens_in == 0


def test_no_more_questions_than_asked_for_and_each_once(service, tmp_path):
    service.script = [lambda request: chat('["What is it?", "what  is IT?", "Who is it?", "Where is it?"]')]
    made = list(write_questions(PASSAGES[:1], asking(service), tmp_path / "j"))
    assert [pair.anchor for pair in made] == ["What is it?", "Who is it?"]


@pytest.mark.parametrize(
    "text",
    [
        '["What is A?", "Who is B?"]',
        '```json\n["What is A?",\n "Who is B?"]\n```',
        '{"questions": ["What is A?", "Who is B?"]}',
        '{"questions": [{"question": "What is A?"}, {"question": "Who is B?"}]}',
        '[{"query": "What is A?", "why": "x"}, {"query": "Who is B?"}]',
        "Here you are [1]:\n1. What is A?\n2) **Who is B?**",
        '- "What is A?"\n\u2022 Who is B?\nI hope that this helps.',
        "Q1: What is A?\nQ2: Who is B?",
        '<think>["What is wrong?"] hm</think>["What is A?", "Who is B?"]',
        '["What is A?", "Who is B?", "And wh',
    ],
)
def test_answers_are_read_as_they_come(text):
    assert parse(text) == ["What is A?", "Who is B?"]


@pytest.mark.parametrize(
    "text", ["", "no", "[" * 5000, '{"questions": 5}', "[1, 2]", "<think>What is A?", '["", 1, []]']
)
def test_no_answer_breaks_the_reader(text):
    assert parse(text) == []


def rows(texts):
    return [Row({"text": text}, "f", number, number) for number, text in enumerate(texts, 1)]


def test_passages_are_a_sample_of_whole_sentences_that_order_does_not_change():
    texts = [" ".join(f"Sentence {i} of text {t} is here for all to see." for i in range(40)) for t in range(20)]
    ask = Asking(address="http://x/v1", model="m", most=30, max_words=60)
    found = passages(documents(rows(texts)), ask)
    assert len(found) == 30 and len({passage.text for passage in found}) == 30
    assert {passage.text for passage in passages(documents(rows(texts[::-1])), ask)} == {p.text for p in found}
    assert all(passage.text.endswith("see.") and len(passage.text.split()) <= 60 for passage in found)
    numbers = [int(passage.group.split(":")[1]) for passage in found]
    assert numbers == sorted(numbers)
    other = Asking(address="http://x/v1", model="m", most=30, max_words=60, seed=1)
    assert passages(documents(rows(texts)), other) != found
    counts = Counts()
    assert passages(documents(rows(["Too short.", texts[0], texts[0]])), ask, counts) == [
        passage._replace(group="f:2") for passage in passages(documents(rows(texts[:1])), ask)
    ]
    assert counts.rejected == {"passage too short": 3}, "and the last sentence of each text, which is left over"


def test_what_is_missing_or_cannot_be_is_said_first(service, tmp_path, monkeypatch):
    wrong = Asking(address="x", model=" ", per_passage=0, most=0, max_words=0, concurrency=0, prompt="none")
    with pytest.raises(UserError) as caught:
        list(write_questions(PASSAGES, wrong, tmp_path / "j"))
    assert len(caught.value.details) == 6
    with pytest.raises(UserError, match="is no address"):
        list(write_questions(PASSAGES, Asking(address="localhost:8000", model="m"), tmp_path / "j"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        list(write_questions(PASSAGES, asking(service), tmp_path / "j"))
    assert service.requests == []
