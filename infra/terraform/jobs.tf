# One Cloud Run job per environment and hardware profile: an execution can override arguments, variables and timeout, but neither image nor
# hardware.

locals {
  # The file system of an execution is memory. An attempt keeps there the base, the merged model and its GGUFs, beside what the
  # process itself takes: for a model of 4 billion parameters in 16 bits about 8 + 8 + 4 GB of files. Cloud Run's least for an
  # L4 is 4 processors and 16 GiB, for an RTX PRO 6000 20 and 80 GiB; the most with an L4 or without a GPU is 8 and 32 GiB.
  hardware = {
    l4           = { cpu = "8", memory = "32Gi", accelerator = "nvidia-l4", launch_stage = "GA" }
    rtx-pro-6000 = { cpu = "20", memory = "80Gi", accelerator = "nvidia-rtx-pro-6000", launch_stage = "BETA" }
    cpu          = { cpu = "8", memory = "32Gi", accelerator = null, launch_stage = "GA" }
  }

  # By what follows `tunesmith-` in a job's name: the environment llm on every profile, and data, which reads datasets, where no GPU
  # would be paid for it.
  jobs = merge(
    { for name in var.profiles : name => local.hardware[name] },
    { for name in var.profiles : "data-${name}" => local.hardware[name] if local.hardware[name].accelerator == null },
  )
}

resource "google_cloud_run_v2_job" "profiles" {
  for_each = local.jobs

  name                = "tunesmith-${each.key}"
  location            = var.region
  launch_stage        = each.value.launch_stage
  deletion_protection = false

  template {
    task_count  = 1
    parallelism = 1

    template {
      service_account               = google_service_account.job.email
      max_retries                   = 0 # the service retries; a retry by Cloud Run would be a second writer
      timeout                       = "${var.attempt_time_limit_s}s"
      gpu_zonal_redundancy_disabled = each.value.accelerator == null ? null : true

      dynamic "node_selector" {
        for_each = each.value.accelerator[*]

        content {
          accelerator = node_selector.value
        }
      }

      containers {
        name  = "attempt"
        image = "us-docker.pkg.dev/cloudrun/container/job" # until cloudbuild.yaml deploys

        resources {
          limits = merge(
            { cpu = each.value.cpu, memory = each.value.memory },
            each.value.accelerator == null ? {} : { "nvidia.com/gpu" = "1" },
          )
        }
      }
    }
  }

  lifecycle {
    ignore_changes = [client, client_version, template[0].labels, template[0].template[0].containers[0].image]
  }

  depends_on = [google_project_service.apis]
}
