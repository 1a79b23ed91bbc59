"""Sphinx configuration of the documentation; ``make docs`` builds it into build/docs."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import latex2mathml.converter
import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from sphinx_gallery.sorting import FileNameSortKey

import pyro_vje
from pyro_vje.cli import COMMANDS

HERE = Path(__file__).parent
logging.getLogger("pyro_vje").setLevel(logging.WARNING)  # the tutorials show what their scripts print

project = "pyro_vje"
author = "the authors of pyro_vje"
copyright = "2026, the authors of pyro_vje"
version = release = pyro_vje.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",  # the directive, which inherited docstrings of Pyro use
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["plots", "tutorials/README.rst"]
suppress_warnings = [
    "config.cache",  # the order of the gallery is a class, which Sphinx does not keep between builds
    "ref.python",  # one backtick may name a parameter, of which several classes have one of that name
]

# Markdown, in which GitHub and the site show the same.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# Docstrings are NumPy-like; one backtick names an object, a link where there is one.
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and units beside the type
autodoc_default_options = {"members": True, "show-inheritance": True}

# Tutorials are the scripts of examples/: the build runs them, and one that fails ends it.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"(^|/)[^\d/][^/]*\.py$",
    "within_subsection_order": FileNameSortKey,
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 3600,
    "remove_config_comments": True,
    "capture_repr": (),
    "image_srcset": ["2x"],
    "write_computation_times": False,
}

plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = True
plot_rcparams = {"savefig.bbox": "tight"}
plot_basedir = str(HERE)

html_theme = "furo"
html_title = f"pyro_vje {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
copybutton_exclude = ".linenos, .gp"


# A page for each command: one that all would share is too long.
COMMAND = """# {0}

```{{eval-rst}}
.. click:: pyro_vje.cli.{1}:{0}
   :prog: pyro-vje {0}
   :nested: full
```
"""
for command, file in COMMANDS.items():
    (HERE / "commands" / f"{command}.md").write_text(COMMAND.format(command, file))


def _mathml(latex: str, display: str) -> str:
    formula = latex2mathml.converter.convert(latex, display=display)
    # A named function is set as an operator, with room on both sides.
    return re.sub("<mi>(log|exp|sin|cos|cot|max|sup)</mi>", r'<mo lspace="0.12em" rspace="0.12em">\1</mo>', formula)


def _inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def _keep_together(app: Sphinx, *where: object) -> None:
    """A deviation stays in the line of its mean."""
    content: list[str] = where[-1]  # type: ignore[assignment]
    content[0] = (
        content[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace("| ± ", "| ±\N{NO-BREAK SPACE}")
    )


def _copy_math_font(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        font = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
        shutil.copy(font, Path(app.outdir) / "_static" / font.name)


def setup(app: Sphinx) -> None:
    """MathML at build time and its font beside it: the site needs no network and no script to show a formula."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("build-finished", _copy_math_font)
    app.connect("source-read", _keep_together)
    app.connect("include-read", _keep_together)
