"""Which tests run unless all are asked for."""

import collections
import zlib

import jax


def to_run(items, with_slow, most_rows):
    """The items, without slow tests and those rows of tables that are not run.

    Args:
        items: of pytest, in the order of their tables.
        with_slow: whether tests that are marked `slow` run.
        most_rows: how many rows of each test may run, beside what its mark `some_rows` says; None
            for any number.
    """
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    kept = []
    for name, rows in tests.items():
        if with_slow or not rows[0].get_closest_marker("slow"):
            mark = rows[0].get_closest_marker("some_rows")
            limits = [len(rows), most_rows or len(rows), *(mark.args if mark else ())]
            kept += _sample(name, rows, min(limits))
    return kept


def _sample(name, rows, count):
    """Some rows of a table, spread evenly.

    They begin where the name of the test and the version of JAX say: other tests run other rows of
    the same table, and `.ci/run` runs others with the newest JAX.
    """
    first = zlib.crc32(f"{name} {jax.__version__}".encode()) / 2**32
    return [rows[int((first + i) * len(rows) / count)] for i in range(count)]
