#!/usr/bin/env bash
# Deploys the service by digest: creates a revision without traffic, checks its health, and then sends it all requests.
# From cloudbuild.yaml: REGION. Terraform manages everything but the image.
#
# If the health check fails, the build fails and the old revision keeps all requests until a later build succeeds, whatever
# Terraform changes. The new revision stays under its tag, for inspection.
set -euo pipefail

readonly SERVICE=tunesmith
readonly TAG=candidate
IMAGE=$(<.images/service) # fails if no step has pushed an image
readonly IMAGE

main() {
  gcloud run services update "$SERVICE" --region="$REGION" --image="$IMAGE" --no-traffic --tag="$TAG" --quiet
  local url token
  url=$(gcloud run services describe "$SERVICE" --region="$REGION" --format='value(status.url)')
  token=$(gcloud auth print-identity-token --audiences="$url")
  check_health "${url/https:\/\//https://$TAG---}" "$token"
  # Not by the name of the revision: revisions that Terraform creates later would get no requests.
  gcloud run services update-traffic "$SERVICE" --region="$REGION" --to-latest --remove-tags="$TAG" --quiet
  echo "$url runs $IMAGE"
}

# 200 only if Firestore and all buckets respond. The first request waits for the container, and IAM may take time to know a new URL.
check_health() {
  echo "GET $1/health"
  curl --silent --show-error --fail-with-body --max-time 30 --retry 6 --retry-delay 5 --retry-all-errors --config - "$1/health" \
    <<<"header = \"Authorization: Bearer $2\"" # not an argument: every user of the machine can read those
  echo
}

main
