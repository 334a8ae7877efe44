"""The kept outputs of the gallery are those of its scripts, which are not run here."""

import runpy

import pytest
from programs import ROOT

GALLERY = runpy.run_path(str(ROOT / "docs/gallery.py"))


@pytest.mark.parametrize("name", GALLERY["GALLERY"])
def test_a_script_has_not_changed_since_its_output_was_kept(name):
    page = GALLERY["page_of"](name).read_text()
    assert GALLERY["digest_of"](name) in page, f"run `make gallery`: {name} has changed"
    assert f"(../figures/{name}.svg)" in page
    assert (ROOT / f"docs/figures/{name}.svg").stat().st_size < 150_000


def test_the_gallery_shows_its_pages_and_no_other():
    names = [path.stem for path in (ROOT / "docs/gallery").glob("*.md")]
    assert sorted(names) == sorted(GALLERY["GALLERY"])
    assert (ROOT / "docs/gallery.md").read_text() == GALLERY["index"]()
