"""The figures: pure functions of :class:`ornstein.metrics.statistics.Statistics`, one family a module."""
