#!/usr/bin/env bash
# Removes what deploy.sh created, except data: infra/destroy.sh PROJECT_ID REGION, or `make destroy`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source infra/deployment.sh

# Data stays, also in Terraform's state, so that `make deploy` uses it again. Enabled APIs cost nothing.
KEPT_RESOURCES_PATTERN='^(data\.|google_(storage_bucket|firestore_[a-z]+|project_service)\.)'

main() {
  check_arguments destroy
  check_tools gcloud terraform
  check_login
  confirm
  terraform_init
  check_region
  destroy
  print_remaining_resources
}

confirm() {
  local answer="${CONFIRM:-}"
  printf 'This removes the service, its Cloud Run jobs and their running executions, images, alerts and service accounts in %s.\n' "$PROJECT_ID"
  printf 'Records in Firestore and all objects in the buckets stay.\n'
  if [[ -z "$answer" && -t 0 ]]; then
    read -r -p "Type the project id to continue: " answer
  fi
  [[ "$answer" == "$PROJECT_ID" ]] || die "Nothing was changed. To confirm, type the project id, or run CONFIRM=$PROJECT_ID make destroy …"
}

destroy() {
  local addresses targets=()
  addresses="$(terraform_ state list)"
  while read -r address; do
    [[ -z "$address" || "$address" =~ $KEPT_RESOURCES_PATTERN ]] || targets+=(-target="$address")
  done <<<"$addresses"
  if ((${#targets[@]} == 0)); then
    print_status "There is nothing to remove"
    return
  fi
  terraform_ destroy -input=false -auto-approve "${VARIABLES[@]}" "${targets[@]}"
}

print_remaining_resources() {
  cat <<END

Removed. The data is left, and its storage is billed; \`make deploy\` uses it again. To delete it permanently:

  gcloud storage rm gs://$PROJECT_ID-tunesmith-configs --recursive
  gcloud storage rm gs://$PROJECT_ID-tunesmith-datasets --recursive
  gcloud storage rm gs://$PROJECT_ID-tunesmith-models --recursive
  gcloud firestore databases update --database='(default)' --no-delete-protection --project=$PROJECT_ID
  gcloud firestore databases delete --database='(default)' --project=$PROJECT_ID
  gcloud secrets list --filter=name:tunesmith-job- --project=$PROJECT_ID
  gcloud storage rm gs://$STATE_BUCKET --recursive

The last one is Terraform's state: delete it only after the others. Or delete everything in the project at once:

  gcloud projects delete $PROJECT_ID
END
}

main
