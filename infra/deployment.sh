# Shared by deploy.sh and destroy.sh, which take a project and a region and source this file.
# shellcheck shell=bash

PROJECT_ID="${1:-}"
REGION="${2:-}"
STATE_BUCKET="${PROJECT_ID}-tunesmith-terraform"
SETTINGS="infra/terraform/${PROJECT_ID}.tfvars"

print_status() { printf '\n== %s\n' "$*"; }

die() {
  printf '%s\n' "$@" >&2
  exit 1
}

check_arguments() {
  local command="$1"
  [[ -n "$PROJECT_ID" ]] || die "PROJECT_ID is missing: make $command PROJECT_ID=my-project REGION=europe-west4"
  [[ -n "$REGION" ]] || die "REGION is missing: make $command PROJECT_ID=$PROJECT_ID REGION=europe-west4" \
    "Regions with GPUs for Cloud Run are in docs/deploy.md."
}

check_tools() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die "$tool is not installed; docs/deploy.md lists what is needed."
  done
}

check_login() {
  ACCOUNT="$(gcloud auth list --filter=status:ACTIVE --format='value(account)')"
  [[ -n "$ACCOUNT" ]] || die "No account is logged in: gcloud auth login"
}

check_project() {
  gcloud projects describe "$PROJECT_ID" --format='value(projectNumber)' >/dev/null ||
    die "$ACCOUNT cannot see a project $PROJECT_ID. To list projects: gcloud projects list. To create it: gcloud projects create $PROJECT_ID"
  local billing
  billing="$(gcloud billing projects describe "$PROJECT_ID" --format='value(billingEnabled)')" ||
    { printf 'Could not read whether %s has billing; continuing.\n' "$PROJECT_ID" >&2; billing=True; }
  [[ "$billing" == True ]] || die "$PROJECT_ID has no billing account, and Google runs nothing without one:" \
    "  gcloud billing accounts list" "  gcloud billing projects link $PROJECT_ID --billing-account=ACCOUNT_ID"
}

terraform_() { terraform -chdir=infra/terraform "$@"; }

# Terraform and its state backend read gcloud's access token, which is valid for an hour, from the environment.
terraform_init() {
  GOOGLE_OAUTH_ACCESS_TOKEN="$(gcloud auth print-access-token)"
  export GOOGLE_OAUTH_ACCESS_TOKEN
  terraform_ init -input=false -reconfigure -backend-config="bucket=$STATE_BUCKET" >/dev/null
  VARIABLES=(-var="project_id=$PROJECT_ID" -var="region=$REGION")
  [[ ! -f "$SETTINGS" ]] || VARIABLES+=(-var-file="$PROJECT_ID.tfvars")
}

check_region() {
  local deployed
  deployed="$(terraform_ output -raw region 2>/dev/null)" || return 0
  [[ -z "$deployed" || "$deployed" == "$REGION" ]] ||
    die "$PROJECT_ID has a deployment in $deployed, and its data cannot be moved: use REGION=$deployed, or another project."
}
