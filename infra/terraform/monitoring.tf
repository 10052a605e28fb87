# Alerts and the dashboard. The messages are those of the service's log lines (docs/operate.md).

locals {
  # The service by its name, not by reference: new metrics take minutes to appear, so infra/deploy.sh creates them before the service.
  service_logs = "resource.type=\"cloud_run_revision\" AND resource.labels.service_name=\"tunesmith\""

  # A job that makes no progress logs one of these about once a minute.
  stuck_messages = ["attempt is silent", "job could not be reconciled", "launch delayed"]

  # Without a recipient there are no alerts: they cost the same.
  alerts = var.alert_email == null ? 0 : 1

  channels = [for channel in google_monitoring_notification_channel.email : channel.name]
}

resource "google_monitoring_notification_channel" "email" {
  count = local.alerts

  display_name = "Tunesmith operators"
  type         = "email"
  labels = {
    email_address = var.alert_email
  }

  depends_on = [google_project_service.apis]
}

resource "google_logging_metric" "status_changed" {
  name        = "tunesmith/status_changed"
  description = "Status changes of jobs."
  filter      = "${local.service_logs} AND jsonPayload.message=\"status changed\""

  label_extractors = {
    status = "EXTRACT(jsonPayload.status)"
  }

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "INT64"

    labels {
      key         = "status"
      value_type  = "STRING"
      description = "The new status."
    }
  }

  depends_on = [google_project_service.apis]
}

resource "google_logging_metric" "stuck" {
  name        = "tunesmith/stuck"
  description = "Reconciliations in which a job made no progress or an attempt was silent."
  filter      = "${local.service_logs} AND jsonPayload.message=(${join(" OR ", [for message in local.stuck_messages : "\"${message}\""])})"

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "INT64"
  }

  depends_on = [google_project_service.apis]
}

resource "google_logging_metric" "reconciled" {
  name        = "tunesmith/reconciled"
  description = "Calls of the scheduler that succeeded."
  filter      = "${local.service_logs} AND httpRequest.requestUrl:\"/internal/reconcile\" AND httpRequest.status=200"

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "INT64"
  }

  depends_on = [google_project_service.apis]
}

