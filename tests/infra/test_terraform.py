"""infra/terraform without an account: format, names against the provider's schema, references and roles."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.infra import google_schema, terraform_tree
from tests.infra.terraform_tree import TerraformItem, TerraformModule, Value, iter_strings, unquote

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/terraform"
MODULE = terraform_tree.read_files(FOLDER)
RESOURCES = {item.address: item for item in MODULE.items if item.kind in ("resource", "data")}
OFFLINE_ENVIRONMENT = {"TF_CLI_CONFIG_FILE": "/dev/null", "CHECKPOINT_DISABLE": "1", "PATH": "/usr/bin:/bin"}


# --- format -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def terraform() -> str:
    """The terraform command. Required, because without it half of the checks would be missing unnoticed."""
    path = shutil.which("terraform")
    assert path, "terraform is not installed: docs/deploy.md says where to get it"
    return path


def test_terraform_files_are_formatted(terraform: str) -> None:
    run = subprocess.run([terraform, "fmt", "-check", "-diff", str(FOLDER)], capture_output=True, text=True, env=OFFLINE_ENVIRONMENT)
    assert run.returncode == 0, f"terraform fmt infra/terraform\n{run.stdout}{run.stderr}"


# --- names, against the provider's schema -------------------------------------------------------------------------------


def find_problems(files: TerraformModule) -> list[str]:
    """Every name that the provider or Terraform would refuse."""
    resources = {item.address: item for item in files.items if item.kind in ("resource", "data")}
    problems = terraform_tree.find_undeclared(files) + terraform_tree.find_cycle(files)
    for item in files.items:
        problems += google_schema.check_references(item, resources)
        if item.kind == "resource":
            problems += google_schema.check_resource(item)
        elif item.kind == "data":
            problems += google_schema.check_data_source(item)
        elif item.kind == "provider":
            problems += google_schema.check_provider(item)
    return problems


def test_names_match_provider_schema() -> None:
    assert find_problems(MODULE) == []


def test_schema_matches_required_provider_version() -> None:
    (settings,) = MODULE.items_of("terraform")
    major = google_schema.PROVIDER_MAJOR[int(version("pulumi-gcp").split(".")[0])]
    assert f'"~> {major}.0"' in list(iter_strings(settings.body))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("max_retries ", "max_retry ", "google_cloud_run_v2_job.profiles.template.template: no attribute or block max_retry"),
        ('resource "google_cloud_run_v2_job"', 'resource "google_cloud_run_v2_jobs"', "no resource google_cloud_run_v2_jobs"),
        ("containers {", "container {", "no attribute or block container"),
        ('dynamic "env" {', 'dynamic "envs" {', "no attribute or block envs"),
        ("lifecycle_rule {", "lifecycle_rules {", "no attribute or block lifecycle_rules"),
        ("secret_key_ref {", "secret_ref {", "no attribute or block secret_ref"),
        ("accelerator = node_selector.value", "accelerators = node_selector.value", "no attribute or block accelerators"),
        ("field_path   = fields", "path = fields", "no attribute or block path"),
        ("startup_cpu_boost = true", 'startup_cpu_boost = "yes"', "takes a bool"),
        ("max_retries                   = 0", 'max_retries = "none"', "takes a int"),
        ("retry_config {", "retry_config = {", "is a block, not an attribute"),
        ("limits = {", "limits {", "is an attribute, not a block"),
        ("public_access_prevention ", "public_access ", "no attribute or block public_access"),
        ("  location_id ", "  # ", "google_firestore_database.records: location_id is missing"),
        ('  account_id   = "tunesmith-job"', "", "account_id is missing"),
        ("google_service_account.job.email", "google_service_account.job.mail", "has no attribute mail"),
        ("google_service_account.job.email", "google_service_account.jobs.email", "refers to google_service_account.jobs"),
        ("var.max_instances", "var.max_instance", "refers to var.max_instance"),
        ("local.service_environment", "local.environment", "refers to local.environment"),
        ("each.value.location", "each.value.region", "has no attribute region"),
        ("data.google_project.this.number", "data.google_project.this.no", "has no attribute no"),
        ("user_project_override ", "project_override ", "no attribute or block project_override"),
    ],
)
def test_terraform_typo_is_detected(right: str, wrong: str, message: str) -> None:
    sources = [path.read_text() for path in sorted(FOLDER.glob("*.tf"))]
    assert any(right in source for source in sources), f"no file has {right!r} any more: choose another typo"
    files = terraform_tree.parse(source.replace(right, wrong) for source in sources)
    assert any(message in problem for problem in find_problems(files)), find_problems(files)


def test_reference_cycle_is_detected() -> None:
    text = 'resource "google_storage_bucket" "a" {\n  name = google_storage_bucket.b.name\n}\n'
    files = terraform_tree.parse([text, text.replace('"a"', '"b"').replace("bucket.b", "bucket.a")])
    assert terraform_tree.find_cycle(files) == ["google_storage_bucket.a", "google_storage_bucket.b"]


def test_every_declaration_is_used() -> None:
    assert terraform_tree.find_unused(MODULE) == []


# --- access -------------------------------------------------------------------------------------------------------------


def item_strings(kind: str = "resource") -> list[str]:
    """Every string and expression of all items of a kind."""
    return [text for item in MODULE.items_of(kind) for text in iter_strings(item.body)]


def test_nothing_is_public() -> None:
    assert not [text for text in item_strings() + item_strings("variable") if re.search("allUsers|allAuthenticatedUsers", text)]
    (service,) = MODULE.items_of("resource", "google_cloud_run_v2_service")
    assert service.body["invoker_iam_disabled"] is False


def test_state_contains_no_keys_or_secrets() -> None:
    assert MODULE.items_of("resource", "google_service_account_key") == []
    assert MODULE.items_of("resource", "google_secret_manager_secret_version") == []


def test_buckets_are_private_and_not_force_destroyed() -> None:
    buckets = MODULE.items_of("resource", "google_storage_bucket")
    assert buckets
    for bucket in buckets:
        assert unquote(bucket.body["public_access_prevention"]) == "enforced"
        assert bucket.body["uniform_bucket_level_access"] is True
        assert bucket.body["force_destroy"] is False
        assert "cors" not in bucket.body


def test_records_are_protected() -> None:
    (database,) = MODULE.items_of("resource", "google_firestore_database")
    assert unquote(database.body["delete_protection_state"]) == "DELETE_PROTECTION_ENABLED"
    assert unquote(database.body["point_in_time_recovery_enablement"]) == "POINT_IN_TIME_RECOVERY_ENABLED"
    assert unquote(database.body["deletion_policy"]) == "ABANDON"


def granted_roles(account: str) -> set[tuple[str, str]]:
    """The roles of a service account, each with the resource on which it is granted."""
    roles: set[tuple[str, str]] = set()
    for item in MODULE.items_of("resource"):
        if item.type.endswith("_iam_member") and unquote(item.body["member"]) == f"google_service_account.{account}.member":
            targets = [
                unquote(item.body[name])
                for name in ("bucket", "name", "secret_id", "service_account_id", "repository", "project")
                if name in item.body
            ]
            roles.add((unquote(item.body["role"]).removeprefix("roles/"), describe_grant_target(item, targets[0])))
    return roles


def describe_grant_target(item: TerraformItem, name: str) -> str:
    """A short name for the resource of a grant."""
    target = unquote(item.body.get("for_each")) if "each.value" in name else name
    label = {
        "google_storage_bucket.buckets": "every bucket",
        "google_cloud_run_v2_job.profiles": "every job",
        "google_cloud_run_v2_service.tunesmith.name": "service",
        "google_artifact_registry_repository.images.name": "repository",
        "google_secret_manager_secret.signing_key.id": "signing key",
        "var.project_id": "project",
    }.get(target, target)
    if bucket := re.fullmatch(r'google_storage_bucket\.buckets\["(\w+)"\]\.name', label):
        label = f"{bucket[1]} bucket"
    if account := re.fullmatch(r"google_service_account\.(\w+)\.name", label):
        label = f"account {account[1]}"
    return label + (" on condition" if "condition" in item.body else "")


def test_attempt_account_has_only_required_roles() -> None:
    assert granted_roles("job") == {
        ("storage.objectViewer", "configs bucket"),
        ("storage.objectUser", "configs bucket on condition"),
        ("storage.objectViewer", "datasets bucket"),
        ("storage.objectUser", "datasets bucket on condition"),  # two: cached tokens, and the rows of an ingestion
        ("storage.objectUser", "models bucket"),
        ("run.invoker", "service"),
    }


def test_attempt_account_has_no_role_on_buckets_with_narrow_credentials() -> None:
    members = [item for item in MODULE.items_of("resource") if item.type == "google_storage_bucket_iam_member"]
    of_attempts = [item for item in members if unquote(item.body["member"]) == "google_service_account.job.member"]
    assert len(of_attempts) == 6
    assert {unquote(item.body["count"]) for item in of_attempts} == {"var.narrow_attempt_credentials ? 0 : 1"}


def test_attempt_can_write_results_but_not_specs() -> None:
    bound = RESOURCES["google_storage_bucket_iam_member.job_writes_results"]
    assert any("startsWith" in text and "/objects/results/" in text for text in iter_strings(bound.body["condition"]))
    assert 'f"results/{job_id}/{attempt}.json"' in read_source("schema/spec.py")


def test_attempt_can_write_token_cache_but_not_datasets() -> None:
    bound = RESOURCES["google_storage_bucket_iam_member.job_keeps_tokens"]
    assert any("/objects/datasets/" in text and "endsWith" in text and ".arrow" in text for text in iter_strings(bound.body["condition"]))
    assert "/tokens/{digest.hexdigest()}.arrow" in read_source("jobs/llm/data/cache.py")
    assert "{name}.jsonl" in read_source("service/core/datasets/records.py")


def test_ingestion_can_write_only_folder_of_its_attempt() -> None:
    bound = RESOURCES["google_storage_bucket_iam_member.job_writes_datasets"]
    (expression,) = [text for text in iter_strings(bound.body["condition"]) if "startsWith" in text]
    assert "/objects/datasets/" in expression
    assert re.search(r'&& resource\.name\.extract\(\\?"/attempt-\{attempt\}/\\?"\) !=', expression)


def test_service_account_roles_are_minimal() -> None:
    assert granted_roles("api") == {
        ("datastore.user", "project"),
        ("storage.objectUser", "every bucket"),
        ("run.jobsExecutorWithOverrides", "every job"),
        ("google_project_iam_custom_role.execution_keeper.name", "every job"),
        ("iam.serviceAccountUser", "account job"),
        ("iam.serviceAccountTokenCreator", "account api"),
        ("google_project_iam_custom_role.secret_maker.name", "project"),
        ("google_project_iam_custom_role.secret_keeper.name", "project on condition"),
        ("secretmanager.secretAccessor", "signing key"),
    }


def test_scheduler_and_build_account_roles() -> None:
    assert granted_roles("scheduler") == {("run.invoker", "service")}
    assert granted_roles("build") == {
        ("artifactregistry.writer", "repository"),
        ("run.developer", "service"),
        ("run.invoker", "service"),
        ("run.developer", "every job"),
        ("iam.serviceAccountUser", "account api"),
        ("iam.serviceAccountUser", "account job"),
        ("iam.serviceAccountOpenIdTokenCreator", "account build"),
        ("logging.logWriter", "project"),
        ("storage.objectViewer", "project on condition"),
    }


def test_no_basic_role_is_granted() -> None:
    roles = [unquote(item.body["role"]) for item in MODULE.items_of("resource") if "role" in item.body]
    assert not [role for role in roles if re.search(r"roles/(owner|editor|viewer)$|[aA]dmin$", role)]
    permissions = [
        permission
        for item in MODULE.items_of("resource", "google_project_iam_custom_role")
        for permission in iter_strings(item.body["permissions"])
    ]
    assert not [permission for permission in permissions if "*" in permission or "IamPolicy" in permission or "actAs" in permission]


def test_secret_access_is_limited_to_job_secrets() -> None:
    maker, keeper = (RESOURCES[f"google_project_iam_custom_role.secret_{name}"] for name in ("maker", "keeper"))
    assert {unquote(permission) for permission in iter_strings(maker.body["permissions"])} == {
        "secretmanager.secrets.create",
        "secretmanager.secrets.list",
    }
    assert "secretmanager.versions.access" in {unquote(permission) for permission in iter_strings(keeper.body["permissions"])}
    bound = RESOURCES["google_project_iam_member.api_keeps_secrets_of_jobs"]
    assert any("/secrets/tunesmith-job-" in text and "startsWith" in text for text in iter_strings(bound.body["condition"]))


# --- what the code relies on --------------------------------------------------------------------------------------------


def read_source(path: str) -> str:
    """The text of one of the project's files; its modules cannot be imported here."""
    return (ROOT / path).read_text()


