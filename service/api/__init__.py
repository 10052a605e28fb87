"""HTTP in, HTTP out: parse, call the core, render. Here belongs no rule about jobs."""
