"""A column that is declared once shows in text, in HTML's cells and in JSON."""

from ironmoe.bench.reports.cells import brackets, counted, speed
from ironmoe.bench.reports.tables import Column, cells, entries, headers, terminal_table

COLUMNS = (
    Column[int]("number", str),
    Column[int]("square", lambda n: f"{n * n} m²", lambda n: {"square": n * n, "unit": "m²"}),
)


def test_a_column_is_declared_once():
    assert headers(COLUMNS) == ["number", "square"]
    assert cells(COLUMNS, 3) == ["3", "9 m²"]
    assert entries(COLUMNS, 3) == {"square": 9, "unit": "m²"}
    table = terminal_table(headers(COLUMNS), title="[numbers]")
    assert [column.justify for column in table.columns] == ["left", "right"]
    assert str(table.title) == "[numbers]"  # no markup


def test_numbers_are_printed_as_people_read_them():
    assert [speed(rate) for rate in (None, 0.4567, 12.345, 1234.5)] == [
        "–",
        "0.457",
        "12.3",
        "1234",
    ]
    assert (counted(1, "image"), counted(0, "image")) == ("1 image", "0 images")
    assert brackets((0.101, 0.5)) == "[10.1, 50.0]"
