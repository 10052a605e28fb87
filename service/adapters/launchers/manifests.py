"""Reads the manifests of environments: `<folder>/<environment>/capabilities.json`, written where the environment was installed or built."""

import logging
from pathlib import Path

from pydantic import ValidationError

from schema.capabilities import MANIFEST_FILE, EnvironmentManifest

log = logging.getLogger(__name__)


def list_manifests(folder: Path) -> dict[str, EnvironmentManifest]:
    """The readable manifests below a folder, by environment. One that is not readable is logged and left out."""
    manifests = [read_manifest(path) for path in sorted(folder.glob(f"*/{MANIFEST_FILE}"))]
    return {manifest.environment: manifest for manifest in manifests if manifest}


def read_manifest(path: Path) -> EnvironmentManifest | None:
    """The manifest in a file; None when there is none, or none that is readable."""
    try:
        return EnvironmentManifest.load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.error("manifest of an environment is not readable", extra={"path": str(path), "error": str(error)})
        return None
