"""The page of the design space, written from docstrings and ``conf/``: ``python -m ornstein.cli.options``."""