resource "google_monitoring_alert_policy" "jobs_fail" {
  count = local.alerts

  display_name          = "Tunesmith: jobs fail"
  combiner              = "OR"
  severity              = "WARNING"
  notification_channels = local.channels

  conditions {
    display_name = "more than ${var.failed_jobs_per_hour} jobs failed within an hour"

    condition_threshold {
      filter          = "resource.type=\"cloud_run_revision\" AND metric.type=\"logging.googleapis.com/user/${google_logging_metric.status_changed.name}\" AND metric.labels.status=\"failed\""
      comparison      = "COMPARISON_GT"
      threshold_value = var.failed_jobs_per_hour
      duration        = "0s"

      aggregations {
        alignment_period     = "3600s"
        per_series_aligner   = "ALIGN_SUM"
        cross_series_reducer = "REDUCE_SUM"
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    content   = "`tunesmith jobs --status failed`, then `tunesmith show ID`: its failure says why and what helps. docs/operate.md has a table."
  }
}

resource "google_monitoring_alert_policy" "jobs_stuck" {
  count = local.alerts

  display_name          = "Tunesmith: jobs are stuck"
  combiner              = "OR"
  severity              = "WARNING"
  notification_channels = local.channels

  conditions {
    display_name = "a job has made no progress for about ten minutes"

    condition_threshold {
      filter          = "resource.type=\"cloud_run_revision\" AND metric.type=\"logging.googleapis.com/user/${google_logging_metric.stuck.name}\""
      comparison      = "COMPARISON_GT"
      threshold_value = 9 # of fifteen reconciliations, one a minute: a single outage is no alert
      duration        = "0s"

      aggregations {
        alignment_period     = "900s"
        per_series_aligner   = "ALIGN_SUM"
        cross_series_reducer = "REDUCE_SUM"
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    content   = "The service's log has the `job_id` beside one of: ${join(", ", local.stuck_messages)}. The cause is often a quota: `tunesmith show ID`, then docs/operate.md."
  }
}

resource "google_monitoring_alert_policy" "reconcile_does_not_run" {
  count = local.alerts

  display_name          = "Tunesmith: reconcile does not run"
  combiner              = "OR"
  severity              = "CRITICAL"
  notification_channels = local.channels

  # Then only other requests launch and check jobs. Ten calls in a row are missing; a metric without data counts as zero.
  conditions {
    display_name = "no call of the scheduler has succeeded for ten minutes"

    condition_threshold {
      filter                  = "resource.type=\"cloud_run_revision\" AND metric.type=\"logging.googleapis.com/user/${google_logging_metric.reconciled.name}\""
      comparison              = "COMPARISON_LT"
      threshold_value         = 1
      duration                = "60s"
      evaluation_missing_data = "EVALUATION_MISSING_DATA_ACTIVE"

      aggregations {
        alignment_period     = "600s"
        per_series_aligner   = "ALIGN_SUM"
        cross_series_reducer = "REDUCE_SUM"
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    content   = "See Cloud Scheduler's log of tunesmith-reconcile, then the service's log: is the service deployed, may tunesmith-scheduler invoke it, does Firestore respond?"
  }
}

locals {
  latency      = "metric.type=\"run.googleapis.com/request_latencies\" resource.type=\"cloud_run_revision\" resource.labels.service_name=\"tunesmith\""
  requests     = "metric.type=\"run.googleapis.com/request_count\" resource.type=\"cloud_run_revision\" resource.labels.service_name=\"tunesmith\""
  job_resource = "resource.type=\"cloud_run_job\" resource.labels.job_name=starts_with(\"tunesmith-\")"

  charts = [
    {
      title   = "Status changes of jobs"
      filter  = "metric.type=\"logging.googleapis.com/user/${google_logging_metric.status_changed.name}\" resource.type=\"cloud_run_revision\""
      aligner = "ALIGN_SUM", reducer = "REDUCE_SUM", group_by = ["metric.labels.status"]
    },
    {
      title   = "Reconciliations without progress"
      filter  = "metric.type=\"logging.googleapis.com/user/${google_logging_metric.stuck.name}\" resource.type=\"cloud_run_revision\""
      aligner = "ALIGN_SUM", reducer = "REDUCE_SUM", group_by = []
    },
    {
      title   = "Requests by response class"
      filter  = local.requests
      aligner = "ALIGN_RATE", reducer = "REDUCE_SUM", group_by = ["metric.labels.response_code_class"]
    },
    {
      title   = "Request latency, 95th percentile, ms"
      filter  = local.latency
      aligner = "ALIGN_DELTA", reducer = "REDUCE_PERCENTILE_95", group_by = []
    },
    {
      title   = "Running executions, by hardware"
      filter  = "metric.type=\"run.googleapis.com/job/running_executions\" ${local.job_resource}"
      aligner = "ALIGN_MAX", reducer = "REDUCE_SUM", group_by = ["resource.labels.job_name"]
    },
    {
      title   = "Completed executions, by result"
      filter  = "metric.type=\"run.googleapis.com/job/completed_execution_count\" ${local.job_resource}"
      aligner = "ALIGN_SUM", reducer = "REDUCE_SUM", group_by = ["metric.labels.result"]
    },
    {
      title   = "GPU utilization, 95th percentile"
      filter  = "metric.type=\"run.googleapis.com/container/gpu/utilizations\" ${local.job_resource}"
      aligner = "ALIGN_DELTA", reducer = "REDUCE_PERCENTILE_95", group_by = ["resource.labels.job_name"]
    },
    {
      title   = "Memory of attempts with their files, 95th percentile"
      filter  = "metric.type=\"run.googleapis.com/container/memory/utilizations\" ${local.job_resource}"
      aligner = "ALIGN_DELTA", reducer = "REDUCE_PERCENTILE_95", group_by = ["resource.labels.job_name"]
    },
  ]
}

resource "google_monitoring_dashboard" "tunesmith" {
  dashboard_json = jsonencode({
    displayName = "Tunesmith"
    mosaicLayout = {
      columns = 12
      tiles = [
        for place, chart in local.charts : {
          xPos   = (place % 2) * 6
          yPos   = floor(place / 2) * 4
          width  = 6
          height = 4
          widget = {
            title = chart.title
            xyChart = {
              dataSets = [{
                plotType = "LINE"
                timeSeriesQuery = {
                  timeSeriesFilter = {
                    filter = chart.filter
                    aggregation = {
                      alignmentPeriod    = "60s"
                      perSeriesAligner   = chart.aligner
                      crossSeriesReducer = chart.reducer
                      groupByFields      = chart.group_by
                    }
                  }
                }
              }]
            }
          }
        }
      ]
    }
  })
}
