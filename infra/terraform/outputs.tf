output "service_url" {
  description = "URL of the service."
  value       = local.service_url
}

output "region" {
  description = "Region of the deployment. infra/deploy.sh refuses to change it."
  value       = var.region
}

output "repository" {
  description = "Repository to which Cloud Build pushes images: the _REPOSITORY of cloudbuild.yaml."
  value       = google_artifact_registry_repository.images.repository_id
}

output "profiles" {
  description = "Hardware profiles with a Cloud Run job: the _PROFILES of cloudbuild.yaml."
  value       = join(",", var.profiles)
}

output "buckets" {
  description = "URL of each bucket."
  value       = { for kind, bucket in google_storage_bucket.buckets : kind => bucket.url }
}

output "next_steps" {
  description = "Next steps after a deployment."
  value       = <<-E
    Check that it works:
      curl -H "Authorization: Bearer $(gcloud auth print-identity-token)" ${local.service_url}/health
    Use the command line:
      export TUNESMITH_URL=${local.service_url}
      export TUNESMITH_IDENTITY_TOKEN="$(gcloud auth print-identity-token)"   # valid for an hour
      tunesmith capabilities
    To let others call it: edit `invokers` in infra/terraform/${var.project_id}.tfvars, then run make deploy again.
    First training, quotas and costs: docs/deploy.md. Operation: docs/operate.md.
    Dashboard: https://console.cloud.google.com/monitoring/dashboards?project=${var.project_id}
  E
}
