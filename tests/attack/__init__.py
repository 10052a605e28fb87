"""The attack suite: what a stranger, another tenant, a foreign page or a hostile file tries on a real service, and what came of it.

Each row is a module with `run(size) -> Row`. Rows talk only to loopback, and each bounds how much it sends and for how long. Requests that
are valid come from `fixtures.py`: a route that is added to the service adds its fixture there, and every row that walks the API uses it.
"""
