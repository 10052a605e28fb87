#!/usr/bin/env bash
# Removes what deploy.sh made, except data: infra/destroy.sh PROJECT_ID REGION, or `make destroy`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source infra/deployment.sh

# Data stays, and stays in Terraform's state, so that `make deploy` finds it again. Enabled APIs cost nothing.
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
  printf 'The service, the jobs with what runs in them, images, alerts and identities of Tunesmith in %s go.\n' "$PROJECT_ID"
  printf 'Records in Firestore and everything in the buckets stay.\n'
  if [[ -z "$answer" && -t 0 ]]; then
    read -r -p "Type the project's id to go on: " answer
  fi
  [[ "$answer" == "$PROJECT_ID" ]] || die "Nothing was touched. To confirm, type the project's id, or CONFIRM=$PROJECT_ID make destroy …"
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

Gone. What is left is data, and costs what its storage costs; \`make deploy\` takes it up again. To delete it for good:

  gcloud storage rm gs://$PROJECT_ID-tunesmith-configs --recursive
  gcloud storage rm gs://$PROJECT_ID-tunesmith-datasets --recursive
  gcloud storage rm gs://$PROJECT_ID-tunesmith-models --recursive
  gcloud firestore databases update --database='(default)' --no-delete-protection --project=$PROJECT_ID
  gcloud firestore databases delete --database='(default)' --project=$PROJECT_ID
  gcloud secrets list --filter=name:tunesmith-job- --project=$PROJECT_ID
  gcloud storage rm gs://$STATE_BUCKET --recursive

The last one is Terraform's memory: delete it only when the others are gone. Or everything in the project at once:

  gcloud projects delete $PROJECT_ID
END
}

main
