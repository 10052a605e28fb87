#!/usr/bin/env bash
# Builds an image, pushes it, and writes `repository@sha256:…` for the later steps: infra/cloud_build/image.sh NAME DOCKERFILE [BUILD_ARG]…
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
  # docker 23 and newer have BuildKit in a plugin. The Dockerfiles do not need it; it is only faster.
  if docker buildx version >/dev/null 2>&1; then export DOCKER_BUILDKIT=1; fi
  build "$image" "$dockerfile" "${@/#/--build-arg=}"
  docker push --quiet "$image:$BUILD_ID"
  docker push --quiet "$image:latest"
  mkdir -p "$DIGESTS"
  digest_of "$image" >"$DIGESTS/$name"
  echo "pushed $(<"$DIGESTS/$name")"
  if [[ $dockerfile == "jobs/environments/$name/Dockerfile" ]]; then copy_manifest "$image" "$name"; fi
}

# The manifest that the build of an environment's image wrote. The image of the service contains it.
copy_manifest() {
  local image=$1 environment=$2 container
  container=$(docker create "$image:$BUILD_ID")
  docker cp "$container:/app/jobs/environments/$environment/capabilities.json" "jobs/environments/$environment/"
  docker rm "$container" >/dev/null
}

# Unchanged layers come from the last build: from its stage `build`, which has its own tag, and from its image. They keep their
# digests, so that no one stores or pulls them twice.
build() {
  local image=$1 dockerfile=$2
  shift 2
  local -a options=(--file "$dockerfile" --build-arg BUILDKIT_INLINE_CACHE=1 --cache-from "$image:build" "$@")
  docker pull --quiet "$image:build" || echo "no earlier build of $image: building everything"
  docker build "${options[@]}" --target build --tag "$image:build" .
  docker push --quiet "$image:build"
  docker pull --quiet "$image:latest" || true
  docker build "${options[@]}" --build-arg "IMAGE=$image:$BUILD_ID" --cache-from "$image:latest" --tag "$image:$BUILD_ID" --tag "$image:latest" .
}

digest_of() {
  docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$1:$BUILD_ID" | grep --fixed-strings --max-count=1 "$1@sha256:"
}

main "$@"
