"""The HTTP API: parses requests, calls the core and renders responses. Rules about jobs do not belong here: the core has them."""
