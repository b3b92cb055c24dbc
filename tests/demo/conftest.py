import pytest

from . import encoders


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny encoder, and its arrays by name."""
    folder = tmp_path_factory.mktemp("encoder")
    return folder, encoders.write_encoder(folder)
