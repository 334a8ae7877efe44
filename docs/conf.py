"""The site: Sphinx reads the pages of this folder, and the reference comes from docstrings.

`make docs` builds it into build/docs. Every warning is an error, and nothing is downloaded.
"""

import re
from importlib import import_module
from pathlib import Path

from jax.typing import ArrayLike
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import prox24

project = "prox24"
author = "The prox24 authors"
version = release = prox24.__version__
project_copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]

# Pages. GitHub shows them too: links are relative paths, and anchors are GitHub's.
myst_heading_anchors = 4
highlight_language = "none"
smartquotes = False  # of mathematics in plain text

# The reference.
nitpicky = True
nitpick_ignore_regex = [
    # `code` of docstrings becomes a link where it names something of the reference.
    ("py:obj", ".*"),
    # Other packages have sites of their own, and these would have to be downloaded.
    ("py:.*", r"(collections|jax|numpy|optax|pathlib|torch|typing)\..*"),
    ("py:.*", "ArrayLike|ArrayTree|PreTrainedTokenizerBase"),
    ("py:.*", r"prox24\.(_.*|basis\.AnyArray)"),  # type variables, and what is private
]
default_role = "py:obj"
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_mock_imports = ["lm_eval"]
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = f"prox24 {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search is in the sidebar
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}


def public_names():
    """The full name of everything that the reference has to hold, each object once."""
    names = {f"prox24.{name}" for name in prox24.__all__ if name != "planes"}
    for module in [*prox24._SUBMODULES, "lm_eval"]:
        found = import_module(f"prox24.{module}")
        members = getattr(found, "__all__", None) or [
            name
            for name, member in vars(found).items()
            if not name.startswith("_") and getattr(member, "__module__", "") == found.__name__
        ]
        names |= {
            f"prox24.{module}.{name}"
            for name in members
            if getattr(found, name) is not getattr(prox24, name, None)
        }
    return names


INCLUDE = re.compile(r"```{include} (\.\./\S+)")
PAGES = {path.name: INCLUDE.search(path.read_text()) for path in Path(__file__).parent.glob("*.md")}


def to_pages(app, name, source):
    """Makes of a link to a file of the repository one to the page of the site that includes it."""
    for page, include in PAGES.items():
        if include:
            source[0] = source[0].replace(f"]({include[1]}", f"]({page}")


SECTIONS = ("Args:", "Attributes:", "Example:", "Raises:", "References:", "Returns:")
CODE = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
PAGE = re.compile(r"docs/([a-z-]+)\.md")


def escaped(text):
    """Prose of a docstring as reStructuredText that shows the same characters."""
    text = re.sub(r"^(\s*[A-Za-z])\.(?=\s|$)", r"\1\\.", text)  # else the first item of a list
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):  # code is at the odd places
        parts[i] = re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", parts[i])
        parts[i] = PAGE.sub(r":doc:`docs/\1.md </\1>`", parts[i])
    return "".join(parts)


def paragraphs(lines):
    """Runs of lines without a blank one."""
    start = None
    for place, line in enumerate([*lines, ""]):
        if line.strip() and start is None:
            start = place
        elif not line.strip() and start is not None:
            yield lines[start:place]
            start = None


def to_markup(app, what, name, obj, options, lines):
    """Makes reStructuredText of the plain text of a docstring, before napoleon has its sections.

    Indented text is a formula: it keeps its lines. Examples stay as they are.
    """
    # With a comment first, napoleon takes nothing that stands before a colon for a type.
    made = ["..", ""] if what in ("attribute", "property") else []
    section, literal = None, False
    for paragraph in paragraphs(lines):
        indented = paragraph[0].startswith(" ")
        if paragraph[0] in SECTIONS:
            section, indented = paragraph[0], False
        elif not indented:
            section = None
        literal = indented and (literal or made[-2].endswith("::"))
        if literal or any(line.lstrip().startswith(">>>") for line in paragraph):
            made += paragraph
        elif indented and section is None:
            made += ["::", "", *paragraph]
        else:
            text = "\n".join(paragraph)
            head = re.compile(r"(?m)^(  \*{0,2}\w+:)") if section in SECTIONS[:2] else None
            parts = head.split(text) if head else [text]
            made += "".join(
                part if head and head.fullmatch(part) else escaped(part) for part in parts
            ).split("\n")
        made.append("")
    lines[:] = made


INTEGERS = re.compile(r"~numpy\.ndarray\[tuple\[[^]]*\], ~numpy\.dtype\[[^]]*\]\]")


def shorter(app, what, name, obj, options, signature, returned):
    """Writes short names of types of arrays, and of defaults with many fields."""

    def short(text):
        text = (text or "").replace(stringify_annotation(ArrayLike, "smart"), "ArrayLike")
        for default in (prox24.ADMM(), prox24.ConjugateGradients()):
            text = text.replace(repr(default), f"{type(default).__name__}()")
        return INTEGERS.sub("~numpy.ndarray", text) or None

    return short(signature), short(returned)


def without_counts(app, what, name, obj, skip, options):
    """Leaves out what Python itself says of the fields of a named tuple."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def to_public(app, env, node, contnode):
    """Links a class in a signature to its public name. The signature names its private module."""
    name = node.get("reftarget", "").rpartition(".")[2]
    inventory = env.domains.python_domain.objects
    for module in ("prox24", *(f"prox24.{module}" for module in prox24._SUBMODULES)):
        if f"{module}.{name}" in inventory:
            return env.domains.python_domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", f"{module}.{name}", node, contnode
            )
    return None


def nothing_missing(app, env):
    """Warns of each public name without a page."""
    for name in sorted(public_names() - set(env.domains.python_domain.objects)):
        logging.getLogger(__name__).warning("%s is on no page of docs/api", name)


def setup(app):
    """Connects the functions above."""
    app.connect("source-read", to_pages)
    app.connect("autodoc-process-docstring", to_markup, priority=400)  # napoleon has 500
    app.connect("autodoc-process-signature", shorter)
    app.connect("autodoc-skip-member", without_counts)
    app.connect("missing-reference", to_public)
    app.connect("env-check-consistency", nothing_missing)
