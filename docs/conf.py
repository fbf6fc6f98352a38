"""Settings of the documentation: `sphinx-build -W --keep-going docs docs/_build`."""

from bnnify import __version__

project = "bnnify"
author = "The bnnify authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"bnnify {release}"
html_show_sphinx = False

# Headings can be linked to by the names that a repository host gives them, as in page.md#a-heading.
myst_heading_anchors = 3

# `name` in a docstring is code.
default_role = "code"

autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # torch.nn.Module's own docstrings belong to the documentation of torch.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_use_ivar = True  # Attributes become a list; otherwise they would be indexed a second time.
