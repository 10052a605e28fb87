# Who may do what. Grants are on single resources wherever Google takes them there; no identity has a key.

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

# The role above starts executions and does not see them; roles/run.viewer would show everything in the project.
resource "google_project_iam_custom_role" "execution_keeper" {
  role_id     = "tunesmithExecutionKeeper"
  title       = "Tunesmith execution keeper"
  description = "Looks after executions of a Cloud Run job."
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

# Download links are signed by IAM (signBlob) with the key of the account itself, which never leaves Google.
resource "google_service_account_iam_member" "api_signs_as_itself" {
  service_account_id = google_service_account.api.name
  role               = "roles/iam.serviceAccountTokenCreator"
  member             = google_service_account.api.member
}

# Creating and listing secrets are permissions on the project: no condition can see the name of a secret there. They give no
# secret away. Everything else is for secrets of jobs alone, by name.
resource "google_project_iam_custom_role" "secret_maker" {
  role_id     = "tunesmithSecretMaker"
  title       = "Tunesmith secret maker"
  description = "Makes secrets, and sees the names of those there are."
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
  description = "Writes, reads and destroys secrets that it can name."
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

# --- job: an attempt. It runs code and models that came from outside, so it reaches bytes and the service, and nothing else ----

resource "google_service_account" "job" {
  account_id   = "tunesmith-job"
  display_name = "Tunesmith: attempts"

  depends_on = [google_project_service.apis]
}

resource "google_storage_bucket_iam_member" "job_reads_specs" {
  bucket = google_storage_bucket.buckets["configs"].name
  role   = "roles/storage.objectViewer"
  member = google_service_account.job.member
}

# Results only: no attempt can change a spec. User, not creator: who may not replace an object is not told either that it is there.
resource "google_storage_bucket_iam_member" "job_writes_results" {
  bucket = google_storage_bucket.buckets["configs"].name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member

  condition {
    title       = "results"
    description = "Only objects below results/."
    expression  = "resource.name.startsWith(\"projects/_/buckets/${google_storage_bucket.buckets["configs"].name}/objects/results/\")"
  }
}

resource "google_storage_bucket_iam_member" "job_reads_datasets" {
  bucket = google_storage_bucket.buckets["datasets"].name
  role   = "roles/storage.objectViewer"
  member = google_service_account.job.member
}

# Rows as tokens, kept beside the rows for the next job; the rows themselves are out of reach: their names end in .jsonl.
resource "google_storage_bucket_iam_member" "job_keeps_tokens" {
  bucket = google_storage_bucket.buckets["datasets"].name
  role   = "roles/storage.objectUser"
  member = google_service_account.job.member

  condition {
    title       = "tokens"
    description = "Only files of tokens."
    expression  = "resource.name.startsWith(\"projects/_/buckets/${google_storage_bucket.buckets["datasets"].name}/objects/datasets/\") && resource.name.endsWith(\".npz\")"
  }
}

resource "google_storage_bucket_iam_member" "job_uses_models" {
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

# It asks the new revision whether it is well before that gets requests.
resource "google_cloud_run_v2_service_iam_member" "build_asks_health" {
  location = google_cloud_run_v2_service.tunesmith.location
  name     = google_cloud_run_v2_service.tunesmith.name
  role     = "roles/run.invoker"
  member   = google_service_account.build.member
}

# What it shows there: an identity token that it makes for itself.
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

# `gcloud builds submit` uploads the sources to a bucket that it makes itself, at the first build: it is not there yet.
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

# --- scheduler, and who else may call the service ------------------------------------------------------------------------

resource "google_service_account" "scheduler" {
  account_id   = "tunesmith-scheduler"
  display_name = "Tunesmith: the clock"

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
