"""Progress, the record of a run, pictures."""
