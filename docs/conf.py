"""The documentation site: `make docs`.

The source folder is the repository itself, so that links between pages are the same here and on a code host.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import planish  # noqa: E402

project = "planish"
author = "the planish authors"
copyright = "the planish authors, Apache-2.0"
version = release = planish.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "planish_docs"]
root_doc = "docs/index"
include_patterns = [
    "docs/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md",
    "src/planish/models/weights/MODEL_CARD.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "runs", "tests", "scripts", "benchmarks", "docs/_ext", "**/__pycache__"]
html_additional_pages = {"index": "home.html"}  # leads to docs/index.html
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"planish {version}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False

# Markdown and notebooks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_output_stderr = "remove"  # warnings of other packages; an error stops the build
nb_ipywidgets_js = {}  # its default loads scripts from elsewhere

# docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False  # what PyTorch says of every module
default_role = "code"  # `name` in a docstring
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References inside the project must lead somewhere; the types of other libraries are not at hand without a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!planish\b).*"),
    ("py:.*", r"planish\.(.*\.)?(_.*|T)"),  # what is private, and type variables
    ("py:data", ".*"),
]
