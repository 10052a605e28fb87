"""Migrations of a job's record. Version 1 is from before families and launchers side by side: every job trained a language model."""

from typing import cast

from schema.migrations import Document

ENVIRONMENT_OF_VERSION_1 = "llm"


def place_job(document: Document) -> Document:
    """From version 1, when a deployment had one launcher: a job named its profile in `hardware`, an attempt its launcher."""
    attempts = cast(list[Document], document.get("attempts") or [])
    hardware = document.get("hardware")
    launcher = attempts[-1]["launcher"] if attempts else "local" if hardware in (None, "local") else "cloud-run"
    profile = hardware or ("local" if launcher == "local" else "l4")

    def place_attempt(attempt: Document) -> Document:
        started_at = attempt.get("launch_started_at") or attempt["created_at"]
        placement = {"launcher": attempt["launcher"], "profile": profile, "environment": ENVIRONMENT_OF_VERSION_1}
        kept = {name: value for name, value in attempt.items() if name != "launcher"}
        return kept | {"placement": placement, "launch_started_at": started_at}

    kept = {name: value for name, value in document.items() if name != "hardware"}
    placement = {"launcher": launcher, "profile": profile, "environment": ENVIRONMENT_OF_VERSION_1}
    return kept | {"placements": [placement], "attempts": [place_attempt(attempt) for attempt in attempts]}
