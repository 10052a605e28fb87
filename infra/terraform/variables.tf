# infra/deploy.sh passes the first two and reads the others from infra/terraform/PROJECT_ID.tfvars, which it creates.

variable "project_id" {
  description = "Google Cloud project of the deployment."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "A project id is like my-project-1: 6 to 30 characters of a-z, 0-9 and -."
  }
}

variable "region" {
  description = "Region of everything. It needs GPUs for Cloud Run; docs/deploy.md lists such regions."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "A region is like europe-west4."
  }
}

variable "profiles" {
  description = "Hardware profiles that jobs may request: l4, rtx-pro-6000, cpu. The first is the default."
  type        = list(string)
  default     = ["l4", "cpu"]

  validation {
    condition = (
      length(var.profiles) > 0 &&
      length(var.profiles) == length(distinct(var.profiles)) &&
      alltrue([for name in var.profiles : contains(["l4", "rtx-pro-6000", "cpu"], name)])
    )
    error_message = "profiles takes one or more of l4, rtx-pro-6000 and cpu, each once."
  }
}

variable "invokers" {
  description = "Members that may call the service, such as user:me@example.com, group:…, serviceAccount:…. No one else may."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for member in var.invokers : can(regex("^(user|group|serviceAccount|domain|principal|principalSet):", member))])
    error_message = "An invoker is a named identity, such as user:me@example.com. The service is never public."
  }
}

variable "identity_rules" {
  description = "The rule file of docs/identity.md as JSON: tenant and role of each caller. Default: the scheduler may reconcile, the invokers operate the deployment."
  type        = string
  default     = ""

  validation {
    condition     = var.identity_rules == "" || try(jsondecode(var.identity_rules).rules, null) != null
    error_message = "identity_rules is JSON with a list of rules; see docs/identity.md. It needs a rule with the role scheduler for tunesmith-scheduler."
  }
}

variable "max_concurrent_jobs" {
  description = "Most attempts at the same time. Keep it within the GPU quota: launches beyond the quota are retried every minute."
  type        = number
  default     = 3
}

variable "attempt_time_limit_s" {
  description = "Time limit of an attempt in seconds. Cloud Run ends a task with a GPU after an hour."
  type        = number
  default     = 3600

  validation {
    condition     = var.attempt_time_limit_s >= 120 && var.attempt_time_limit_s <= 604800
    error_message = "attempt_time_limit_s is from 120 seconds to 604800, a week."
  }
}

variable "max_instances" {
  description = "Most instances of the service. This limits the cost of a flood of requests."
  type        = number
  default     = 3
}

variable "firestore_location" {
  description = "Location of Firestore, such as eur3 or nam5. Default: the region. It can never be changed."
  type        = string
  default     = null
}

variable "soft_delete_days" {
  description = "Days for which deleted objects can be restored and are billed: 0, or 7 to 90."
  type        = number
  default     = 7

  validation {
    condition     = var.soft_delete_days == 0 || (var.soft_delete_days >= 7 && var.soft_delete_days <= 90)
    error_message = "soft_delete_days is 0, or from 7 to 90."
  }
}

variable "alert_email" {
  description = "Recipient of alerts about failed or stuck jobs and about the budget. Default: no alerts."
  type        = string
  default     = null
}

variable "failed_jobs_per_hour" {
  description = "More failed jobs than this within an hour raise an alert."
  type        = number
  default     = 2
}

variable "billing_account" {
  description = "Billing account, like 012345-6789AB-CDEF01, for a budget alert. Default: no budget."
  type        = string
  default     = null
}

variable "monthly_budget" {
  description = "Monthly cost that raises a budget alert, in the currency of the billing account. It stops nothing."
  type        = number
  default     = 100
}
