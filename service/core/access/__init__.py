"""Who may do what: API keys, the rules that give an identity its tenant and role, and the audit log.

How an identity is proven belongs to adapters and to `api/`; what it may do once it is known belongs here.
"""
