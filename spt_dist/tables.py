"""Plain tables for logs and terminals."""

from collections.abc import Collection, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> str:
    """Lay out a table as text: the first column and those of words to the left, the others to the right.

    Args:
        title: a line above the table.
        columns: headings.
        rows: as many cells a row as there are columns.
        words: headings of further columns with words in them.
    """
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    # Wide enough for any of our tables: cells that are cut tell nothing, and lines that are wrapped can't be read.
    Console(file=text, width=400, color_system=None).print(table)
    return f"{title}\n{text.getvalue().rstrip()}"
