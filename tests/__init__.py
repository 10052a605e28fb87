"""Tests, by cost: unit and contract (seconds), jobs and exports (a tiny model), e2e (real HTTP, processes and Gemma)."""
