"""Configuration of Sphinx: `make docs` builds the pages into docs/_build/html.

The build needs no network: no inventory of another project is downloaded unless
SAMPIMP_INTERSPHINX is set. It runs the scripts of examples/ (sphinx-gallery) and the notebook pages
(MyST-NB), about a minute on two cores, and repeats only those that changed.

Map: project, extensions, pages (MyST), notebooks, gallery, API, HTML, formulas, docstrings.
"""

import os
import re
from textwrap import indent
from types import GenericAlias
from typing import Any

import matplotlib as mpl
from docutils import nodes
from latex2mathml.converter import convert

from sampimp.schema import __version__

# Project

project = "sampimp"
author = "The sampimp authors"
copyright = "The sampimp authors"
version = release = __version__

# Extensions

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
if os.environ.get("SAMPIMP_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "numpy": ("https://numpy.org/doc/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
        "xarray": ("https://docs.xarray.dev/en/stable/", None),
    }
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "sg_execution_times.rst"]
default_role = "code"  # docstrings write `names` in single backticks

# Pages

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# Notebooks: pages with {code-cell} are executed, all others are plain MyST.

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Gallery

mpl.use("agg")  # before sphinx-gallery runs the examples
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks; before torch is imported

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "sphinx_gallery.sorting.NumberOfCodeLinesSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1_000,
    "abort_on_example_error": True,
}

# API

autosummary_generate = ["api/index.rst"]
autodoc_typehints = "none"  # numpydoc's sections describe the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
# Not nitpicky: names of torch and xarray would need inventories from the network.

# HTML

html_theme = "pydata_sphinx_theme"
html_title = "sampimp"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["sampimp.css"]
html_show_sourcelink = False
html_sidebars = {"index": [], "start": []}  # pages without a section
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
}

# Formulas: MathML, which browsers display without a script from a server.

html_math_renderer = "mathml"


def _add_inline_formula(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _add_displayed_formula(translator: Any, node: nodes.math_block) -> None:
    formula = convert(node.astext(), display="block")
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


# Docstrings


COLUMNS = re.compile(r"^(?!.*>>>)\S.*\S {3,}\S", re.MULTILINE)
PIPE = re.compile(r"\|(?=[^`]*(?:`[^`]*`[^`]*)*$)")  # outside of backticks


def _prepare_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Mark up what docstrings leave plain: diagrams and aligned columns of modules, norms |x|."""
    if what == "module":
        blocks: list[str] = []
        for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
            is_diagram = block.startswith("    ")
            is_literal = blocks and (blocks[-1].endswith("::") or blocks[-1].startswith("    "))
            if (is_diagram and not is_literal) or ("===" not in block and COLUMNS.search(block)):
                blocks += [".. code-block:: text", indent(block, "    ")]
            else:
                blocks.append(block)
        lines[:] = "\n\n".join([*blocks, ""]).split("\n")
    lines[:] = [
        line if line.startswith("    ") or ">>>" in line else PIPE.sub(r"\|", line)
        for line in lines
    ]


def _skip_type_aliases(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out aliases such as `tuple[float, float]`, which numpydoc takes for classes."""
    return True if isinstance(obj, GenericAlias) else None


def setup(app: Any) -> None:
    """Register the renderer of formulas and the markup of docstrings."""
    app.add_html_math_renderer(
        "mathml", (_add_inline_formula, None), (_add_displayed_formula, None)
    )
    app.connect("autodoc-process-docstring", _prepare_docstring)
    app.connect("autodoc-skip-member", _skip_type_aliases)
