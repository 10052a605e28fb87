"""What an environment can run: facts about its packages, found by its families' `probe` functions.

The manifest is written when an environment is installed or its image is built. It says nothing about hardware: a launcher's profile does.
"""

from pydantic import Field

from schema.base import ForwardCompatible

MANIFEST_FILE = "capabilities.json"  # in the folder of the environment


class FamilyCapabilities(ForwardCompatible):
    """What one family of trainers can do with the packages of an environment."""

    trainer_types: tuple[str, ...]
    options: dict[str, tuple[str, ...]] = Field(default={})  # the values that a field of the training config may have, by the field's name
    features: dict[str, bool] = Field(default={})  # whether an optional feature is installed, by its name
    needs_gpu: tuple[str, ...] = ()  # options and features that work on a GPU alone
    notes: dict[str, str] = Field(default={})  # what is missing and how to get it, by the name of the field that asks for it


class EnvironmentManifest(ForwardCompatible):
    """The capabilities of an environment, and the versions of its packages."""

    environment: str
    python: str  # its version
    packages: dict[str, str] = Field(default={})  # version by name
    trackers: tuple[str, ...] | None = None  # whose packages are installed; None: written by a version that did not record it
    families: dict[str, FamilyCapabilities] = Field(default={})
