"""The site: `make docs` builds it with warnings as errors, and without a network.

What Sphinx does not do lies in `site_parts.py`, next to this file. Links to other projects need their inventories from
the network, so they are there only where `MATES_DOCS_ONLINE=1` asks for them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # notebooks read nothing from the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "100"  # of the commands' help
os.environ["MATES_DOCS"] = str(Path(__file__).parent)
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # `!mates-hf` is ours

from mates_hf import __version__  # noqa: E402

project = "mates_hf"
author = "the authors of mates_hf"
copyright = "the authors of mates_hf; Apache-2.0"  # noqa: A001
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "myst_nb",
    "sphinx_design",
    "site_parts",
]
exclude_patterns = ["_build"]
root_doc = "index"
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_output_stderr = "remove"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

intersphinx_mapping = {}
if os.environ.get("MATES_DOCS_ONLINE") == "1":
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "datasets": ("https://huggingface.co/docs/datasets/main/en", None),
    }

html_theme = "furo"
html_title = "mates_hf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False  # `site_parts` puts a page's Markdown next to it
html_show_sourcelink = False
html_theme_options = {
    "source_repository": "https://github.com/mates-hf/mates_hf/",
    "source_branch": "main",
    "source_directory": "docs/",
}
