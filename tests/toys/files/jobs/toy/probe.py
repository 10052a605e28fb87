"""What the toy family can do: everything."""

from schema.capabilities import FamilyCapabilities
from schema.training import FAMILIES


def probe() -> FamilyCapabilities:
    return FamilyCapabilities(trainer_types=tuple(config.trainer_type_name() for config in FAMILIES["toy"]))
