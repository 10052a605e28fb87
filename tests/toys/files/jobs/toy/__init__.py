"""A family of trainers that needs nothing but the standard library."""
