"""How `sphinx-build docs OUT` makes the pages and the reference."""

from lit_rebasin import __version__

project = "lit-rebasin"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"lit-rebasin {release}"
myst_heading_anchors = 4  # links to headings, as on the pages of a repository
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
suppress_warnings = ["toc.not_included"]  # results/README links the results
