"""What a file holds: tables for `jaxquant inspect`, and pages that need no network."""

from .contents import Contents as Contents
from .contents import read as read
from .contents import verify as verify
from .page import write_page as write_page
