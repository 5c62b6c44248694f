"""Many tasks over one backbone in memory, also in one batch."""
