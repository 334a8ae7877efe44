"""Documents of files, folders, records and datasets."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from prox24._jobs.documents import documents
from prox24.errors import CalibrationError, MissingPackageError

TEXTS = ['One, "two"\nthree.', "", "Four ä."]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def chat(messages):
    return "".join(f"<{each['role']}>{each['content']}" for each in messages)


def read(source, field=None):
    return list(documents(str(source), field, chat))


def write_records(path, name="text"):
    records = [{"id": i, name: text} for i, text in enumerate(TEXTS)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return
    kind = path.suffixes[0]
    opener = {".gz": gzip, ".xz": lzma}.get(path.suffix, io)
    with opener.open(path, "wt", encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            delimiter = "\t" if kind == ".tsv" else ","
            writer = csv.DictWriter(file, ["id", name], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
        elif kind == ".json":
            json.dump(records, file, indent=1)
        else:
            file.write("\n\n".join(map(json.dumps, records)))


@pytest.mark.parametrize(
    "kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.xz"]
)
def test_records_of_every_kind_of_file(tmp_path, kind):
    write_records(tmp_path / f"a.{kind}")
    assert read(tmp_path / f"a.{kind}") == TEXTS
    if kind == "jsonl.gz":  # the names of C4
        (tmp_path / f"a.{kind}").rename(tmp_path / "c4.json.gz")
        assert read(tmp_path / "c4.json.gz") == TEXTS
    write_records(tmp_path / f"b.{kind}", "body")
    assert read(tmp_path / f"b.{kind}", "body") == TEXTS
    with pytest.raises(
        CalibrationError,
        match=rf"b.{kind}, .* no field 'text' or 'messages'; it has id, body: name one by --text-f",
    ):
        read(tmp_path / f"b.{kind}")


def test_a_folder_has_the_documents_of_its_files_by_name(tmp_path):
    for name, opener in (("c.txt.GZ", gzip), ("b/d.txt.bz2", bz2), ("a.txt.xz", lzma)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with opener.open(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
            file.write(f"{name}\r\n")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert read(tmp_path) == ["a.txt.xz\r\n", "b/d.txt.bz2\r\n", "c.txt.GZ\r\n"]
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "linked").symlink_to(tmp_path / "b")
    assert read(tmp_path / "one") == ["b/d.txt.bz2\r\n"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"empty has no file that ends in .txt, .jsonl"):
        read(tmp_path / "empty")


def test_messages_go_through_the_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    assert read(path) == ["<user>Hi<assistant>Ho"]
    path.write_text(json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(
        CalibrationError, match=r"a.jsonl, line 1: the chat template fails: 'content'"
    ):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": ',
            r"a.jsonl, line 3, is not JSON: Expecting value \(column 10\)",
        ),
        ("a.jsonl", '{"text": null}', r"line 1: 'text' is empty, neither text nor messages"),
        ("a.jsonl", '{"text": 5}', r"line 1: 'text' is int"),
        ("a.jsonl", r'{"text": "\ud83d"}', r"line 1: 'text' has half of a character"),
        ("a.jsonl", '["a"]', r"line 1, is no record of fields"),
        ("a.json", '{"text": "a"}', r"a.json holds no list of records"),
        ("a.json", "[", r"a.json is not JSON"),
        ("a.json", "[" * 200_000, r"a.json is not JSON: maximum recursion"),
        ("a.jsonl", "[" * 200_000, r"a.jsonl, line 1, cannot be read as JSON: maximum recursion"),
        ("a.jsonl", "9" * 5000, r"a.jsonl, line 1, cannot be read as JSON: Exceeds the limit"),
        ("a.csv", "id,text\n1\n", r"line 2: 'text' is empty"),
        ("a.parquet", "PAR1", r"a.parquet is no parquet file"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}', r"a.txt holds JSON: give it a name"),
        ("a.txt", '{\n "text": "a"\n}\n', r"a.txt holds JSON"),
        ("a.txt", '[\n {"text": "cut', r"a.txt holds JSON"),
        ("a.txt", '[\n "a",\n "b"\n]\n', r"a.txt holds JSON"),
        ("a.txt", 'id,"text"\r\n1,a', r"a.txt holds a table: give it a name that ends in .csv"),
        ("a", "text\tlabel\na\t1", r"a holds a table"),
        ("a.yaml", "text: a", r"a.yaml has a suffix that is not read: decompress it, or convert"),
        ("a.HTML.gz", "", r"a.HTML.gz has a suffix that is not read"),
        ("a.jsonl.zst", "", r"a.jsonl.zst has a suffix that is not read"),
        ("a.parquet.gz", "", r"a.parquet.gz has a suffix that is not read"),
        ("a.txt", b"a\xff", r"a.txt is not UTF-8 text"),
        ("a.jsonl", b"a\xff", r"a.jsonl is not UTF-8 text"),
        ("a.txt.gz", "a", r"cannot read .*a.txt.gz: Not a gzipped file"),
        ("a.jsonl.xz", "a", r"cannot read .*a.jsonl.xz: "),
    ],
)
def test_a_file_that_has_no_text_says_where(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=said):
        read(tmp_path / name)


def test_columns_of_parquet_that_are_not_asked_for_are_not_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    years = pa.array([10**9], pa.date32())  # later than any date of Python
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"when": years, "body": ["a"]}), path)
    assert read(path, "body") == ["a"]
    with pytest.raises(CalibrationError, match=r"a.parquet, .* has no field .* it has when, body"):
        read(path)
    with pytest.raises(CalibrationError, match=r"a.parquet, record 0 or later: "):
        read(path, "when")


@pytest.mark.parametrize(
    "text",
    [
        "[Illustration]\n{1} Of JSON:",
        "[1]\nAusten, J.",
        "[" * 10**5,
        "Images, text\nand sound",
        "text\nOne column.",
        "id,body\n1,a",
    ],
    ids=range(6),
)
def test_text_without_a_sure_sign_of_records_is_read(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_a_table_is_known_by_the_field_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("id,body\n1,a")
    with pytest.raises(CalibrationError, match=r"a.txt holds a table"):
        read(tmp_path / "a.txt", "body")


@pytest.mark.parametrize("source", ["/no/such.txt", "/no/such.jsonl", "/no/such.parquet"])
def test_a_file_that_is_not_there_is_named(source):
    with pytest.raises(CalibrationError, match=rf"cannot read {source}"):
        read(source)


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*place, **options):
        asked.append((*place, options))
        if place[0] == "no/such":
            raise ConnectionError("offline\nand more")
        return ({"text": text} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:allenai/c4#en:validation") == TEXTS
    assert read("hf:imdb") == TEXTS
    assert asked == [
        ("allenai/c4", "en", {"split": "validation", "streaming": True}),
        ("imdb", None, {"split": "train", "streaming": True}),
    ]
    with pytest.raises(
        CalibrationError, match=r"hf:no/such cannot be had from the hub: offline; check"
    ):
        read("hf:no/such")
    with pytest.raises(CalibrationError, match="no field 'body'; it has text"):
        read("hf:imdb", "body")
    with pytest.raises(CalibrationError, match="hf:a/b/c is not of the form"):
        read("hf:a/b/c")


@pytest.mark.parametrize(("source", "package"), [("hf:a/b", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_one_sentence(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf"needs .*{package}: pip install 'prox24\[data\]'"
    ):
        read(source)
