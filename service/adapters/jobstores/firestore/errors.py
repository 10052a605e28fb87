"""Firestore's errors: which of them mean a lost race, which leave a commit in doubt, and what an operator can do about the rest."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from google.api_core import exceptions as google_errors

from service.core.errors import TooLarge, TunesmithError, Unavailable


class PreconditionFailed(Exception):
    """A document changed after it was read; nothing was written."""


# A commit that raised one of these was not carried out: another writer was first.
WRITE_CONFLICT_ERRORS = (google_errors.AlreadyExists, google_errors.FailedPrecondition, google_errors.NotFound, google_errors.Aborted)
# After one of these a commit may or may not have been carried out.
AMBIGUOUS_ERRORS = (google_errors.ServerError, google_errors.Cancelled, google_errors.TooManyRequests)


def is_database_error(error: google_errors.GoogleAPICallError) -> bool:
    """Whether the error concerns the database as a whole and not one document."""
    return "does not exist for project" in str(error) or "Datastore Mode" in str(error)


def translate_error(error: Exception, project_id: str, database: str) -> TunesmithError:
    """The service's error for one of Firestore's, with the command that fixes it."""
    database_label = f"Firestore (project {project_id}, database {database})"
    database_flags = f"--project={project_id} --database='{database}' --type=firestore-native"
    create_database = f"gcloud firestore databases create {database_flags} --location=REGION"
    match error:
        case PreconditionFailed():
            return Unavailable("too many writers are changing the record at once; try again")
        case google_errors.Forbidden() if "SERVICE_DISABLED" in str(error) or "has not been used in project" in str(error):
            return Unavailable(
                f"{database_label}: the API is not enabled", hint=f"gcloud services enable firestore.googleapis.com --project={project_id}"
            )
        case google_errors.Forbidden() | google_errors.Unauthorized():
            member = f"serviceAccount:tunesmith-api@{project_id}.iam.gserviceaccount.com"
            return Unavailable(
                f"{database_label} denied access to the service's account: it lacks the role roles/datastore.user",
                hint=f"gcloud projects add-iam-policy-binding {project_id} --member={member} --role=roles/datastore.user",
            )
        case google_errors.NotFound() if is_database_error(error):
            return Unavailable(f"{database_label}: there is no such database", hint=create_database)
        case google_errors.FailedPrecondition() if "index" in str(error):
            return Unavailable(
                f"{database_label} lacks an index, or is still building it: {error.message}",
                hint="infra/firestore.indexes.json names every index that is needed; `make deploy` creates them",
            )
        case google_errors.FailedPrecondition() if is_database_error(error):
            return Unavailable(f"{database_label} is in Datastore mode; Tunesmith needs one in native mode", hint=create_database)
        case google_errors.InvalidArgument() if "longer than" in str(error) or "maximum allowed size" in str(error):
            return TooLarge(f"the record exceeds the size limit of Firestore: {error.message}")
        case google_errors.TooManyRequests():
            quotas_url = f"https://console.cloud.google.com/iam-admin/quotas?service=firestore.googleapis.com&project={project_id}"
            return Unavailable(f"{database_label}: a quota is used up: {error.message}", hint=quotas_url)
        case google_errors.ClientError() if not isinstance(error, AMBIGUOUS_ERRORS):
            return Unavailable(f"{database_label} refused the request: {error}")
        case _:
            return Unavailable(f"{database_label} did not answer in time: {type(error).__name__}")
