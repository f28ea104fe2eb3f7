"""Sphinx's settings: `make docs` builds the site, and any warning fails it."""

import re
from pathlib import Path

from sphinx.util import inspect

ROOT = Path(__file__).parent.parent

project = "isoformer"
author = "the isoformer authors"
copyright = "the isoformer authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["results/**/*.json"]

html_theme = "furo"
html_title = "isoformer"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are stored: `make notebooks` makes them
nb_merge_streams = True
nb_ipywidgets_js = {}  # nothing is fetched from elsewhere

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 90
default_role = "literal"

ELSEWHERE = "jaxlib|jax|jaxtyping|flax|numpy|optax|collections|typing|contextlib"  # modules that signatures leave out


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with names in backticks: what else reStructuredText would read into them is escaped."""
    text = "\n".join(lines)
    parts = re.split(r"(`[^`]*`|^ *>>>.*?(?=\n\s*\n|\Z))", text, flags=re.S | re.M)
    parts[::2] = [re.sub(r"([*|\\])|(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"\n{part}" if part.lstrip().startswith(">>>") else f"`{part}`" for part in parts[1::2]]
    lines[:] = "".join(parts).split("\n")


def without_aliases(app, what, name, obj, skip, options):
    """Fields of named tuples stand in the signature already."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def short_types(app, what, name, obj, options, signature, returns):
    """Types as the sources write them; a class whose metaclass hides its arguments shows those of __init__."""
    if what == "class" and signature and signature.startswith("(*args"):
        own = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(own, unqualified_typehints=True)
    return tuple(text and _as_written(text) for text in (signature, returns))


def _as_written(text):
    text = re.sub(rf"~?\b(?:{ELSEWHERE})(?:\.\w+)*\.(?=\w)", "", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = text.replace("Key[Array, ''] | UInt32[Array, '2'] | UInt32[Array, '4']", "PRNGKeyArray")
    return re.sub(r"Array \| ndarray \| bool [^,]*, ArrayTree\]", "OptState", text)


def links_that_work_here(app, docname, source):
    """In a plain checkout pages link to files beside the docs; here these are pages, or the two sides of a recipe."""
    text = source[0]
    text = text.replace("](../CONTRIBUTING.md)", "](contributing.md)")
    text = re.sub(
        r"^\[NNX\]\(\.\./bench/recipes/(\w+)_nnx\.py\)(?: · \[Equinox\]\(\.\./bench/recipes/\w+\.py\))?$",
        lambda match: _both_sides(match[1]), text, flags=re.M,
    )  # fmt: skip
    source[0] = re.sub(r"\]\(\.\./bench/recipes/(\w+)_(?:nnx|equinox)\.py\)", _recipe_link, text)


def _recipe_link(match):
    return f"](side_by_side.md#{match[1].replace('_', '-')})"


def _both_sides(task):
    """The files of a recipe as two tabs; the reader's choice holds on the whole page."""
    tabs = []
    for label, frontend in (("NNX", "nnx"), ("Equinox", "equinox")):
        file = f"bench/recipes/{task}_{frontend}.py"
        if (ROOT / file).exists():
            tabs += [f":::{{tab-item}} {label}", f":sync: {frontend}", f"```{{literalinclude}} ../{file}", "```", ":::"]
    return "\n".join(["::::{tab-set}", *tabs, "::::"])


def setup(app):
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-process-signature", short_types)
    app.connect("autodoc-skip-member", without_aliases)
    app.connect("source-read", links_that_work_here)
