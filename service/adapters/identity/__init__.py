"""Proofs of identity: tokens of OIDC issuers, and the token of a home folder."""
