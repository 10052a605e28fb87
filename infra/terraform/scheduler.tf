# The service does nothing between requests, so the scheduler's requests reconcile open jobs and clean up.

locals {
  maintenance = {
    reconcile = { schedule = "* * * * *", retry_count = 0, description = "Reconciles every open job." }
    cleanup   = { schedule = "17 * * * *", retry_count = 3, description = "Deletes secrets of jobs that have ended." }
  }
}

resource "google_cloud_scheduler_job" "maintenance" {
  for_each = local.maintenance

  name             = "tunesmith-${each.key}"
  region           = var.region
  description      = each.value.description
  schedule         = each.value.schedule
  time_zone        = "Etc/UTC"
  attempt_deadline = "60s" # the service takes 55 s at most

  # A call that is made every minute needs no retry within the minute.
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
