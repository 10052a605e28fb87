# Service accounts and their roles. Roles are granted on single resources wherever Google allows it; no account has a key.

# --- api: the service -------------------------------------------------------------------------------------------------

resource "google_service_account" "api" {
  account_id   = "tunesmith-api"
  display_name = "Tunesmith: the service"

  depends_on = [google_project_service.apis]
}

resource "google_project_iam_member" "api_keeps_records" {
  project = var.project_id
  role    = "roles/datastore.user"
  member  = google_service_account.api.member
}

resource "google_storage_bucket_iam_member" "api_uses_buckets" {
  for_each = google_storage_bucket.buckets

  bucket = each.value.name
  role   = "roles/storage.objectUser"
  member = google_service_account.api.member
}

resource "google_cloud_run_v2_job_iam_member" "api_runs_jobs" {
  for_each = google_cloud_run_v2_job.profiles

  location = each.value.location
  name     = each.value.name
  role     = "roles/run.jobsExecutorWithOverrides"
  member   = google_service_account.api.member
}

# The role above starts executions but cannot read them; roles/run.viewer would show everything in the project.
resource "google_project_iam_custom_role" "execution_keeper" {
  role_id     = "tunesmithExecutionKeeper"
  title       = "Tunesmith execution keeper"
  description = "Reads and cancels executions of a Cloud Run job."
  permissions = [
    "run.executions.cancel",
    "run.executions.get",
    "run.executions.list",
    "run.jobs.get",
    "run.tasks.get",
    "run.tasks.list",
  ]

  depends_on = [google_project_service.apis]
}

resource "google_cloud_run_v2_job_iam_member" "api_keeps_executions" {
  for_each = google_cloud_run_v2_job.profiles

  location = each.value.location
  name     = each.value.name
  role     = google_project_iam_custom_role.execution_keeper.name
  member   = google_service_account.api.member
}

resource "google_service_account_iam_member" "api_acts_as_job" {
  service_account_id = google_service_account.job.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.api.member
}

# IAM signs download links (signBlob) with the account's own key, which never leaves Google.
resource "google_service_account_iam_member" "api_signs_as_itself" {
  service_account_id = google_service_account.api.name
  role               = "roles/iam.serviceAccountTokenCreator"
  member             = google_service_account.api.member
}

# Secrets are created and listed with permissions on the project, where a condition cannot check a secret's name. These two
# reveal no secret. All other permissions are limited by name to the secrets of jobs.
resource "google_project_iam_custom_role" "secret_maker" {
  role_id     = "tunesmithSecretMaker"
  title       = "Tunesmith secret maker"
  description = "Creates secrets and lists their names."
  permissions = ["secretmanager.secrets.create", "secretmanager.secrets.list"]

  depends_on = [google_project_service.apis]
}

resource "google_project_iam_member" "api_makes_secrets" {
  project = var.project_id
  role    = google_project_iam_custom_role.secret_maker.name
  member  = google_service_account.api.member
}

resource "google_project_iam_custom_role" "secret_keeper" {
  role_id     = "tunesmithSecretKeeper"
  title       = "Tunesmith secret keeper"
  description = "Writes, reads and destroys secrets of jobs."
  permissions = [
    "secretmanager.secrets.delete",
    "secretmanager.secrets.get",
    "secretmanager.secrets.update",
    "secretmanager.versions.access",
    "secretmanager.versions.add",
    "secretmanager.versions.destroy",
    "secretmanager.versions.get",
    "secretmanager.versions.list",
  ]

  depends_on = [google_project_service.apis]
}

resource "google_project_iam_member" "api_keeps_secrets_of_jobs" {
  project = var.project_id
  role    = google_project_iam_custom_role.secret_keeper.name
  member  = google_service_account.api.member

  condition {
    title       = "secrets of jobs"
    description = "Only secrets whose name begins with tunesmith-job-."
    expression  = "resource.name.startsWith(\"projects/${data.google_project.this.number}/secrets/tunesmith-job-\")"
  }
}

# --- job: an attempt. It runs untrusted code and models, so it may only use the buckets and call the service -------------------

resource "google_service_account" "job" {
  account_id   = "tunesmith-job"
  display_name = "Tunesmith: attempts"

  depends_on = [google_project_service.apis]
}

# The roles below are for attempts that use the account's own credentials. With narrow ones, the service gives each attempt a token that
# reaches only its own job, and what an attempt fetches from the metadata server reaches no bucket.
resource "google_storage_bucket_iam_member" "job_reads_specs" {
  count = var.narrow_attempt_credentials ? 0 : 1

  bucket = google_storage_bucket.buckets["configs"].name
  role   = "roles/storage.objectViewer"
  member = google_service_account.job.member
}

# Only results: no attempt can change a spec. objectUser, not objectCreator: an attempt must be able to replace its result.
resource "google_storage_bucket_iam_member" "job_writes_results" {
  count = var.narrow_attempt_credentials ? 0 : 1

  bucket = google_storage_bucket.buckets["configs"].name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member

  condition {
    title       = "results"
    description = "Only objects below results/."
    expression  = "resource.name.startsWith(\"projects/_/buckets/${google_storage_bucket.buckets["configs"].name}/objects/results/\")"
  }
}

