"""What a run shows and leaves behind: progress, record, tables, pictures."""
