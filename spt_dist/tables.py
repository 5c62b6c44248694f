"""Plain tables for logs and terminals."""

from collections.abc import Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table as text: the first column to the left, the others to the right.

    Args:
        title: a line above the table.
        columns: headings.
        rows: as many cells a row as there are columns.
    """
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    # Wide enough for any of our tables: a table that a log file wraps is unreadable.
    Console(file=text, width=200, color_system=None).print(table)
    return f"{title}\n{text.getvalue().rstrip()}"
