"""Which changes of the code no test notices: see `python -m tests.mutation --help`."""
