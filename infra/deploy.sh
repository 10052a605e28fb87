#!/usr/bin/env bash
# Makes or updates everything in a Google Cloud project: infra/deploy.sh PROJECT_ID REGION, or `make deploy`. It can be repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source infra/deployment.sh

KEY=tunesmith-signing-key
TRIES=6
PAUSE_S="${PAUSE_S:-120}" # with the tries ten minutes: as long as Google says that a new metric takes

main() {
  check_arguments deploy
  check_tools gcloud terraform openssl
  check_login
  check_project
  prepare
  terraform_init
  check_region
  print_status "The signing key"
  make_signing_key
  print_status "Everything else, with Terraform"
  apply
  print_status "Checks, tests, images, deployment: Cloud Build"
  build
  print_status "Done"
  terraform_ output -raw next_steps
}

# What Terraform itself needs, and the settings that a person keeps.
prepare() {
  print_status "The project $PROJECT_ID, as $ACCOUNT"
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
  # A machine's identity may call the service, and reads no mail.
  [[ "$ACCOUNT" != *.gserviceaccount.com ]] || { kind=serviceAccount mark="# "; }
  cat <<END
# Settings of this deployment; infra/terraform/variables.tf describes each. Then: make deploy PROJECT_ID=$PROJECT_ID REGION=$REGION
profiles = ["l4", "cpu"]
invokers = ["$kind:$ACCOUNT"]
${mark}alert_email = "$ACCOUNT"
# billing_account = "012345-6789AB-CDEF01" # for a budget alert
# monthly_budget = 100
END
}

# The key goes from openssl to Secret Manager: it is in no file, no argument, and not in Terraform's state. The metrics come along
# because Google takes minutes to know them, and alerts need them.
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

# In a new project some things are known everywhere only minutes after they were made. Those are tried again, nothing else.
RETRYABLE_ERRORS_PATTERN='created recently|has not been used in project|SERVICE_DISABLED|Service account .* does not exist|Service agent|try again'

apply() {
  local try said
  said="$(mktemp)"
  for ((try = 1; ; try++)); do
    if terraform_ apply -input=false -auto-approve "${VARIABLES[@]}" "$@" 2>&1 | tee "$said"; then
      rm -f "$said"
      return
    fi
    if ((try == TRIES)) || ! grep -Eq "$RETRYABLE_ERRORS_PATTERN" "$said"; then
      rm -f "$said"
      die "Terraform did not finish; nothing is lost. Mend what it says, and run this again."
    fi
    printf '\nSomething is so new that Google does not know it everywhere: again in %s seconds.\n' "$PAUSE_S"
    sleep "$PAUSE_S"
  done
}

build() {
  local repository profiles
  repository="$(terraform_ output -raw repository)"
  profiles="$(terraform_ output -raw profiles)"
  # ^;^ has gcloud take a semicolon between substitutions: there are commas in the profiles.
  gcloud builds submit --config cloudbuild.yaml --ignore-file=.gcloudignore --project="$PROJECT_ID" \
    --substitutions="^;^_REGION=$REGION;_REPOSITORY=$repository;_PROFILES=$profiles"
}

main
