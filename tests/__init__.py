"""Tests, by cost: unit (in memory), contract (one suite per port over every adapter), jobs and exports (tiny model), e2e (real HTTP, real processes)."""
