"""The control plane: accepts requests, stores records, launches attempts and serves results.

It is stateless and has few dependencies. Code that trains does not belong here, nor does any ML library, not even one imported inside a
function.
"""
