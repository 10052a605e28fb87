# Signs the tokens of attempts. Terraform never sees its value, so that it is in no state file: infra/deploy.sh adds the first
# version. Without one the service does not start.
resource "google_secret_manager_secret" "signing_key" {
  secret_id = "tunesmith-signing-key"

  replication {
    auto {}
  }

  depends_on = [google_project_service.apis]
}

resource "google_secret_manager_secret_iam_member" "api_reads_signing_key" {
  secret_id = google_secret_manager_secret.signing_key.id
  role      = "roles/secretmanager.secretAccessor"
  member    = google_service_account.api.member
}
