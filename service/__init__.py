"""The control plane: takes requests, keeps records, launches attempts, hands out results.

Stateless and light. Here belongs nothing that trains, and no ML library, not even inside a function.
"""
