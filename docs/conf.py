"""Settings of the documentation: `sphinx-build -W --keep-going docs docs/_build`."""

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

from bnnify import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for what stands beside this file

project = "bnnify"
author = "The bnnify authors"
copyright = author
version = release = __version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = "bnnify"
html_show_sphinx = False
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"  # prompts, and what was printed

# Headings can be linked to by the names that a repository host gives them.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

# `name` in a docstring is code.
default_role = "code"

autodoc_default_options = {"members": True}
# The docstrings of torch.nn.Module belong to the documentation of torch.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False  # The tables link to the pages; no page for each name.
maximum_signature_line_length = 80
# Attributes become a list; otherwise they would be indexed a second time.
napoleon_use_ivar = True

# What a tutorial needs beyond the extra `docs`. Without it the script is only shown.
NEEDS = {
    "decide": "mapie",
    "deployment": "onnxruntime",
    "language_model": "transformers",
}
NOT_RUN = [name for name, library in NEEDS.items() if find_spec(library) is None]
for name in NOT_RUN:
    print(f"docs/examples/{name}.py is not run: {NEEDS[name]} is not installed.")
for library in ("onnx_ir", "onnxscript"):  # They tell of each tensor in a file.
    logging.getLogger(library).setLevel(logging.WARNING)

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": rf"/(?!(?:{'|'.join(NOT_RUN)})\.py$)\w+\.py$",
    "within_subsection_order": "reading_order.ReadingOrder",
    "image_srcset": ["2x"],
    "capture_repr": (),  # What is printed is shown, and not the value of a last line.
    "min_reported_time": 1e9,  # Times of this machine tell a reader nothing.
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}
