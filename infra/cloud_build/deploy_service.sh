#!/usr/bin/env bash
# Deploys the service by digest: a new revision without traffic, a look at its health, and then everybody's requests.
# From cloudbuild.yaml: REGION. Everything but the image is Terraform's.
#
# If the look fails, the build fails and the old revision goes on; the new one stays, under its tag, to be looked at. Until a
# later build succeeds all requests stay with the old one, whatever Terraform changes.
set -euo pipefail

readonly SERVICE=tunesmith
readonly TAG=candidate
IMAGE=$(<.images/service) # fails where no step has pushed one
readonly IMAGE

main() {
  gcloud run services update "$SERVICE" --region="$REGION" --image="$IMAGE" --no-traffic --tag="$TAG" --quiet
  local url token
  url=$(gcloud run services describe "$SERVICE" --region="$REGION" --format='value(status.url)')
  token=$(gcloud auth print-identity-token --audiences="$url")
  check_health "${url/https:\/\//https://$TAG---}" "$token"
  # Not to the revision by its name: those that Terraform makes later would get no requests.
  gcloud run services update-traffic "$SERVICE" --region="$REGION" --to-latest --remove-tags="$TAG" --quiet
  echo "$url runs $IMAGE"
}

# 200 only if Firestore and all buckets answer. The first request waits for the container, and IAM may be late to know a new url.
check_health() {
  echo "GET $1/health"
  curl --silent --show-error --fail-with-body --max-time 30 --retry 6 --retry-delay 5 --retry-all-errors --config - "$1/health" \
    <<<"header = \"Authorization: Bearer $2\"" # not an argument, which everybody on the machine could read
  echo
}

main
