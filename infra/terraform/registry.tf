resource "google_artifact_registry_repository" "images" {
  location      = var.region
  repository_id = "tunesmith"
  description   = "Images of the service and of the trainer."
  format        = "DOCKER"

  # An image of the trainer is some gigabytes. A keep policy wins over a delete policy, so what is deployed, the newest, stays.
  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"

    condition {
      older_than = "1209600s" # two weeks
    }
  }

  cleanup_policies {
    id     = "keep-recent"
    action = "KEEP"

    most_recent_versions {
      keep_count = 6 # three builds: each pushes the stage that the next one starts from, too
    }
  }

  depends_on = [google_project_service.apis]
}
