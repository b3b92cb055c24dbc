import tomllib
from pathlib import Path

import numpy as np

import jaxquant
from jaxquant.version import installed_version


def test_the_version_is_that_of_the_project_or_unknown():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    assert jaxquant.__version__ == installed_version(project["name"])
    assert jaxquant.__version__ in (project["version"], "0+unknown")


def test_the_version_is_what_was_installed():
    assert installed_version("numpy") == np.__version__


def test_a_source_tree_that_is_not_installed_has_no_version():
    assert installed_version("no-such-package") == "0+unknown"
