"""A catalogue of malformed files: data, not tests. Each is a file name with its bytes; places that are no files follow.

What makes a case is in its bytes. The name says what it is, and nothing depends on the name.
"""

import gzip
import io
import json
import os
import random
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

DEEP = 100_000
GOOD = "good line\n"


def zipped(inner=b"text", times=1):
    for _ in range(times):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../a.txt", inner)
        inner = buffer.getvalue()
    return inner


def parquet(columns=None, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns or {"text": ["one text", "another"] * 50}), buffer, **options)
    return buffer.getvalue()


def bad_utf8_cells(text, binary):
    """Cells of type `text` that are no text; `binary` is the type that holds them."""
    cells = pa.array([b"good", b"b\xe9d", b"\xed\xa0\x80", b"fine"], binary)
    return parquet({"text": pa.Array.from_buffers(text, 4, cells.buffers())})


def array(values, **options):
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CUT = {f"cut after {n} bytes": n for n in (1, 4, 8, 12, 100)}
TEXT = {
    "empty": "",
    "one LF": "\n",
    "one CR": "\r",
    "one CRLF": "\r\n",
    "one blank": " ",
    "blanks only": " \t \n\v\n\f\n",
    "unicode blanks only": "\u2003\u3000\u00a0\n\u2028\n",
    "zero width only": "\u200b\n\ufeff\n",
    "100,000 empty lines": "\n" * 100_000,
    "mark only": b"\xef\xbb\xbf",
    "mark twice": b"\xef\xbb\xbf\xef\xbb\xbftext\n",
    "mark in the middle": "a\n\ufeffb\n",
    "half a mark": b"\xef\xbb",
    "mark and blank": b"\xef\xbb\xbf\n \n",
    "utf-16 with mark": "some text\n".encode("utf-16"),
    "utf-16-le unmarked": ("some text\n" * 99).encode("utf-16-le"),
    "utf-16-be unmarked": ("some text\n" * 99).encode("utf-16-be"),
    "utf-16 odd": "text\n".encode("utf-16") + b"\0",
    "utf-16-be with mark": b"\xfe\xff\0a\0\n",
    "utf-32 with mark": "text\n".encode("utf-32"),
    "utf-32-be with mark": b"\0\0\xfe\xff\0\0\0a",
    "utf-32-le unmarked": ("text\n" * 99).encode("utf-32-le"),
    "utf-7": "caf\u00e9 +ADw-\n".encode("utf-7"),
    "latin-1": "caf\u00e9 noir\n".encode("latin-1"),
    "cp1252": "he said \u201cno\u201d\n".encode("cp1252"),
    "gbk": "\u6f22\u5b57\u6587\u672c\n".encode("gbk"),
    "shift-jis": "\u65e5\u672c\u8a9e\u306e\u6587\n".encode("shift-jis"),
    "koi8-r": "\u043f\u0440\u0438\u0432\u0435\u0442\n".encode("koi8-r"),
    "euc-kr": "\ud55c\uad6d\uc5b4\n".encode("euc-kr"),
    "big5": "\u6f22\u5b57\n".encode("big5"),
    "ebcdic": "some text".encode("cp500"),
    "overlong slash": b"ab\xc0\xafcd\n",
    "overlong nul": b"ab\xc0\x80cd\n",
    "overlong three": b"ab\xe0\x80\xafcd\n",
    "surrogate bytes": b"ab\xed\xa0\x80\n",
    "surrogate pair as cesu-8": b"\xed\xa0\xbd\xed\xb8\x80\n",
    "beyond unicode": b"ab\xf4\x90\x80\x80\n",
    "five byte form": b"\xf8\x88\x80\x80\x80\n",
    "fe and ff": b"ab\xfe\xffcd\n",
    "lone continuation": b"ab\x80cd\n",
    "cut character at the end": b"abc\xe6\xbc",
    "cut character, then a line": b"abc\xf0\x9f\x98\nnext\n",
    "cut character at a chunk's edge": b"a" * 65535 + b"\xe6\xbc",
    "one bad byte of 100,000": b"fine\n" * 20_000 + b"\xff\n",
    "nul in a line": b"ok\na\0b\n",
    "nul at the start": b"\0text\n",
    "nuls only": bytes(5000),
    "nul line": b"a\n\0\nb\n",
    "all control characters": bytes(range(32)) * 9,
    "escape sequences": b"\x1b[2J\x1b]0;title\x07 text\n",
    "separators that split nothing": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\n",
    "mixed ends": "a\rb\r\nc\nd\n\re",
    "no final end": "a\nb",
    "noncharacters": "a\ufffe\uffff\U0010ffff\n",
    "private use": "\ue000\U000f0000\n",
    "right to left": "a \u202e b \u2066 c\n",
    "combining 10,000": "a" + "\u0301" * 10_000 + "\n",
    "replacement only": "\ufffd\n",
    "line of 100,000 words": "word " * 100_000 + "\n",
    "same line 5,000 times": GOOD * 5000,
    "one line": GOOD,
    "one character": "a",
    "million a": "a" * 1_000_000,
    "random bytes": random.Random(0).randbytes(20_000),
    "every byte": bytes(range(256)) * 20,
}
OTHER = {
    "zip": zipped(),
    "zip in zip in zip": zipped(times=3),
    "empty zip": b"PK\x05\x06" + bytes(18),
    "gzip": gzip.compress(b"text"),
    "zstd": zstandard.compress(b"text"),
    "bzip2": b"BZh91AY&SY",
    "xz": b"\xfd7zXZ\0\0",
    "7z": b"7z\xbc\xaf\x27\x1c\0",
    "rar": b"Rar!\x1a\7\0",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "jpeg": b"\xff\xd8\xff\xe0" + bytes(99),
    "gif": b"GIF89a" + bytes(99),
    "pdf": b"%PDF-1.7\n",
    "rtf": b"{\\rtf1 text}",
    "old office": b"\xd0\xcf\x11\xe0" + bytes(99),
    "elf": b"\x7fELF" + bytes(99),
    "sqlite": b"SQLite format 3\0" + bytes(99),
    "tar": b"../../a" + b"\0" * 250 + b"ustar" + bytes(99),
    "parquet": parquet(),
    "pickle": b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "npy": array(np.zeros((9, 9))),
    "class file": b"\xca\xfe\xba\xbe" + bytes(99),
    "wasm": b"\0asm\1\0\0\0" + bytes(99),
    "html": "<html><body>text</body></html>\n",
    "arrow": b"ARROW1\0\0" + bytes(99),
    "git pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}
JSONL = {
    "empty": "",
    "blank lines only": "\n \n",
    "no json": "plain words\n",
    "cut object": '{"text": "a"}\n{"text": ',
    "cut string": '{"text": "a',
    "missing value": '{"text": }\n',
    "missing colon": '{"text" "a"}\n',
    "comma at the end": '{"text": "a",}\n',
    "single quotes": "{'text': 'a'}\n",
    "bare key": '{text: "a"}\n',
    "comment": '// a\n{"text": "a"}\n',
    "two on a line": '{"text": "a"}{"text": "b"}\n',
    "array of a file": '[{"text": "a"}, {"text": "b"}]\n',
    "pretty array": '[\n {"text": "a"}\n]\n',
    "pretty object": '{\n "text": "a"\n}\n',
    "number": "17\n",
    "null": "null\n",
    "true": "true\n",
    "empty object": "{}\n",
    "empty array": "[]\n",
    "empty key": '{"": "a"}\n',
    "key twice": '{"text": "a", "text": "b"}\n',
    "deep arrays": "[" * DEEP + "]" * DEEP + "\n",
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP + "\n",
    "deep beside the text": '{"text": "a", "b": ' + "[" * 900 + "]" * 900 + "}\n",
    "never closed": "[" * DEEP + "\n",
    "a million digits": '{"text": ' + "1" * 1_000_000 + "}\n",
    "million digits beside": '{"text": "a", "n": ' + "9" * 1_000_000 + "}\n",
    "4,000 digits": '{"text": "a", "score": ' + "9" * 4000 + "}\n",
    "huge exponent": '{"text": "a", "score": 1e999999}\n',
    "nan": '{"text": "a", "label": NaN}\n',
    "infinity": '{"text": "a", "score": -Infinity}\n',
    "nan text": '{"text": NaN}\n',
    "lone surrogate": '{"text": "a\\ud800b"}\n',
    "surrogates reversed": '{"text": "\\udc00\\ud800"}\n',
    "lone surrogate in a key": '{"text": "a", "k\\udfff": "b"}\n',
    "nul escape": '{"text": "a\\u0000b"}\n',
    "nul escape in a key": '{"text": "a", "k\\u0000": "b"}\n',
    "bad escape": '{"text": "a\\qb"}\n',
    "raw control": '{"text": "a\x01b"}\n',
    "raw tab": '{"text": "a\tb"}\n',
    "bad utf-8 in a string": b'{"text": "caf\xe9"}\n',
    "bad utf-8 in a key": b'{"t\xe9xt": "a"}\n',
    "utf-16": '{"text": "a"}\n'.encode("utf-16"),
    "mark": b'\xef\xbb\xbf{"text": "a"}\n',
    "mark on the second line": '{"text": "a"}\n\ufeff{"text": "b"}\n',
    "number as text": '{"text": 7}\n',
    "list as text": '{"text": ["a"]}\n',
    "object as text": '{"text": {"a": 1}}\n',
    "null text": '{"text": null}\n',
    "blank text": '{"text": " \\n "}\n',
    "typo in the key": '{"text": "a"}\n{"txet": "b"}\n',
    "other keys each line": '{"text": "a"}\n{"body": "b"}\n{"t": 1}\n',
    "10,000 keys": json.dumps({f"k{n}": n for n in range(10_000)}) + "\n",
    "key of 100,000": json.dumps({"k" * 100_000: "a"}) + "\n",
    "csv inside": "id,text\n1,a\n",
    "python repr": "{'text': None}\n",
    "separator in a string": '{"text": "a\u2028b"}\n',
    "vertical tab after": '{"text": "a"}\x0b\n',
    "nul between": b'{"text": "a"}\n\0\n{"text": "b"}\n',
    "cr only": '{"text": "a"}\r{"text": "b"}\r',
    "form feed line": '{"text": "a"}\n\f\n',
}
TABLE = {
    "empty": "",
    "header alone": "text\n",
    "header blank": "\ntext\n",
    "header twice": "text,text\na,b\n",
    "header with an empty name": "text,\na,b\n",
    "header of blanks": " , \na,b\n",
    "no header for it": "a,b\n",
    "ragged long": "text,b\n1,2\n1,2,3\n",
    "ragged short": "text,b\n1\n",
    "unclosed quote": 'text,b\n1,2\n"open,2\n3,4\n',
    "unclosed quote in the header": '"text,b\n1,2\n',
    "unclosed at the end": 'text\na\n"',
    "quote in the middle": 'text,b\n"a"b,2\n',
    "quote in an open cell": 'text\na "b" c\n',
    "quote alone": '"',
    "quotes only": '""""""\n',
    "many quotes": "text\n" + '"' * 9999 + "\n",
    "semicolons": "id;text\n1;a\n",
    "tabs in csv": "id\ttext\n1\ta\n",
    "pipes": "id|text\n1|a\n",
    "latin-1": "id,text\n1,caf\u00e9\n".encode("latin-1"),
    "latin-1 in the header": "t\u00eaxt\na\n".encode("latin-1"),
    "nul in a cell": b"text\na\0b\n",
    "nul in the header": b"te\0xt\na\n",
    "mark": b"\xef\xbb\xbftext\na\n",
    "utf-16": "text\na\n".encode("utf-16"),
    "cr only": "text\ra\rb\r",
    "line end in a cell": 'text\n"a\nb"\n',
    "blank lines between": "text\n\n\na\n",
    "100,000 columns": ",".join(f"c{n}" for n in range(100_000)) + "\n",
    "cell of a megabyte": "text\n" + "a" * 1_000_000 + "\n",
    "formula": "text\n=cmd|'/C calc'!A0\n",
    "sep line": "sep=;\ntext;b\na;c\n",
    "escape by backslash": 'text,b\n"a\\"b",c\n',
    "surrogate bytes": b"text\na\xed\xa0\x80\n",
    "binary cells": b"text\n" + bytes(range(1, 9)) + b"\n",
    "blank cells": "text,b\n,\n ,\n",
    "html table": "<table><tr><td>text</td></tr></table>\n",
    "nan label": "text,label\na,nan\nb,NaN\n",
    "infinite score": "text,score\na,inf\nb,-1e999\n",
    "empty label": "text,label\na,\nb,x\n",
    "empty pair": "anchor,positive\na,\n,b\n",
    "same pair": "anchor,positive\na,a\n",
    "score of words": "sentence1,sentence2,score\na,b,high\n",
    "score of many digits": "sentence1,sentence2,score\na,b," + "9" * 5000 + "\n",
    "hexadecimal score": "sentence1,sentence2,score\na,b,0x1p3\n",
    "underscored score": "sentence1,sentence2,score\na,b,1_0\n",
    "arabic digits": "text,label\na,\u0661\nb,\u0662\n",
    "label of a line end": 'text,label\na,"x\ny"\n',
    "label with a nul": b"text,label\na,x\0\n",
    "label of 100,000": "text,label\na," + "l" * 100_000 + "\n",
}
TAGGED = {
    "empty": "",
    "no tags": "EU\nrejects\n",
    "a tag of no form": "EU\tXYZ-b\n\n",
    "tag of numbers": "EU\t3\n",
    "inside at the start": "EU\tI-ORG\nx\tE-ORG\n",
    "schemes mixed": "a\tB-x\nb\tE-x\nc\tI-y\nd\tU-z\n",
    "empty token": "\tB-x\n",
    "bad utf-8": b"caf\xe9\tB-x\n",
    "nul": b"a\0\tO\n",
    "only comments": "# one\n# two\n",
    "only docstarts": "-DOCSTART- O\n\n",
    "blank tag": "a\t \n",
    "one sentence of 50,000": "a\tO\n" * 50_000,
    "separators": "a\u2028b\tO\n",
    "tag of 10,000": "a\tB-" + "x" * 10_000 + "\n",
    "cr": "a\tO\rb\tO\r\r",
    "utf-16": "a\tO\n".encode("utf-16"),
    "zip": zipped(),
}
LISTS = {
    "tokens differ": lines({"tokens": ["a", "b"], "tags": ["O"]}),
    "tags of null": lines({"tokens": ["a"], "tags": [None]}),
    "tokens of numbers": lines({"tokens": [1], "tags": ["O"]}),
    "tokens no list": lines({"tokens": "a b", "tags": "O O"}),
    "empty lists": lines({"tokens": [], "tags": []}),
    "nested lists": lines({"tokens": [["a"]], "tags": [["O"]]}),
    "span out of range": lines({"tokens": ["a"], "tags": ["B-x", "I-x"]}),
    "labels nested": lines({"text": "a", "label": [["x"]]}),
    "labels of objects": lines({"text": "a", "label": {"x": 1}}),
    "labels mixed": lines({"text": "a", "label": "x"}, {"text": "b", "label": 1}, {"text": "c", "label": ["x", 2]}),
    "label null": lines({"text": "a", "label": None}),
    "score of true": lines({"text": "a", "score": True}),
    "score list": lines({"sentence1": "a", "sentence2": "b", "score": [1]}),
    "score huge": '{"sentence1": "a", "sentence2": "b", "score": ' + "9" * 4000 + "}\n",
    "score nan": '{"sentence1": "a", "sentence2": "b", "score": NaN}\n',
    "score huge, graded": '{"text": "a", "score": ' + "9" * 4000 + "}\n",
    "label huge": '{"text": "a", "label": ' + "9" * 4000 + "}\n",
    "anchor list": lines({"anchor": ["a"], "positive": ["b", 7]}),
    "positives nested": lines({"anchor": "a", "positive": [["b"]]}),
    "negative object": lines({"anchor": "a", "positive": "b", "negative": {"c": 1}}),
    "votes of nonsense": lines({"query": "a", "verdict": "up"}, {"query": 7, "verdict": [], "text": None}),
    "id huge": '{"_id": ' + "9" * 4000 + ', "text": "a"}\n',
    "id null": lines({"_id": None, "text": "a"}),
    "id of a list": lines({"_id": ["x"], "text": "a"}),
    "ids twice": lines({"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}),
    "title no text": lines({"_id": "a", "title": 7, "text": "x"}),
}
PARQUET = {
    "empty": b"",
    "no parquet": b"text\n",
    "magic alone": b"PAR1",
    "magic twice": b"PAR1PAR1",
    "huge footer": b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
    "negative footer": b"PAR1" + bytes(40) + b"\xff\xff\xff\xffPAR1",
    "no rows": parquet({"text": pa.array([], pa.string())}),
    "nulls only": parquet({"text": pa.nulls(5, pa.string())}),
    "null type": parquet({"text": pa.nulls(5)}),
    "no columns": parquet({"n": [1, 2]}),
    "bytes as text": parquet({"text": pa.array([b"a\xff", b"b"])}),
    "bad utf-8 cells": bad_utf8_cells(pa.string(), pa.binary()),
    "bad utf-8 cells, large": bad_utf8_cells(pa.large_string(), pa.large_binary()),
    "lists as text": parquet({"text": [["a"], ["b"]]}),
    "structs as text": parquet({"text": [{"a": 1}]}),
    "two text columns": parquet({"a": ["x"], "b": ["y"]}),
    "nul in a cell": parquet({"text": ["a\0b"]}),
    "dates as text": parquet({"text": pa.array([0, 2**62], pa.timestamp("ns"))}),
    "year 300,000": parquet({"text": ["a"], "when": pa.array([2**62], pa.timestamp("us"))}),
    "decimals": parquet({"text": ["a"], "score": pa.array([1], pa.int64()).cast(pa.decimal128(38, 2))}),
    "nan scores": parquet({"text": ["a", "b"], "score": [float("nan"), float("inf")]}),
    "a column whose name is not utf-8": parquet().replace(b"text", b"te\xfft"),
    "without the last bytes": parquet()[:-9],
    "without the first bytes": parquet()[9:],
    "half": parquet()[: len(parquet()) // 2],
    "footer of another": parquet()[:40] + parquet({"x": [1]})[-200:],
    **{f"bit flipped at {n} of 16": flipped(parquet(), n * (len(parquet()) - 1) // 16) for n in range(17)},
}
PACKERS = {".gz": gzip.compress, ".zst": zstandard.compress}


def packed(packing):
    """What goes wrong with packed files: damage first, then what is wrong inside."""
    pack = PACKERS[packing]
    body = pack(random.Random(1).randbytes(3000).hex().encode() + b"\n")
    inside = {
        "latin-1 inside": "caf\u00e9\n".encode("latin-1"),
        "utf-16 inside": "a\n".encode("utf-16"),
        "empty inside": b"",
        "zip inside": zipped(),
        "nuls inside": bytes(9999),
    }
    return {
        "empty": b"",
        "plain text": b"plain text\n",
        "magic alone": body[:4],
        "twice": pack(pack(b"text\n")),
        "and more": pack(b"text\n") + b"more",
        "nuls after": pack(b"text\n") + bytes(64),
        "bit flipped": flipped(body, len(body) // 2),
        "header flipped": flipped(body, 3),
        "sum flipped": flipped(body, len(body) - 6),
        "two, the second cut": pack(b"text\n") + body[:-7],
        **{f"{name} from the end": body[:-n] for name, n in CUT.items()},
        **{name: pack(content) for name, content in inside.items()},
    }


def of(folder, ending, cases):
    return {f"{folder}: {name}": ("a" + ending, c if isinstance(c, bytes) else c.encode()) for name, c in cases.items()}


FILES = {
    **of("txt", ".txt", TEXT),
    **of("not text", ".txt", OTHER),
    **of("not a table", ".csv", {k: OTHER[k] for k in ("zip", "png", "parquet", "pickle", "html")}),
    **of("jsonl", ".jsonl", JSONL),
    **of("lists", ".jsonl", LISTS),
    **of("csv", ".csv", TABLE),
    **of("tsv", ".tsv", {k: v.replace(",", "\t") for k, v in TABLE.items() if isinstance(v, str)}),
    **of("parquet", ".parquet", PARQUET),
    **of("conll", ".conll", TAGGED),
    **of("gz", ".txt.gz", packed(".gz")),
    **of("zst", ".jsonl.zst", packed(".zst")),
    **of(
        "parquet.gz",
        ".parquet.gz",
        {
            "no parquet": gzip.compress(b"text"),
            "cut": gzip.compress(parquet())[:-9],
            "flipped inside": gzip.compress(flipped(parquet(), 60)),
        },
    ),
    **of("ending", "", {"none": GOOD}),
    **of("ending", ".docx", {"unknown": GOOD}),
    **of("ending", ".txt.zip", {"zip": zipped()}),
    **of("ending", ".pkl", {"pickle": OTHER["pickle"]}),
}


def _written(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def _linked(folder, name, target):
    (folder / name).symlink_to(target)
    return folder / name


def _made(folder, call, name):
    call(folder / name)
    return folder / name


def _loop(folder):
    _linked(folder, "b.txt", "a.txt")
    return _linked(folder, "a.txt", "b.txt")


def _inside(folder, name, make):
    """A folder with one good file beside the bad one."""
    _written(folder, "dir/good.txt", GOOD.encode())
    make(folder / "dir" / name)
    return folder / "dir"


# Places that are no file with text in it: name -> a function of an empty folder that gives the path.
PLACES = {
    "absent": lambda folder: folder / "absent.txt",
    "absent, under a file": lambda folder: _written(folder, "a.txt", b"a") / "b.txt",
    "no name": lambda folder: "",
    "name with a nul": lambda folder: f"{folder}/a\0b.txt",
    "name of 5,000": lambda folder: f"{folder}/{'a' * 5000}.txt",
    "path of 10,000": lambda folder: f"{folder}/{'a/' * 5000}a.txt",
    "name that is no utf-8": lambda folder: os.fsdecode(
        bytes(_written(folder, "x.txt", b"a").with_name("caf")) + b"\xe9.txt"
    ),
    "empty folder": lambda folder: folder,
    "folder named as a file": lambda folder: _made(folder, os.mkdir, "a.txt"),
    "folder of other files": lambda folder: _written(folder, "dir/a.docx", b"a").parent,
    "folder with a pipe": lambda folder: _inside(folder, "pipe.txt", os.mkfifo),
    "folder with a dangling link": lambda folder: _inside(folder, "gone.txt", lambda p: p.symlink_to("nowhere")),
    "folder with a link to a device": lambda folder: _inside(folder, "zero.txt", lambda p: p.symlink_to("/dev/zero")),
    "folder that links to itself": lambda folder: (
        _inside(folder, "again", lambda p: p.symlink_to("..")) / "again" / "dir" / "none.txt"
    ),
    "folder in a name that is no utf-8": lambda folder: _inside(
        folder, "x", lambda p: open(bytes(p.parent) + b"/caf\xe9.txt", "wb").close()
    ),
    "dangling link": lambda folder: _linked(folder, "a.txt", "nowhere.txt"),
    "link to itself": lambda folder: _linked(folder, "a.txt", "a.txt"),
    "two links in a circle": _loop,
    "link to a device": lambda folder: _linked(folder, "a.txt", "/dev/zero"),
    "pipe": lambda folder: _made(folder, os.mkfifo, "pipe.txt"),
    "/dev/zero": lambda folder: "/dev/zero",
    "/dev/null": lambda folder: "/dev/null",
    "/dev/full": lambda folder: "/dev/full",
    "/dev/stdin": lambda folder: "/dev/stdin",
    "file of another's memory": lambda folder: "/proc/self/mem",
}

HEAD = "query-id\tcorpus-id\tscore\n"
QRELS = {
    "score of words": HEAD + "q\ta\tmany\n",
    "score of a half": HEAD + "q\ta\t0.5\n",
    "score of 5,000 digits": HEAD + "q\ta\t" + "9" * 5000 + "\n",
    "unknown ids": HEAD + "z\tz\t1\n",
    "judged twice": HEAD + "q\ta\t1\nq\ta\t2\n",
    "nothing relevant": HEAD + "q\ta\t0\n",
    "of the TREC form": "q 0 a 1\n",
    "header alone": HEAD,
}

# ---- small files that are read whole: recipes, settings, manifests; and arrays

TOML = {
    "empty": "",
    "no toml": "plain words",
    "cut": "train = ",
    "cut string": 'train = "a',
    "key twice": 'train = "a"\ntrain = "b"\n',
    "table twice": "[loop]\nlr = 1e-5\n[loop]\nlr = 1e-4\n",
    "table as a value": "loop = 3\n",
    "value as a table": "[train]\na = 1\n",
    "deep": "a = " + "[" * 5000 + "]" * 5000,
    "deep dotted": ".".join("a" * 3000) + " = 1",
    "million digits": "seed = " + "9" * 1_000_000,
    "nan": "[loop]\nlr = nan\n",
    "infinite": "[loop]\nepochs = inf\n",
    "dates": "train = 1979-05-27\n",
    "mixed array": 'train = ["a", 1, {b = 2}]\n',
    "unknown keys": "".join(f"key{n} = {n}\n" for n in range(500)),
    "key of 100,000": "k" * 100_000 + " = 1",
    "nul": 'train = "a\0b"',
    "nul escape": 'train = "a\\u0000b.txt"',
    "surrogate escape": 'train = "a\\ud800"',
    "latin-1": 'train = "caf\u00e9"'.encode("latin-1"),
    "utf-16": 'train = "a"'.encode("utf-16"),
    "mark": b"\xef\xbb\xbftrain = 3\n",
    "yaml": "train: a.txt\nloop:\n  lr: 2e-5\n",
    "json": '{"train": "a.txt"}',
    "another task": 'task = "wibble"\n',
    "task of another type": "task = 7\n",
    "interpolation": 'train = "${HOME}/`id`/{{7*7}}"\n',
    "zip": zipped(),
    "pickle": OTHER["pickle"],
    "five megabytes": "#" * 5_000_000,
}
ARRAYS = {
    **{name: OTHER[name] for name in ("zip", "pickle", "png", "gzip", "parquet")},
    "empty": b"",
    "text": b"1.0 2.0\n",
    "objects": array(np.array([{}, None], object), allow_pickle=True),
    "not finite": array(np.array([np.nan, np.inf])),
    "zeros": array(np.zeros(8)),
    "of no length": array(np.zeros(0)),
    "a number": array(np.float64(3)),
    "whole numbers": array(np.arange(8)),
    "texts": array(np.array(["a", "b"])),
    "records": array(np.zeros(3, [("a", "f4"), ("b", "i8")])),
    "three sides": array(np.ones((2, 2, 2))),
    "cut": array(np.ones(99))[:-9],
    "cut in the head": array(np.ones(99))[:40],
    "version 9": b"\x93NUMPY\x09\0" + array(np.ones(9))[8:],
    "huge shape": array(np.ones(9)).replace(b"(9,), ", b"(999999999999,),")[:128],
    "head that is code": b"\x93NUMPY\x01\0\x40\0" + b"__import__('os').getcwd()".ljust(63) + b"\n",
    "npz": zipped(array(np.ones(3))),
    "huge header": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    "header of garbage": b"\x08\0\0\0\0\0\0\0notjson!",
    "overlapping": (lambda head: len(head).to_bytes(8, "little") + head + bytes(8))(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,8]}}'
    ),
    "shape that overflows": (lambda head: len(head).to_bytes(8, "little") + head + bytes(8))(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'
    ),
    "dtype unknown": (lambda head: len(head).to_bytes(8, "little") + head + bytes(8))(
        b'{"a":{"dtype":"OBJ","shape":[2],"data_offsets":[0,8]}}'
    ),
}
