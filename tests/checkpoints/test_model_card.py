"""The model card of an output: metadata and text of the source's, and what was done."""

import json

import gguf
import pytest
from huggingface_hub import ModelCard
from test_gguf import write_small
from tiny import write_tiny

from prox24._checkpoints import gguf_file
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.gguf_header import read_header
from prox24._checkpoints.model_card import source_card, write_card
from prox24.errors import CheckpointError

RESULTS = """
model-index:
- name: dense
  results:
  - task: {type: text-generation}
    dataset: {type: wikitext, name: WikiText}
    metrics: [{type: perplexity, value: 12.5}]
"""
METADATA = "license: mit\npipeline_tag: text-generation\nlanguage: [no, en]\ntags: [a, sparse]\n"
METADATA += f"base_model_relation: finetune\nlibrary_name: vllm\nwidget: [text: Once]{RESULTS}"
BODY = b"# A model\n\nof \xff somebody\n"
SECTION = "## Pruning\n\n2:4\n"


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def written(folder, source=None):
    """The bytes of the card of an output."""
    out = folder.with_name("out")
    out.mkdir()
    card = source_card(folder if source is None else source, open_checkpoint(folder))
    write_card(out, card, ["sparse", "2:4"], SECTION)
    return (out / "README.md").read_bytes()


def metadata(content):
    return ModelCard(content.decode(errors="replace")).data.to_dict()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_metadata_and_text_of_the_source_are_kept(folder, caplog, mark):
    (folder / "README.md").write_bytes(mark + f"---\n{METADATA}---\n".encode() + BODY)
    content = written(folder)
    assert content.endswith(b"\n---\n" + BODY + f"\n{SECTION}".encode())
    # Without the results and the relation to its base, which were the source's own.
    assert metadata(content) == {
        "license": "mit",
        "pipeline_tag": "text-generation",
        "language": ["no", "en"],
        "tags": ["a", "sparse", "prox24", "2:4"],
        "library_name": "transformers",
        "widget": [{"text": "Once"}],
    }
    assert not caplog.records


@pytest.mark.parametrize("card", [None, BODY])
def test_a_source_without_metadata_gets_some(folder, caplog, card):
    if card is not None:
        (folder / "README.md").write_bytes(card)
    content = written(folder)
    before = b"" if card is None else card + b"\n"
    assert content.endswith(b"\n---\n" + before + SECTION.encode())
    tags = ["prox24", "sparse", "2:4"]
    assert metadata(content) == {"tags": tags, "library_name": "transformers"}
    assert not caplog.records


FIELDS = gguf.Keys.General
REPO_URL, NAME = (key.format(id=0) for key in (FIELDS.BASE_MODEL_REPO_URL, FIELDS.BASE_MODEL_NAME))
OF_GGUF = {
    "all": (
        {
            FIELDS.LICENSE: "Apache-2.0",
            REPO_URL: "https://huggingface.co/owner/base-1B",
            NAME: "Base 1B",
            FIELDS.TAGS: ["text-generation", "no"],
        },
        {"license": "apache-2.0", "base_model": "owner/base-1B", "tags": ["text-generation", "no"]},
    ),
    "an id": ({NAME: "owner/base-1B"}, {"base_model": "owner/base-1B"}),
    "a title": ({NAME: "Base 1B"}, {}),
    "elsewhere": ({REPO_URL: "https://example.org/owner/base-1B"}, {}),
    "many": ({FIELDS.TAGS: [f"t{i}" for i in range(1000)]}, {"tags": [f"t{i}" for i in range(64)]}),
    "hostile": (
        {
            FIELDS.LICENSE: "mit\n---\n# A model",
            REPO_URL: f"owner/{'a' * 1000}",
            FIELDS.TAGS: ["a" * 65, "b: [", "c\n---\n", "\u2028", "", "---", 5, "sparse"],
        },
        {"tags": ["sparse"]},
    ),
    "types": ({FIELDS.LICENSE: 5, REPO_URL: True, NAME: [1.5], FIELDS.TAGS: 0}, {}),
}


@pytest.mark.parametrize(("stored", "expected"), OF_GGUF.values(), ids=OF_GGUF)
def test_the_short_names_of_a_gguf_are_metadata(tmp_path, monkeypatch, stored, expected):
    path = write_small(tmp_path / "model.gguf")
    fields, tensors = read_header(path)
    monkeypatch.setattr(gguf_file, "read_header", lambda path: (fields | stored, tensors))
    expected = expected | {"library_name": "transformers"}
    content = written(path)
    assert content.endswith(b"\n---\n" + SECTION.encode())
    assert content.count(b"---") == 2
    tags = list(dict.fromkeys([*expected.get("tags", []), "prox24", "sparse", "2:4"]))
    assert metadata(content) == expected | {"tags": tags}


PLACE = "/home/somebody/model"


@pytest.mark.parametrize(
    ("source", "of_card", "of_config", "expected"),
    [
        ("owner/name", "other/base", "other/model", "owner/name"),
        ("owner/name@v1", None, None, "owner/name"),
        (None, "other/base", "other/model", "other/base"),
        (None, "gpt2", None, "gpt2"),
        (None, ["a/b", "c/d"], None, ["a/b", "c/d"]),
        (None, [], None, None),
        (None, PLACE, "other/model", "other/model"),
        (None, ["a/b", PLACE], PLACE, None),
        (None, None, "./model", None),
        (None, 5, 5, None),
    ],
)
def test_the_base_model_is_an_id_of_the_hub_and_no_path(
    folder, source, of_card, of_config, expected
):
    (folder / "README.md").write_text(f"---\nbase_model: {json.dumps(of_card)}\n---\n")
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": of_config}
    (folder / "config.json").write_text(json.dumps(config))
    assert metadata(written(folder, source)).get("base_model") == expected


def test_a_folder_of_that_name_is_no_model_of_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert "base_model" not in metadata(written(folder, f"{folder.parent.name}/model"))


@pytest.mark.parametrize(
    ("tags", "expected"), [("[a, arxiv: 2401.1, [b], 3]", ["a"]), ("one", ["one"]), ("", [])]
)
def test_only_texts_are_tags(folder, tags, expected):
    (folder / "README.md").write_text(f"---\ntags: {tags}\n---\n")
    assert metadata(written(folder))["tags"] == [*expected, "prox24", "sparse", "2:4"]


@pytest.mark.parametrize("wrong", ["a: [", "- a", "1: a"])
def test_metadata_that_cannot_be_read_are_refused(folder, wrong):
    (folder / "README.md").write_text(f"---\n{wrong}\n---\n")
    with pytest.raises(CheckpointError, match=r"metadata of .*README\.md cannot be read \("):
        source_card(folder, open_checkpoint(folder))
