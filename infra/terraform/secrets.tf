# Signs the tokens of attempts. infra/deploy.sh adds the first version, so that Terraform never has the value in its state. Without a
# version the service does not start.
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
