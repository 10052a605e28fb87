"""Where the secrets of jobs are kept. One line adds a store: name → "module:Class"."""

SECRET_STORES = {
    "local": "service.adapters.secrets.local:LocalSecretStore",
    "secret-manager": "service.adapters.secrets.secret_manager:SecretManagerStore",
}
