"""Train the feature net of the default run: ``python -m ornstein.metrics.train_digits_features``.

Writes ``ornstein/metrics/weights/digits.safetensors`` from the training split of scikit-learn's scans; what it does
and the options (``--seed``, ``--out``) are those of :mod:`ornstein.metrics.train_features`.
"""

import sys

from ornstein.metrics.train_features import main

if __name__ == "__main__":
    main(["--data", "digits", *sys.argv[1:]])
