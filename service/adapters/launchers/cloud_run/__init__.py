"""The launcher that runs attempts as Cloud Run jobs."""
