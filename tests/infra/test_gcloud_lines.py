"""gcloud accepts every gcloud command that the project documents, runs or suggests to users."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.gcloud import Gcloud
from tests.infra.gcloud_lines import CommandLine, find_in_python, find_in_text

ROOT = Path(__file__).resolve().parents[2]
TEXT_GLOBS = ("*.md", "docs/**/*.md", "Makefile", "cloudbuild.yaml", "infra/**/*.sh", "infra/**/*.tf", "**/*Dockerfile", ".gcloudignore")
PYTHON_GLOBS = ("service/**/*.py", "storage/**/*.py", "infra/**/*.py")


def find_all_commands(groups: set[str]) -> Iterator[CommandLine]:
    for find, globs in ((find_in_text, TEXT_GLOBS), (find_in_python, PYTHON_GLOBS)):
        for path in sorted({path for glob in globs for path in ROOT.glob(glob) if ".venvs" not in path.parts}):
            yield from find(path.read_text(), path.relative_to(ROOT).as_posix(), groups)


def test_gcloud_accepts_every_documented_command(gcloud: Gcloud) -> None:
    lines = list(find_all_commands(gcloud.command_groups))
    assert len({line.path for line in lines}) > 5
    errors = gcloud.lint([line.command for line in lines])
    assert [f"{line.path}:{line.number}: {line.command}\n    {errors[line.command]}" for line in lines if errors[line.command]] == []


@pytest.mark.parametrize(
    "command",
    [
        "gcloud run jobs updat tunesmith-l4 --region=europe-west4",
        "gcloud run jobs update tunesmith-l4 --regoin=europe-west4",
        "gcloud storage buckets create gs://b --location",
        "gcloud builds submit --config",
        "gcloud firestore databases create --type=natvie",
    ],
)
def test_command_typo_is_detected(gcloud: Gcloud, command: str) -> None:
    assert gcloud.lint([command])[command]


def test_flag_value_after_space_is_accepted(gcloud: Gcloud) -> None:
    command = "gcloud builds submit --config cloudbuild.yaml --ignore-file=.gcloudignore"
    assert gcloud.lint([command]) == {command: None}


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("```bash\ngcloud projects list\n```", "gcloud projects list"),
        ("  gcloud run jobs update j \\\n    --region=r\n", "gcloud run jobs update j --region=r"),
        ("call `gcloud projects\nlist` and look", "gcloud projects list"),
        ('curl -H "Authorization: Bearer $(gcloud auth print-identity-token)" $URL', "gcloud auth print-identity-token"),
        ("key | gcloud secrets versions add k --data-file=- >/dev/null", "gcloud secrets versions add k --data-file=-"),
        ('die "No account: gcloud projects list. A new one: make it"', "gcloud projects list"),
        (
            'gcloud run jobs update "tunesmith-$profile" --region="$REGION" || exit 1',
            "gcloud run jobs update tunesmith-filled-in --region=filled-in",
        ),
        ("gcloud logging read 'a=\"b\" AND c' --limit=1 2>&1", "gcloud logging read 'a=\"b\" AND c' --limit=1"),
        ("run gcloud projects list, or ask", "gcloud projects list"),
        ("run gcloud projects list or ask", "gcloud projects list"),
        (
            "gcloud run services describe s --format='value(status.url)' # the url",
            "gcloud run services describe s '--format=value(status.url)'",
        ),
    ],
)
def test_command_is_extracted(text: str, command: str) -> None:
    assert [line.command for line in find_in_text(text, "x", {"projects", "run", "auth", "secrets", "logging"})] == [command]


def test_prose_mention_is_not_a_command() -> None:
    assert list(find_in_text("deployed with `gcloud`, and gcloud knows; check_tools gcloud terraform", "x", {"projects"})) == []


def test_command_has_line_number() -> None:
    text = "one\n\n  two \\\n  three\ngcloud projects list\n"
    assert [line.number for line in find_in_text(text, "x", {"projects"})] == [5]


def test_python_strings_resolve_variables() -> None:
    source = 'def f(p):\n    member = f"--member={p}"\n    return f"fix it: gcloud projects add-iam-policy-binding {p} {member} --role=r"\n'
    lines = list(find_in_python(source, "x", {"projects"}))
    assert lines == [CommandLine("gcloud projects add-iam-policy-binding filled-in --member=filled-in --role=r", "x", 3)]
