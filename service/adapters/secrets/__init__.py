"""Secret stores: where the secrets of jobs are kept until the jobs end.

Adapters of the SecretStore port belong here. Which secrets a job has does not: the core decides it.
"""

# One line adds a store: name → "module:Class".
SECRET_STORES = {
    "local": "service.adapters.secrets.local:LocalSecretStore",
    "secret-manager": "service.adapters.secrets.secret_manager:SecretManagerStore",
}
