"""Files of rows as benchmarks write them."""

import json

import pytest
from row_files import MADE


@pytest.fixture
def rows_in(tmp_path):
    """``rows_in(name, rows, processor=…, **beside)``: a file as commands of today write it."""

    def write(name, rows, *, machine=None, made=None, settings=None):
        whole = MADE | {"machine": MADE["machine"] | (machine or {})} | (made or {})
        content = {
            "benchmark": "bench cpu",
            "settings": settings or {"runs": 9},
            "made": whole,
            "sessions": [],
            "rows": rows,
        }
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return write
