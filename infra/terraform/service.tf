locals {
  # TUNESMITH_SIGNING_KEY comes from Secret Manager, below. Cloud Run sets PORT; the image sets host and home.
  service_environment = {
    PROJECT_ID             = var.project_id
    REGION                 = var.region
    GCS_CONFIG_BUCKET_NAME = google_storage_bucket.buckets["configs"].name

    TUNESMITH_JOB_STORE    = "firestore"
    TUNESMITH_LAUNCHERS    = "cloud-run"
    TUNESMITH_SECRET_STORE = "secret-manager"
    TUNESMITH_CONFIGS_URL  = google_storage_bucket.buckets["configs"].url
    TUNESMITH_DATASETS_URL = google_storage_bucket.buckets["datasets"].url
    TUNESMITH_MODELS_URL   = google_storage_bucket.buckets["models"].url

    TUNESMITH_LOG_FORMAT        = "json"
    TUNESMITH_PUBLIC_URL        = local.service_url
    TUNESMITH_ALLOWED_HOSTS     = "*.a.run.app"    # the other URL of the service, its status.url
    TUNESMITH_TRUSTED_PROXIES   = "169.254.0.0/16" # Cloud Run's front end connects from there, and nobody else can
    TUNESMITH_IDENTITY_AUDIENCE = local.service_url
    TUNESMITH_ATTEMPT_IDENTITY  = google_service_account.job.email

    # IAM decides who reaches the service; these rules, what each caller may do.
    TUNESMITH_IDENTITY = var.identity_rules != "" ? var.identity_rules : jsonencode({
      cloud_run = true
      rules = [
        { email = google_service_account.scheduler.email, role = "scheduler" },
        { email = "*", role = "operator" },
      ]
    })

    TUNESMITH_NARROW_ATTEMPT_CREDENTIALS = tostring(var.narrow_attempt_credentials)

    TUNESMITH_CLOUD_RUN_PROFILES            = join(",", var.profiles)
    TUNESMITH_CLOUD_RUN_TIME_LIMIT_S        = tostring(var.attempt_time_limit_s)
    TUNESMITH_CLOUD_RUN_MAX_CONCURRENT_JOBS = tostring(var.max_concurrent_jobs)

    TUNESMITH_RECONCILE_INTERVAL_S   = "0"          # Cloud Scheduler calls instead: scheduler.tf
    TUNESMITH_EVENT_POLL_S           = "2"          # every poll is billed
    TUNESMITH_MAX_INCOMING_BYTES     = "8589934592" # beyond 64 MiB it is read by an attempt, whose files are memory too: three times that, of 32 GiB
    TUNESMITH_INGEST_MEMORY_BYTES    = "1610612736" # addressable, of the container's 2 GiB: the tokenizer of Gemma 3 takes 1 GB of it
    TUNESMITH_MAX_CONCURRENT_UPLOADS = "1"          # one such process at a time
    TUNESMITH_MAX_UPLOAD_BYTES       = "33488896"   # Cloud Run accepts bodies of 32 MiB; 64 KiB of that are for the form around the file
  }
}

resource "google_cloud_run_v2_service" "tunesmith" {
  name                 = "tunesmith"
  location             = var.region
  ingress              = "INGRESS_TRAFFIC_ALL" # attempts and the scheduler come from outside the network
  invoker_iam_disabled = false                 # IAM authenticates every caller
  deletion_protection  = false                 # it stores nothing: the data is in Firestore and the buckets

  template {
    service_account                  = google_service_account.api.email
    timeout                          = "900s" # longest time that an event stream stays open
    max_instance_request_concurrency = 40     # the number of request threads

    scaling {
      min_instance_count = 0
      max_instance_count = var.max_instances
    }

    containers {
      image = "us-docker.pkg.dev/cloudrun/container/hello" # until cloudbuild.yaml deploys

      ports {
        container_port = 8080
      }

      resources {
        cpu_idle          = true # processor only during requests: ADR 6
        startup_cpu_boost = true

        # For the process that reads an upload, for its files in /tmp, which is memory, and for the service itself.
        limits = {
          cpu    = "1"
          memory = "2Gi"
        }
      }

      # Not /health: it answers 503 while Firestore or a bucket does not respond, which a new process would not change.
      startup_probe {
        period_seconds    = 5
        timeout_seconds   = 3
        failure_threshold = 24

        tcp_socket {
          port = 8080
        }
      }

      # A page that calls no other service and needs no request thread: it fails only when the process does not work.
      liveness_probe {
        period_seconds    = 60
        timeout_seconds   = 10
        failure_threshold = 3

        http_get {
          path = "/docs"
          port = 8080
        }
      }

      dynamic "env" {
        for_each = local.service_environment

        content {
          name  = env.key
          value = env.value
        }
      }

      env {
        name = "TUNESMITH_SIGNING_KEY"

        value_source {
          secret_key_ref {
            secret  = google_secret_manager_secret.signing_key.secret_id
            version = "latest"
          }
        }
      }

      dynamic "env" {
        for_each = var.previous_signing_key_version == null ? [] : [var.previous_signing_key_version]

        content {
          name = "TUNESMITH_SIGNING_KEY_PREVIOUS"

          value_source {
            secret_key_ref {
              secret  = google_secret_manager_secret.signing_key.secret_id
              version = env.value
            }
          }
        }
      }
    }
  }

  # cloudbuild.yaml deploys images by digest; Terraform must not revert them, nor the metadata that gcloud sets.
  lifecycle {
    ignore_changes = [client, client_version, traffic, template[0].containers[0].image, template[0].labels, template[0].revision]
  }

  depends_on = [google_secret_manager_secret_iam_member.api_reads_signing_key]
}
