"""Sphinx settings; the generated pages are written before anything is read."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "vestige"
author = "The vestige authors"
copyright = "The vestige authors"
version = release = installed("vestige")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "generate.py"]
html_theme = "furo"
html_title = "vestige"
html_theme_options = {
    "source_edit_link": "",
    "light_css_variables": {"color-brand-primary": "#7a4300", "color-brand-content": "#7a4300"},
    "dark_css_variables": {"color-brand-primary": "#e6a35c", "color-brand-content": "#e6a35c"},
}

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4
# A link that leads nowhere is an error; the build runs with warnings as errors.
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app: object) -> None:
    """Write the pages that come from the code."""
    from generate import write_pages

    write_pages(HERE)
