"""Eight small tasks in VTAB's three groups, drawn from formulas and from pictures that ship inside libraries."""