# Rows for trainings, and incoming files for ingestions.
resource "google_storage_bucket_iam_member" "job_reads_datasets" {
  count = var.narrow_attempt_credentials ? 0 : 1

  bucket = google_storage_bucket.buckets["datasets"].name
  role   = "roles/storage.objectViewer"
  member = google_service_account.job.member
}

# Cached tokens of a dataset, for the next job. The condition excludes the rows themselves, whose names end in .jsonl.
resource "google_storage_bucket_iam_member" "job_keeps_tokens" {
  count = var.narrow_attempt_credentials ? 0 : 1

  bucket = google_storage_bucket.buckets["datasets"].name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member

  condition {
    title       = "tokens"
    description = "Only cached tokens."
    expression  = "resource.name.startsWith(\"projects/_/buckets/${google_storage_bucket.buckets["datasets"].name}/objects/datasets/\") && resource.name.endsWith(\".arrow\")"
  }
}

# The rows that an ingestion makes. Each attempt has a folder of its own, datasets/ID/attempt-NUMBER/, and the record names the one whose
# rows count, with their checksums; what was made of an upload is beside these folders and stays out of reach.
resource "google_storage_bucket_iam_member" "job_writes_datasets" {
  count = var.narrow_attempt_credentials ? 0 : 1

  bucket = google_storage_bucket.buckets["datasets"].name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member

  condition {
    title       = "ingested rows"
    description = "Only the folders of attempts below a dataset."
    expression  = "resource.name.startsWith(\"projects/_/buckets/${google_storage_bucket.buckets["datasets"].name}/objects/datasets/\") && resource.name.extract(\"/attempt-{attempt}/\") != \"\""
  }
}

resource "google_storage_bucket_iam_member" "job_uses_models" {
  count = var.narrow_attempt_credentials ? 0 : 1

  bucket = google_storage_bucket.buckets["models"].name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member
}

resource "google_cloud_run_v2_service_iam_member" "job_reports" {
  location = google_cloud_run_v2_service.tunesmith.location
  name     = google_cloud_run_v2_service.tunesmith.name
  role     = "roles/run.invoker"
  member   = google_service_account.job.member
}

# --- build: Cloud Build -----------------------------------------------------------------------------------------------

resource "google_service_account" "build" {
  account_id   = "tunesmith-build"
  display_name = "Tunesmith: builds and deploys"

  depends_on = [google_project_service.apis]
}

resource "google_artifact_registry_repository_iam_member" "build_pushes_images" {
  location   = google_artifact_registry_repository.images.location
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.build.member
}

resource "google_cloud_run_v2_service_iam_member" "build_deploys_service" {
  location = google_cloud_run_v2_service.tunesmith.location
  name     = google_cloud_run_v2_service.tunesmith.name
  role     = "roles/run.developer"
  member   = google_service_account.build.member
}

# The build checks the health of the new revision before it gets requests.
resource "google_cloud_run_v2_service_iam_member" "build_asks_health" {
  location = google_cloud_run_v2_service.tunesmith.location
  name     = google_cloud_run_v2_service.tunesmith.name
  role     = "roles/run.invoker"
  member   = google_service_account.build.member
}

# For that check it creates an identity token for itself.
resource "google_service_account_iam_member" "build_names_itself" {
  service_account_id = google_service_account.build.name
  role               = "roles/iam.serviceAccountOpenIdTokenCreator"
  member             = google_service_account.build.member
}

resource "google_cloud_run_v2_job_iam_member" "build_updates_jobs" {
  for_each = google_cloud_run_v2_job.profiles

  location = each.value.location
  name     = each.value.name
  role     = "roles/run.developer"
  member   = google_service_account.build.member
}

resource "google_service_account_iam_member" "build_acts_as_api" {
  service_account_id = google_service_account.api.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.build.member
}

resource "google_service_account_iam_member" "build_acts_as_job" {
  service_account_id = google_service_account.job.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.build.member
}

resource "google_project_iam_member" "build_writes_logs" {
  project = var.project_id
  role    = "roles/logging.logWriter"
  member  = google_service_account.build.member
}

# `gcloud builds submit` uploads the sources to a bucket that it creates at the first build, so Terraform cannot refer to it.
resource "google_project_iam_member" "build_reads_sources" {
  project = var.project_id
  role    = "roles/storage.objectViewer"
  member  = google_service_account.build.member

  condition {
    title       = "sources of builds"
    description = "Only the bucket of gcloud builds submit."
    expression  = "resource.name.startsWith(\"projects/_/buckets/${var.project_id}_cloudbuild\")"
  }
}

# --- scheduler, and other callers of the service --------------------------------------------------------------------------

resource "google_service_account" "scheduler" {
  account_id   = "tunesmith-scheduler"
  display_name = "Tunesmith: the scheduler"

  depends_on = [google_project_service.apis]
}

resource "google_cloud_run_v2_service_iam_member" "scheduler_calls" {
  location = google_cloud_run_v2_service.tunesmith.location
  name     = google_cloud_run_v2_service.tunesmith.name
  role     = "roles/run.invoker"
  member   = google_service_account.scheduler.member
}

resource "google_cloud_run_v2_service_iam_member" "invokers" {
  for_each = toset(var.invokers)

  location = google_cloud_run_v2_service.tunesmith.location
  name     = google_cloud_run_v2_service.tunesmith.name
  role     = "roles/run.invoker"
  member   = each.key
}
