"""The operators: one folder each, judged against its oracle."""
