"""One self-contained page about a run, or about all runs below a folder."""
