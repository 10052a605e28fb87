#!/usr/bin/env bash
# Builds an image, pushes it, and leaves `repository@sha256:…` for the later steps: infra/cloud_build/image.sh NAME DOCKERFILE [BUILD_ARG]…
#
# From cloudbuild.yaml: REPOSITORY, BUILD_ID, and PROFILES, with REQUIRED_PROFILE naming the one profile that needs this image.
set -euo pipefail

readonly DIGESTS=.images # shared by the steps, like all of the working folder

main() {
  local name=$1 dockerfile=$2
  shift 2
  local image=$REPOSITORY/$name
  if [[ -n ${REQUIRED_PROFILE:-} && " ${PROFILES//,/ } " != *" $REQUIRED_PROFILE "* ]]; then
    echo "no profile $REQUIRED_PROFILE in '$PROFILES': $name is not needed"
    return
  fi
  # docker 23 and newer have BuildKit in a plugin of its own. The Dockerfiles need nothing of it, it is only faster.
  if docker buildx version >/dev/null 2>&1; then export DOCKER_BUILDKIT=1; fi
  build "$image" "$dockerfile" "${@/#/--build-arg=}"
  docker push --quiet "$image:$BUILD_ID"
  docker push --quiet "$image:latest"
  mkdir -p "$DIGESTS"
  digest_of "$image" >"$DIGESTS/$name"
  echo "pushed $(<"$DIGESTS/$name")"
}

# What has not changed since the last build is taken from there: from the stage `build`, which is kept under a tag of its own,
# and from the last image. So unchanged layers are the same layers, which nobody stores or pulls twice.
build() {
  local image=$1 dockerfile=$2
  shift 2
  local -a options=(--file "$dockerfile" --build-arg BUILDKIT_INLINE_CACHE=1 --cache-from "$image:build" "$@")
  docker pull --quiet "$image:build" || echo "no earlier build of $image: everything is built anew"
  docker build "${options[@]}" --target build --tag "$image:build" .
  docker push --quiet "$image:build"
  docker pull --quiet "$image:latest" || true
  docker build "${options[@]}" --build-arg "IMAGE=$image:$BUILD_ID" --cache-from "$image:latest" --tag "$image:$BUILD_ID" --tag "$image:latest" .
}

digest_of() {
  docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$1:$BUILD_ID" | grep --fixed-strings --max-count=1 "$1@sha256:"
}

main "$@"
