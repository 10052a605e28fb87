# Separate buckets for specs and results, datasets, and models, so that each service account gets access only to what it needs.

resource "google_storage_bucket" "buckets" {
  for_each = toset(["configs", "datasets", "models"])

  name                        = "${var.project_id}-tunesmith-${each.key}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false

  # Specs and results are small and overwritten; everything else is written once, and old versions would cost.
  versioning {
    enabled = each.key == "configs"
  }

  soft_delete_policy {
    retention_duration_seconds = var.soft_delete_days * 86400
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = 30
      with_state                 = "ARCHIVED"
    }
  }

  # Files to be ingested as datasets.
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      age            = 7
      matches_prefix = ["incoming/"]
    }
  }

  # Incomplete uploads of attempts that were ended.
  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 1
    }
  }

  depends_on = [google_project_service.apis]
}
