resource "google_artifact_registry_repository" "images" {
  location      = var.region
  repository_id = "tunesmith"
  description   = "Images of the service and of the trainer."
  format        = "DOCKER"

  # An image of the trainer has several gigabytes. A keep policy overrides a delete policy, so the deployed images, the newest, stay.
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
      keep_count = 6 # three builds: each also pushes the build stage, which is the cache of the next one
    }
  }

  depends_on = [google_project_service.apis]
}
