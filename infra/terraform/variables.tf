# infra/deploy.sh gives the first two, and reads the others from infra/terraform/PROJECT_ID.tfvars, which it begins.

variable "project_id" {
  description = "The Google Cloud project. Everything lives in it."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "A project id is like my-project-1: 6 to 30 of a-z, 0-9 and -."
  }
}

variable "region" {
  description = "Where everything runs and lies. One with GPUs for Cloud Run; docs/deploy.md lists them."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "A region is like europe-west4."
  }
}

variable "profiles" {
  description = "Kinds of hardware that jobs may ask for: l4, rtx-pro-6000, cpu. The first is the default."
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
  description = "Who may call the service, such as user:me@example.com, group:…, serviceAccount:…. Nobody else can."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for member in var.invokers : can(regex("^(user|group|serviceAccount|domain|principal|principalSet):", member))])
    error_message = "An invoker is a named identity, such as user:me@example.com. The service is never open to everybody."
  }
}

variable "max_concurrent_jobs" {
  description = "Attempts at a time. Not above the GPU quota: what does not fit is tried again every minute."
  type        = number
  default     = 3
}

variable "attempt_time_limit_s" {
  description = "Seconds that an attempt may take. Cloud Run ends a task with a GPU after an hour."
  type        = number
  default     = 3600

  validation {
    condition     = var.attempt_time_limit_s >= 120 && var.attempt_time_limit_s <= 604800
    error_message = "attempt_time_limit_s is from 120 seconds to 604800, a week."
  }
}

variable "max_instances" {
  description = "Most instances of the service. It bounds what a flood of requests can cost."
  type        = number
  default     = 3
}

variable "firestore_location" {
  description = "Where Firestore keeps the records, such as eur3 or nam5. Left out: the region. It can never be changed."
  type        = string
  default     = null
}

variable "soft_delete_days" {
  description = "Days for which deleted objects can be restored, and are paid for: 0, or 7 to 90."
  type        = number
  default     = 7

  validation {
    condition     = var.soft_delete_days == 0 || (var.soft_delete_days >= 7 && var.soft_delete_days <= 90)
    error_message = "soft_delete_days is 0, or from 7 to 90."
  }
}

variable "alert_email" {
  description = "Who is told when jobs fail or are stuck, or the budget is used up. Left out: there are no alerts."
  type        = string
  default     = null
}

variable "failed_jobs_per_hour" {
  description = "More failed jobs than this within an hour are an alert."
  type        = number
  default     = 2
}

variable "billing_account" {
  description = "The billing account, like 012345-6789AB-CDEF01, for a budget alert. Left out: no budget."
  type        = string
  default     = null
}

variable "monthly_budget" {
  description = "What a month may cost before somebody is told, in the billing account's currency. It stops nothing."
  type        = number
  default     = 100
}
