"""Questions by a model behind an address: parsing, waiting, resuming, counting; never a key."""

import json
import sys
import traceback
from contextlib import closing

import pytest

from embedtune.cli import run
from embedtune.data.read import Counts, Row
from embedtune.encoder import calls
from embedtune.enrich.ask import GIVE_UP, Bill, Chat
from embedtune.enrich.documents import documents
from embedtune.enrich.questions import Asking, Passage, parse, passages, write_questions
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


def chat_of(service, model="chat", concurrency=1):
    return Chat(address=service.address, model=model, concurrency=concurrency)


def written(service, journal, wanted=PASSAGES, *, whom=None, what=None, **more):
    return list(write_questions(wanted, whom or chat_of(service), what or Asking(), journal, **more))


def prompts(service):
    return [request["messages"][0]["content"] for request in service.requests]


def test_questions_become_pairs_in_the_order_of_the_passages(service, tmp_path):
    bill, counts = Bill(prices=(1.0, 2.0)), Counts()
    made = written(service, tmp_path / "j", bill=bill, counts=counts)
    assert [(p.anchor, p.positive, p.group, p.generator) for p in made[:3]] == [
        ("What is thing0?", PASSAGES[0].text, "f:0", "questions"),
        ("Who knows thing0?", PASSAGES[0].text, "f:0", "questions"),
        ("What is thing1?", PASSAGES[1].text, "f:1", "questions"),
    ]
    assert len(made) == 12 and bill.answered == bill.requests == 6
    assert (bill.tokens_in, bill.tokens_out) == (60, 30) and bill.cost == pytest.approx(120e-6)
    assert counts.rows == counts.used == 6
    assert service.requests[0]["path"] == "/v1/chat/completions" and service.requests[0]["model"] == "chat"
    assert "Write 2 question(s)" in prompts(service)[0] and PASSAGES[0].text in prompts(service)[0]
    assert write_pairs(tmp_path / "pairs.jsonl", made) == 12


def test_many_at_once_give_the_same_pairs(service, tmp_path):
    one = written(service, tmp_path / "one")
    assert written(service, tmp_path / "many", whom=chat_of(service, concurrency=5)) == one


@pytest.mark.parametrize("concurrency", [1, 3])
def test_pairs_come_while_other_passages_are_still_to_be_asked_about(service, tmp_path, concurrency):
    journal = tmp_path / "j"
    with closing(write_questions(PASSAGES, chat_of(service, concurrency=concurrency), Asking(), journal)) as made:
        for number in range(2):
            assert [next(made).positive for _ in range(2)] == [PASSAGES[number].text] * 2
            assert len(journal.read_text().splitlines()) == number + 1, "each is kept before it is handed on"
            assert len(service.requests) <= number + concurrency
    asked = len(service.requests)
    assert asked <= 1 + concurrency
    bill = Bill()
    assert len(written(service, journal, bill=bill)) == 12
    assert bill.resumed == 2 and len(service.requests) == asked + 4, "who stops early has lost nothing that was kept"


def test_a_stopped_run_goes_on_and_a_torn_line_is_asked_again(service, waits, tmp_path):
    journal = tmp_path / "j.jsonl"
    service.script = [None, None, None, *[(500, {}, {})] * 99]
    with pytest.raises(UserError, match="HTTP 500"):
        written(service, journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == 3
    paid = [json.loads(line) for line in lines]
    assert [(entry["tokens_in"], entry["tokens_out"]) for entry in paid] == [(10, 5)] * 3
    journal.write_text("\n".join(lines)[:-7])  # as a kill in the middle of a write leaves it
    service.script, service.requests = [], []
    bill = Bill()
    made = written(service, journal, bill=bill)
    assert len(made) == 12 and bill.resumed == 2 and bill.answered == 4
    assert (bill.tokens_in, bill.tokens_out) == (40, 20), "what was paid for earlier is not in the bill"
    assert [prompt.split()[-1] for prompt in prompts(service)] == [f"thing{i}." for i in (2, 3, 4, 5)]
    service.requests = []
    assert written(service, journal) == made
    assert service.requests == [], "all is there, also behind the torn line"


def test_another_prompt_model_or_number_is_asked_anew(service, tmp_path):
    journal = tmp_path / "j"
    written(service, journal)
    for changed in (
        {"what": Asking(prompt="Ask of {passage}")},
        {"what": Asking(per_passage=1)},
        {"whom": chat_of(service, model="other")},
    ):
        service.requests = []
        written(service, journal, **changed)
        assert len(service.requests) == 6


def test_braces_in_a_passage_and_in_a_prompt_are_left_alone(service, tmp_path):
    written(service, tmp_path / "j", [Passage("f", "{count} {0}")], what=Asking(prompt='{"x": {passage}}'))
    assert prompts(service) == ['{"x": {count} {0}}']


def test_a_busy_or_torn_service_is_asked_again(service, waits, tmp_path):
    service.script = [(429, {"retry-after": "2"}, {}), "torn", (503, {}, {})]
    bill = Bill()
    assert len(written(service, tmp_path / "j", PASSAGES[:1], bill=bill)) == 2
    assert waits == [2.0, 2.0, 4.0] and bill.retries == 3


def test_a_refused_passage_is_counted_and_asked_again_next_time(service, tmp_path):
    counts = Counts()
    service.script = [None, (400, {}, {"error": {"message": "content filter"}})]
    made = written(service, tmp_path / "j", counts=counts)
    assert len(made) == 10 and counts.rejected == {"refused by the service": 1}
    assert counts.examples["refused by the service"] == ["f:1"]
    assert len(written(service, tmp_path / "j")) == 12


def test_a_service_that_refuses_everything_is_given_up(service, tmp_path):
    service.script = [(400, {}, {"error": {"message": f"unknown model, {KEY}"}})] * 99
    with pytest.raises(UserError, match="unknown model") as caught:
        written(service, tmp_path / "j")
    assert len(service.requests) <= GIVE_UP + 1
    assert KEY not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(UserError, match="unknown model"):
        written(service, tmp_path / "j", PASSAGES[:2])


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_name_ends_it_at_once(service, tmp_path, status, capfd, caplog):
    said = []
    service.script = [(status, {}, {"error": {"message": f"no: {KEY}"}})] * 99
    with pytest.raises(UserError, match=f"HTTP {status}") as caught:
        written(service, tmp_path / "j", whom=chat_of(service, concurrency=3), note=said.append)
    whole = (
        "".join(traceback.format_exception(caught.value)) + "".join(said) + caplog.text + "".join(capfd.readouterr())
    )
    assert KEY not in whole and len(service.requests) <= 3
    assert not [path for path in tmp_path.iterdir() if KEY in path.read_text()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no question in the answer"),
        ("<think>What is A?", "no question in the answer"),
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
    assert written(service, tmp_path / "j", PASSAGES[:1], counts=counts) == []
    assert counts.rejected == {reason: 1} and counts.rows == 1


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [None]}, {"choices": 3, "usage": "many"}])
def test_an_answer_of_another_shape_has_no_question(service, tmp_path, answer):
    service.script = [lambda request: answer]
    counts, bill = Counts(), Bill()
    written(service, tmp_path / "j", PASSAGES[:1], counts=counts, bill=bill)
    assert counts.rejected == {"no question in the answer": 1} and bill.tokens_in == 0


