"""A run folder -> tables, curves, film strips and one self-contained HTML page."""
