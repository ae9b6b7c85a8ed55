"""What the files of a data set say of themselves, for configs: `image_size: ${data_fact:image_size}`."""

from collections.abc import Mapping
from typing import Any

from ornstein.errors import OrnsteinError


def data_fact(options: Mapping[str, Any], name: str) -> Any:
    """A fact, as the class of a data config tells it without decoding an image.

    Args:
        options: the data config; its class has a classmethod `fact(options, name)`.
        name: image_size, channels, num_classes, ...

    Raises:
        OrnsteinError: there are no such files, or they do not say; a class that is none of this package's.
    """
    import ornstein.data

    home, _, kind = str(options["dataset"]["_target_"]).rpartition(".")
    found = getattr(ornstein.data, kind, None) if home == "ornstein.data" else None
    if not hasattr(found, "fact"):
        raise OrnsteinError(f"{home}.{kind} does not say its {name}: set data.{name} to what it is.")
    return found.fact(options, name)  # type: ignore[union-attr]