def test_what_a_model_says_while_it_thinks_is_no_question(service, tmp_path):
    service.script = [lambda request: chat('<think>["What is wrong?"] hm</think>["What is A?", "Who is B?"]')]
    made = written(service, tmp_path / "j", PASSAGES[:1])
    assert [pair.anchor for pair in made] == ["What is A?", "Who is B?"]


def test_no_more_questions_than_asked_for_and_each_once(service, tmp_path):
    service.script = [lambda request: chat('["What is it?", "what  is IT?", "Who is it?", "Where is it?"]')]
    made = written(service, tmp_path / "j", PASSAGES[:1])
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
        '["What is A?", "Who is B?", "And wh',
    ],
)
def test_answers_are_read_as_they_come(text):
    assert parse(text) == ["What is A?", "Who is B?"]


@pytest.mark.parametrize("text", ["", "no", "[" * 5000, '{"questions": 5}', "[1, 2]", '["", 1, []]'])
def test_no_answer_breaks_the_reader(text):
    assert parse(text) == []


def rows(texts):
    return [Row({"text": text}, "f", number, number) for number, text in enumerate(texts, 1)]


def test_passages_are_a_sample_of_whole_sentences_that_order_does_not_change():
    texts = [" ".join(f"Sentence {i} of text {t} is here for all to see." for i in range(40)) for t in range(20)]
    ask = Asking(most=30, max_words=60)
    found = passages(documents(rows(texts)), ask)
    assert len(found) == 30 and len({passage.text for passage in found}) == 30
    assert {passage.text for passage in passages(documents(rows(texts[::-1])), ask)} == {p.text for p in found}
    assert all(passage.text.endswith("see.") and len(passage.text.split()) <= 60 for passage in found)
    numbers = [int(passage.group.split(":")[1]) for passage in found]
    assert numbers == sorted(numbers)
    other = Asking(most=30, max_words=60, seed=1)
    assert passages(documents(rows(texts)), other) != found
    counts = Counts()
    assert passages(documents(rows(["Too short.", texts[0], texts[0]])), ask, counts) == [
        passage._replace(group="f:2") for passage in passages(documents(rows(texts[:1])), ask)
    ]
    assert counts.rejected == {"passage too short": 3}, "and the last sentence of each text, which is left over"


def test_what_is_missing_or_cannot_be_is_said_first(service, tmp_path, monkeypatch):
    wrong = Asking(per_passage=0, most=0, max_words=0, prompt="none")
    with pytest.raises(UserError) as caught:
        written(service, tmp_path / "j", whom=Chat(address="x", model=" ", concurrency=0), what=wrong)
    assert len(caught.value.details) == 6
    with pytest.raises(UserError, match="is no address"):
        written(service, tmp_path / "j", whom=Chat(address="localhost:8000", model="m"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        written(service, tmp_path / "j")
    assert service.requests == []


def test_the_command_says_what_was_asked_and_what_it_cost(service, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"This sentence is of so many words that a passage can be made of it and ends in {w}." for w in "ABC"]
    (tmp_path / "data.txt").write_text("\n".join(lines))
    words = "data pairs data.txt --out q.jsonl --lines apart --generators questions --model chat --prices 100 200"
    assert run([*words.split(), "--address", service.address]) == 0
    spent = "30 tokens read, 15 written in 3 requests, cost 0.0060"
    assert f"3 passages asked about, 0 taken from q.jsonl.journal: {spent}" in capsys.readouterr().out
    assert [json.loads(line)["anchor"] for line in (tmp_path / "q.jsonl").open()][:2] == ["What is A?", "Who knows A?"]
    assert run([*words.split(), "--force", "--address", service.address]) == 0
    assert "0 passages asked about, 3 taken from q.jsonl.journal: 0 tokens read" in capsys.readouterr().out
