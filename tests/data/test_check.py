import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from embedtune.data import check as check_module
from embedtune.data.check import check
from embedtune.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; w0 to w9 are known; [CLS] and [SEP] are added."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i + 3 for i in range(10)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.enable_truncation(4)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def distinct(n):
    return [f"w{i % 10} number {i} of text {i * 7919}" for i in range(n)]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_good_data_is_ready(tmp_path):
    found = check(write(tmp_path, "a.txt", "\n".join(distinct(200))))
    assert found.verdict == "ready" and found.remarks == []
    assert (found.rows, found.used, found.documents, found.formats) == (200, 200, 1, [".txt"])
    assert found.lengths.unit == "words" and found.lengths.max == 6
    assert found.lines()[-1] == "verdict     ready"
    json.dumps(found.as_dict(), allow_nan=False)


def test_all_problems_are_listed_together(tmp_path):
    write(tmp_path, "a.txt", "\n".join(distinct(100)).encode() + b"\ncaf\xe9 noir\nn\0l\n\n")
    write(tmp_path, "b.jsonl", '{"text": "a"}\n{"text": 7}\n{nonsense\n')
    write(tmp_path, "c.txt", b"%PDF-1.7")
    write(tmp_path, "d.csv", "a,b\n1,2\n")
    found = check(tmp_path)
    assert found.verdict == "not usable" and found.used == 101 and found.documents == 2
    assert found.rejected == {"not UTF-8": 1, "NUL": 1, "blank": 1, "not text": 1, "not JSON": 1}
    report = "\n".join(found.lines())
    for part in ("PDF document", "expected a column 'text', found 'a', 'b'", "iconv -f latin-1", "a.txt, line 102"):
        assert part in report
    assert all(remark.fix for remark in found.remarks)
    assert found.rows == found.used + sum(found.rejected.values())


def test_bad_rows_alone_are_remarks(tmp_path):
    found = check(write(tmp_path, "a.txt", "\n".join(distinct(200)).encode() + b"\n\xff\n"))
    assert found.verdict == "usable, with remarks" and found.encoding == "not UTF-8 throughout"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfea\0", b"\xff\n\xfe\n"])
def test_unusable(tmp_path, content):
    found = check(write(tmp_path, "a.txt", content))
    assert found.verdict == "not usable" and found.remarks
    assert found.lines()


def test_nothing_to_examine_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        check(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="no fast tokenizer"):
        check(["a"], tokenizer=object())


def test_token_lengths(tokenizer):
    rows = ["w0 w1", "w2 strange", "w3 " * 9]
    found = check(rows, tokenizer=tokenizer, max_length=5)
    lengths = found.lengths
    assert (lengths.unit, lengths.mean, lengths.median, lengths.max) == ("tokens", (4 + 4 + 11) / 3, 4, 11)
    assert (lengths.longer, lengths.pieces) == (1, 3)  # 9 tokens, 3 to a chunk beside [CLS] and [SEP]
    assert found.unknown_share == 1 / 13
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4  # the user's own is left as it was


def test_long_rows_are_measured_in_pieces(tokenizer, monkeypatch):
    rows = ["w1 " * 5000, "w2", "x" * 3000, "w3 w4 " * 700]
    whole = check(rows, tokenizer=tokenizer)
    monkeypatch.setattr(check_module, "PIECE", 100)
    monkeypatch.setattr(check_module, "BATCH_CHARACTERS", 1000)
    found = check(rows[:2] + rows[3:], tokenizer=tokenizer)
    assert found.lengths.max == whole.lengths.max == 5002
    assert found.lengths.mean == (5002 + 3 + 1402) / 3


def test_duplicates_are_remarked(monkeypatch):
    rows = distinct(200) + distinct(20) + [f"{text} more" for text in distinct(200)[:30]]
    found = check(rows)
    assert found.exact_duplicates == 20 and not found.exact_duplicates_estimated
    assert "repeat an earlier one" in found.remarks[0].what
    monkeypatch.setattr(check_module, "NEAR_ROWS", 50)
    assert "first 50 rows only" in "\n".join(check(rows).lines())


def test_real_data(real_data, tmp_path):
    found = check(real_data("rotten_tomatoes/train.csv"))
    assert (found.verdict, found.rows, found.used) == ("ready", 8530, 8530)
    raw = write(tmp_path, "neg.txt", real_data("rotten_tomatoes/rt-polarity.neg").read_bytes())
    found = check(raw)
    assert found.rejected == {"not UTF-8": found.rows - found.used} and found.rows == 5331
    assert "iconv -f latin-1" in found.remarks[0].fix
