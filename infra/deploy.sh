#!/usr/bin/env bash
# Creates or updates a deployment in a Google Cloud project: infra/deploy.sh PROJECT_ID REGION, or `make deploy`. It can be repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source infra/deployment.sh

KEY=tunesmith-signing-key
TRIES=6
PAUSE_S="${PAUSE_S:-120}" # with six tries ten minutes, the time that Google states for a new metric

main() {
  check_arguments deploy
  check_tools gcloud terraform openssl
  check_login
  check_project
  prepare
  terraform_init
  check_region
  print_status "Create the signing key"
  make_signing_key
  print_status "Create everything else with Terraform"
  apply
  print_status "Check, test, build and deploy with Cloud Build"
  build
  print_status "Done"
  terraform_ output -raw next_steps
}

# What Terraform itself needs, and the file of settings that the user edits.
prepare() {
  print_status "Prepare the project $PROJECT_ID as $ACCOUNT"
  gcloud services enable cloudresourcemanager.googleapis.com serviceusage.googleapis.com iam.googleapis.com storage.googleapis.com \
    --project="$PROJECT_ID"
  if ! gcloud storage buckets describe "gs://$STATE_BUCKET" --format='value(name)' >/dev/null 2>&1; then
    gcloud storage buckets create "gs://$STATE_BUCKET" --project="$PROJECT_ID" --location="$REGION" \
      --uniform-bucket-level-access --public-access-prevention
  fi
  gcloud storage buckets update "gs://$STATE_BUCKET" --versioning --uniform-bucket-level-access --public-access-prevention
  [[ -f "$SETTINGS" ]] || first_settings >"$SETTINGS"
}

first_settings() {
  local kind=user mark=""
  # A service account may call the service but receives no email.
  [[ "$ACCOUNT" != *.gserviceaccount.com ]] || { kind=serviceAccount mark="# "; }
  cat <<END
# Settings of this deployment; infra/terraform/variables.tf describes each. To apply: make deploy PROJECT_ID=$PROJECT_ID REGION=$REGION
profiles = ["l4", "cpu"]
invokers = ["$kind:$ACCOUNT"]
${mark}alert_email = "$ACCOUNT"
# billing_account = "012345-6789AB-CDEF01" # for a budget alert
# monthly_budget = 100
END
}

# The key goes from openssl to Secret Manager, so that it is in no file, no argument, and not in Terraform's state. The metrics are
# created here because they take minutes to appear, and alerts need them.
make_signing_key() {
  if [[ -n "$(key_versions)" ]]; then
    return
  fi
  apply -target=google_secret_manager_secret.signing_key -target=google_logging_metric.status_changed \
    -target=google_logging_metric.stuck -target=google_logging_metric.reconciled
  if [[ -z "$(key_versions)" ]]; then
    openssl rand -base64 48 | tr -d '\n' | gcloud secrets versions add "$KEY" --data-file=- --project="$PROJECT_ID"
  fi
}

key_versions() {
  gcloud secrets versions list "$KEY" --project="$PROJECT_ID" --filter=state:ENABLED --format='value(name)' 2>/dev/null || true
}

# In a new project some resources become visible everywhere only after minutes. Only these errors are retried.
RETRYABLE_ERRORS_PATTERN='created recently|has not been used in project|SERVICE_DISABLED|Service account .* does not exist|Service agent|try again'

apply() {
  local try output
  output="$(mktemp)"
  for ((try = 1; ; try++)); do
    if terraform_ apply -input=false -auto-approve "${VARIABLES[@]}" "$@" 2>&1 | tee "$output"; then
      rm -f "$output"
      return
    fi
    if ((try == TRIES)) || ! grep -Eq "$RETRYABLE_ERRORS_PATTERN" "$output"; then
      rm -f "$output"
      die "Terraform did not finish; nothing is lost. Fix the error above and run this again."
    fi
    printf '\nA new resource is not visible everywhere yet: trying again in %s seconds.\n' "$PAUSE_S"
    sleep "$PAUSE_S"
  done
}

build() {
  local repository profiles
  repository="$(terraform_ output -raw repository)"
  profiles="$(terraform_ output -raw profiles)"
  # ^;^ makes the semicolon separate substitutions, because profiles contain commas.
  gcloud builds submit --config cloudbuild.yaml --ignore-file=.gcloudignore --project="$PROJECT_ID" \
    --substitutions="^;^_REGION=$REGION;_REPOSITORY=$repository;_PROFILES=$profiles"
}

main
