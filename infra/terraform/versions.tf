terraform {
  required_version = ">= 1.9, < 2.0"

  required_providers {
    # The major version whose schema tests/infra checks these files against.
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

  # The budget API counts calls against a project, which a person's credentials do not name.
  billing_project       = var.project_id
  user_project_override = true

  default_labels = {
    application = "tunesmith"
  }
}
