#!/usr/bin/env bash
# Sets the image of each Cloud Run job by digest; running executions keep their image. The image of the environment llm runs on every
# profile, in the job `tunesmith-PROFILE`; that of data on profiles without a GPU, in `tunesmith-data-PROFILE`.
# From cloudbuild.yaml: REGION, PROFILES.
set -euo pipefail

for profile in ${PROFILES//,/ }; do
  case $profile in
    l4 | cpu) image=$(<.images/llm) ;;
    rtx-pro-6000) image=$(<.images/llm-cuda13) ;; # Blackwell needs a CUDA 13 build of torch, see jobs/environments/llm/Dockerfile
    *)
      echo "error: no image for the profile '$profile'; known: l4, rtx-pro-6000, cpu" >&2
      exit 1
      ;;
  esac
  gcloud run jobs update "tunesmith-$profile" --region="$REGION" --image="$image" --quiet
  if [[ $profile == cpu ]]; then
    gcloud run jobs update "tunesmith-data-$profile" --region="$REGION" --image="$(<.images/data)" --quiet
  fi
done
