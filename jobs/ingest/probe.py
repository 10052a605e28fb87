"""What the packages of an environment let this family read."""

from importlib.util import find_spec

from jobs.ingest.formats import FORMATS
from schema.capabilities import FamilyCapabilities


def probe() -> FamilyCapabilities:
    """The family's capabilities here. Raises RuntimeError when a package is missing without which nothing can be read."""
    missing = [package for package in ("orjson", "PIL", "pyarrow") if find_spec(package) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed")
    return FamilyCapabilities(trainer_types=("ingest",), options={"format": tuple(FORMATS)})
