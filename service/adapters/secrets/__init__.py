"""Secret stores: where the secrets of jobs are kept until the jobs end.

Here belong adapters of the SecretStore port. Which secrets a job has is the core's business.
"""

# One line adds a store: name → "module:Class".
SECRET_STORES = {
    "local": "service.adapters.secrets.local:LocalSecretStore",
    "secret-manager": "service.adapters.secrets.secret_manager:SecretManagerStore",
}