def test_every_launcher_profile_has_cloud_run_job() -> None:
    profiles_source = read_source("service/adapters/launchers/cloud_run/profiles.py")
    calls = [
        {keyword.arg: keyword.value for keyword in node.keywords}
        for node in ast.walk(ast.parse(profiles_source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Profile"
    ]
    sizes = {
        ast.literal_eval(call["name"]): (ast.literal_eval(call["cpus"]), f"{ast.unparse(call['memory_bytes']).removesuffix(' * GIB')}Gi")
        for call in calls
    }
    profiles = read_hardware_profiles()
    assert sizes == {name: (int(unquote(profile["cpu"])), unquote(profile["memory"])) for name, profile in profiles.items()}
    assert set(sizes) == {"l4", "rtx-pro-6000", "cpu"}
    (variable,) = [item for item in MODULE.items_of("variable") if item.labels == ("profiles",)]
    assert any(all(f'"{name}"' in text for name in sizes) for text in iter_strings(variable.body["validation"]))
    render = read_source("service/adapters/launchers/cloud_run/render.py")
    assert 'f"tunesmith-{profile}"' in render
    assert 'f"tunesmith-{environment}-{profile}"' in render
    assert 'CONTAINER = "attempt"' in render


def read_hardware_profiles() -> dict[str, dict[str, Value]]:
    """The table of hardware, by profile."""
    table = MODULE.locals["hardware"]
    assert isinstance(table, dict)
    return {unquote(name): row for name, row in table.items() if isinstance(row, dict) and name not in terraform_tree.PARSER_KEYS}


@pytest.mark.parametrize(
    ("profiles", "jobs"),
    [
        (["l4", "cpu"], {"l4", "cpu", "data-cpu"}),
        (["l4", "rtx-pro-6000"], {"l4", "rtx-pro-6000"}),
    ],
)
def test_datasets_are_read_on_profiles_without_gpu(terraform: str, tmp_path: Path, profiles: list[str], jobs: set[str]) -> None:
    for name in ("variables.tf", "jobs.tf"):
        text = (FOLDER / name).read_text()
        (tmp_path / name).write_text(text.partition("\nresource ")[0] + "\n")
    variables = [f"-var={value}" for value in ("project_id=my-project", "region=europe-west4", f"profiles={json.dumps(profiles)}")]
    expression = "jsonencode({ for name, hardware in local.jobs : name => hardware.accelerator })"
    run = subprocess.run(
        [terraform, "console", *variables], input=expression, capture_output=True, text=True, cwd=tmp_path, env=OFFLINE_ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    accelerators = json.loads(json.loads(run.stdout))
    assert accelerators.keys() == jobs
    assert not [name for name, accelerator in accelerators.items() if name.startswith("data-") and accelerator]


def test_hardware_profiles_are_valid_on_cloud_run() -> None:
    cpus = {name: int(unquote(row["cpu"])) for name, row in read_hardware_profiles().items()}
    gigabytes = {name: int(unquote(row["memory"]).removesuffix("Gi")) for name, row in read_hardware_profiles().items()}
    assert 4 <= cpus["l4"] <= 8
    assert 16 <= gigabytes["l4"] <= 32
    assert cpus["rtx-pro-6000"] >= 20
    assert gigabytes["rtx-pro-6000"] >= 80
    assert cpus["cpu"] <= 8
    assert gigabytes["cpu"] <= 32


def get_only_block(body: Value, *names: str) -> dict[str, Value]:
    """The block at a path of names, each of which occurs once."""
    for name in names:
        assert isinstance(body, dict)
        blocks = body[name]
        assert isinstance(blocks, list)
        (body,) = blocks
    assert isinstance(body, dict)
    return body


def test_cloud_run_job_never_retries() -> None:
    (job,) = MODULE.items_of("resource", "google_cloud_run_v2_job")
    assert unquote(job.body["name"]) == "tunesmith-${each.key}"
    assert get_only_block(job.body, "template")["task_count"] == 1
    task = get_only_block(job.body, "template", "template")
    assert task["max_retries"] == 0
    assert unquote(task["service_account"]) == "google_service_account.job.email"
    assert unquote(get_only_block(task, "containers")["name"]) == "attempt"
    assert "env" not in get_only_block(task, "containers")


def read_service_environment() -> dict[str, str]:
    """The service's environment variables; expressions are not evaluated."""
    table = MODULE.locals["service_environment"]
    assert isinstance(table, dict)
    return {unquote(name): unquote(value) for name, value in table.items() if name not in terraform_tree.PARSER_KEYS}


def service_settings() -> set[str]:
    """Every environment variable that the service and its Cloud Run launcher read."""
    launcher = "service/adapters/launchers/cloud_run/settings.py"
    return {*_read_settings("service/settings.py", "TUNESMITH_"), *_read_settings(launcher, "TUNESMITH_CLOUD_RUN_")}


def _read_settings(path: str, prefix: str) -> Iterator[str]:
    """The variables of the settings class in a file."""
    (settings,) = [
        node for node in ast.walk(ast.parse(read_source(path))) if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")
    ]
    for line in settings.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            alias = [keyword.value for keyword in getattr(line.value, "keywords", []) if keyword.arg == "validation_alias"]
            names = [str(node.value) for part in alias for node in ast.walk(part) if isinstance(node, ast.Constant)]
            yield from names or [f"{prefix}{line.target.id.upper()}"]


def test_service_environment_has_only_known_settings() -> None:
    (service,) = MODULE.items_of("resource", "google_cloud_run_v2_service")
    secret = unquote(get_only_block(service.body, "template", "containers", "env")["name"])
    assert secret == "TUNESMITH_SIGNING_KEY"
    assert read_service_environment().keys() | {secret} <= service_settings()


def test_service_environment_has_required_settings() -> None:
    environment = read_service_environment()
    assert (environment["TUNESMITH_JOB_STORE"], environment["TUNESMITH_LAUNCHERS"], environment["TUNESMITH_SECRET_STORE"]) == (
        "firestore",
        "cloud-run",
        "secret-manager",
    )
    assert environment["TUNESMITH_RECONCILE_INTERVAL_S"] == "0"
    assert environment["TUNESMITH_LOG_FORMAT"] == "json"
    assert environment["TUNESMITH_PUBLIC_URL"] == environment["TUNESMITH_IDENTITY_AUDIENCE"] == "local.service_url"
    assert {
        "PROJECT_ID",
        "REGION",
        "GCS_CONFIG_BUCKET_NAME",
        "TUNESMITH_CLOUD_RUN_PROFILES",
        "TUNESMITH_CLOUD_RUN_TIME_LIMIT_S",
    } <= environment.keys()
    for role_of in ('google_service_account.scheduler.email, role = "scheduler"', "cloud_run = true"):
        assert re.sub(r"\s+", " ", role_of) in re.sub(r"\s+", " ", read_source("infra/terraform/service.tf"))
    assert "PORT" not in environment  # Cloud Run sets it, and refuses a deployment that does
    assert int(environment["TUNESMITH_MAX_UPLOAD_BYTES"]) < 32 << 20


def test_service_has_memory_for_each_upload_that_it_reads_at_once() -> None:
    environment = read_service_environment()
    (service,) = MODULE.items_of("resource", "google_cloud_run_v2_service")
    limits = get_only_block(service.body, "template", "containers", "resources")["limits"]
    assert isinstance(limits, dict)
    memory = int(unquote(limits["memory"]).removesuffix("Gi")) << 30
    processes = int(environment["TUNESMITH_MAX_CONCURRENT_UPLOADS"]) * int(environment["TUNESMITH_INGEST_MEMORY_BYTES"])
    assert processes + (512 << 20) <= memory  # the service, and the files in /tmp


def test_liveness_probe_does_not_depend_on_buckets() -> None:
    (service,) = MODULE.items_of("resource", "google_cloud_run_v2_service")
    container = get_only_block(service.body, "template", "containers")
    assert "tcp_socket" in get_only_block(container, "startup_probe")
    path = unquote(get_only_block(container, "liveness_probe", "http_get")["path"])
    assert path == "/docs"


def test_scheduler_urls_exist() -> None:
    table = MODULE.locals["maintenance"]
    assert isinstance(table, dict)
    for name in table.keys() - set(terraform_tree.PARSER_KEYS):
        assert f'@maintenance_router.post("/{unquote(name)}")' in read_source("service/api/internal.py")
    (job,) = MODULE.items_of("resource", "google_cloud_scheduler_job")
    assert unquote(get_only_block(job.body, "http_target")["uri"]) == "${local.service_url}/internal/${each.key}"
    assert unquote(get_only_block(job.body, "http_target", "oidc_token")["audience"]) == "local.service_url"


def test_alerts_match_logged_messages() -> None:
    logged = "".join(path.read_text() for path in (ROOT / "service/core/jobs").glob("*.py"))
    for message in [*iter_strings(MODULE.locals["stuck_messages"]), '"status changed"']:
        assert re.search(rf'log\.\w+\("{unquote(message)}"', logged), message
    assert '"status": after.status' in logged
    assert '"message": record.getMessage()' in read_source("service/logs.py")


# --- invalid variables --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variables_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which Terraform validates variables without a provider."""
    folder = tmp_path_factory.mktemp("variables")
    shutil.copy(FOLDER / "variables.tf", folder)
    return folder


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("project_id=My", "A project id is like"),
        ("region=Europe", "A region is like europe-west4"),
        ('profiles=["l4", "h100"]', "one or more of l4"),
        ("profiles=[]", "one or more of l4"),
        ('invokers=["allUsers"]', "never public"),
        ("attempt_time_limit_s=60", "from 120 seconds"),
        ("soft_delete_days=3", "from 7 to 90"),
        ('invokers=["user:me@example.com"]', None),
    ],
)
def test_invalid_variable_error_is_readable(terraform: str, variables_folder: Path, setting: str, message: str | None) -> None:
    variables = [f"-var={value}" for value in ("project_id=my-project", "region=europe-west4", setting)]
    run = subprocess.run(
        [terraform, "console", *variables], input="1", capture_output=True, text=True, cwd=variables_folder, env=OFFLINE_ENVIRONMENT
    )
    errors = " ".join(run.stderr.replace("\u2502", " ").split())
    assert (run.returncode == 0) if message is None else message in errors, errors


# --- indexes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated_locals(terraform: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, object]]]:
    """The locals of the index file, as Terraform evaluates them. The resources iterate over them."""
    home = tmp_path_factory.mktemp("indexes")
    (home / "infra/terraform").mkdir(parents=True)
    shutil.copy(FOLDER / "firestore_indexes.tf", home / "infra/terraform")
    shutil.copy(ROOT / "infra/firestore.indexes.json", home / "infra")
    expression = "jsonencode({ indexes = local.firestore_indexes, fields = local.firestore_fields })"
    run = subprocess.run(
        [terraform, "console"], input=expression, capture_output=True, text=True, cwd=home / "infra/terraform", env=OFFLINE_ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(json.loads(run.stdout))


def test_terraform_creates_exactly_listed_indexes(evaluated_locals: dict[str, dict[str, dict[str, object]]]) -> None:
    listed = json.loads(read_source("infra/firestore.indexes.json"))
    in_order: Callable[[object], str] = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
    assert sorted(evaluated_locals["indexes"].values(), key=in_order) == sorted(listed["indexes"], key=in_order)
    assert sorted(evaluated_locals["fields"].values(), key=in_order) == sorted(listed["fieldOverrides"], key=in_order)


def test_index_resources_handle_every_key() -> None:
    """Terraform would silently ignore a key that firestore.tf does not read."""
    listed = json.loads(read_source("infra/firestore.indexes.json"))
    known = {"collectionGroup", "queryScope", "fields", "fieldPath", "order", "arrayConfig", "ttl", "indexes"}
    rows = [*listed["indexes"], *listed["fieldOverrides"]]
    inner = [part for row in rows for part in [*row.get("fields", []), *row.get("indexes", [])]]
    assert {name for row in [*rows, *inner] for name in row} <= known
    assert listed.keys() == {"indexes", "fieldOverrides"}
    read = read_source("infra/terraform/firestore.tf") + read_source("infra/terraform/firestore_indexes.tf")
    assert all(f".{name}" in read for name in known)
