output "service_url" {
  description = "The address of the service."
  value       = local.service_url
}

output "region" {
  description = "Where it was deployed. infra/deploy.sh refuses to move it."
  value       = var.region
}

output "repository" {
  description = "Where Cloud Build pushes images: the _REPOSITORY of cloudbuild.yaml."
  value       = google_artifact_registry_repository.images.repository_id
}

output "profiles" {
  description = "The hardware profiles with a Cloud Run job: the _PROFILES of cloudbuild.yaml."
  value       = join(",", var.profiles)
}

output "buckets" {
  description = "The buckets, by what lies there."
  value       = { for kind, bucket in google_storage_bucket.buckets : kind => bucket.url }
}

output "next_steps" {
  description = "What to do now."
  value       = <<-E
    Is it well?
      curl -H "Authorization: Bearer $(gcloud auth print-identity-token)" ${local.service_url}/health
    With the command line:
      export TUNESMITH_URL=${local.service_url}
      export TUNESMITH_IDENTITY_TOKEN="$(gcloud auth print-identity-token)"   # good for an hour
      tunesmith capabilities
    Who may call it: `invokers` in infra/terraform/${var.project_id}.tfvars, then make deploy again.
    The first training, quotas and costs: docs/deploy.md. The day after: docs/operate.md.
    Dashboard: https://console.cloud.google.com/monitoring/dashboards?project=${var.project_id}
  E
}
