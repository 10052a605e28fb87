# The service does nothing between requests. These requests make it look after open jobs.

locals {
  upkeep = {
    reconcile = { schedule = "* * * * *", retry_count = 0, does = "Brings every open job a step nearer to where it should be." }
    cleanup   = { schedule = "17 * * * *", retry_count = 3, does = "Destroys secrets whose job has ended." }
  }
}

resource "google_cloud_scheduler_job" "upkeep" {
  for_each = local.upkeep

  name             = "tunesmith-${each.key}"
  region           = var.region
  description      = each.value.does
  schedule         = each.value.schedule
  time_zone        = "Etc/UTC"
  attempt_deadline = "60s" # the service takes 55 at most

  # What comes every minute need not be repeated within it.
  retry_config {
    retry_count          = each.value.retry_count
    min_backoff_duration = "30s"
    max_backoff_duration = "300s"
  }

  http_target {
    http_method = "POST"
    uri         = "${local.service_url}/internal/${each.key}"

    oidc_token {
      service_account_email = google_service_account.scheduler.email
      audience              = local.service_url
    }
  }

  depends_on = [google_cloud_run_v2_service_iam_member.scheduler_calls]
}
