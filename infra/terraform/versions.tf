terraform {
  required_version = ">= 1.9, < 2.0"

  required_providers {
    # tests/infra checks these files against the schema of this major version.
    google = {
      source  = "hashicorp/google"
      version = "~> 8.0"
    }
  }

  # infra/deploy.sh names the bucket and the prefix: terraform init -backend-config=bucket=…
  backend "gcs" {
    prefix = "tunesmith"
  }
}

provider "google" {
  project = var.project_id
  region  = var.region

  # The budget API needs a project for its quota, and a person's credentials name none.
  billing_project       = var.project_id
  user_project_override = true

  default_labels = {
    application = "tunesmith"
  }
}
