"""The documentation site: these pages and an API reference made from the docstrings. `make docs` builds it."""

import moco_ext

project = "moco_ext"
author = "the moco_ext authors"
copyright = "the moco_ext authors, BSD-3-Clause"
version = release = moco_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "moco_ext"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 100
