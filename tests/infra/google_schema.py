"""The Google provider's schema, from pulumi-gcp: the resources and their attributes and blocks.

pulumi-gcp is generated from the provider. Its names differ in two ways: classes are grouped in modules, and lists are in the plural.
Blocks that Terraform names in the singular are listed here by hand, and nothing checks that list. The schema also has the attributes
of the beta provider.
"""

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import pulumi_gcp

from tests.infra.terraform_tree import Body, TerraformItem, Value, is_block, iter_strings, strip_parser_keys, unquote

PROVIDER_MAJOR = {10: 8}  # pulumi-gcp 9 has the provider's version 7, 10 its version 8

# Resource types that are not the module's and the class's name together, unlike google_cloud_run_v2_job, which is cloudrunv2.Job.
RESOURCE_CLASS_OVERRIDES = {
    "google_project_service": ("projects", "Service"),
    "google_project_iam_member": ("projects", "IAMMember"),
    "google_project_iam_custom_role": ("projects", "IAMCustomRole"),
    "google_service_account": ("serviceaccount", "Account"),
    "google_service_account_iam_member": ("serviceaccount", "IAMMember"),
    "google_storage_bucket_iam_member": ("storage", "BucketIAMMember"),
}
DATA_SOURCES = {"google_project": ("organizations", "get_project", "GetProjectResult")}

BLOCK_TO_ARGUMENT = {"env": "envs", "lifecycle_rule": "lifecycle_rules", "matches_prefix": "matches_prefixes"}
META_ARGUMENTS = {"count", "for_each", "depends_on", "lifecycle", "provider", "timeouts"}

# Optional in Pulumi, which generates them; required in Terraform.
REQUIRED_NAME_ARGUMENTS = {
    "google_cloud_run_v2_job": "name",
    "google_cloud_run_v2_service": "name",
    "google_cloud_scheduler_job": "name",
    "google_firestore_database": "name",
    "google_logging_metric": "name",
    "google_project_iam_custom_role": "role_id",
    "google_secret_manager_secret": "secret_id",
    "google_service_account": "account_id",
    "google_storage_bucket": "name",
    "google_cloud_run_v2_job_iam_member": "name",
    "google_cloud_run_v2_service_iam_member": "name",
}


@dataclass(frozen=True)
class Field:
    """What a name may have as its value: a plain value, or blocks with their own schema."""

    required: bool
    repeated: bool
    literal_type: type | None  # bool, int or str, if only this type is valid
    block_type: type | None

    def is_wrong_literal(self, value: Value) -> bool:
        """Whether a literal has another type. Expressions are not checked."""
        if self.literal_type is None or (isinstance(value, str) and ("${" in value or value == "null")) or value is None:
            return False
        is_text = isinstance(value, str)
        return is_text != (self.literal_type is str) or (isinstance(value, bool) != (self.literal_type is bool))


def check_resource(item: TerraformItem) -> list[str]:
    """The problems that the provider would report for the names in a resource."""
    resource_class = _find_resource_class(item.type)
    if resource_class is None:
        return [f"{item.address}: the provider has no resource {item.type}"]
    module, name = resource_class
    fields = schema_fields(getattr(module, f"{name}Args"))
    required = REQUIRED_NAME_ARGUMENTS.get(item.type)
    missing = [f"{item.address}: {required} is missing"] if required and required not in item.body else []
    return missing + list(_check_body(item.address, {k: v for k, v in item.body.items() if k not in META_ARGUMENTS}, fields))


def check_references(item: TerraformItem, resources: Mapping[str, TerraformItem]) -> list[str]:
    """References to attributes that the other resource does not have, such as google_service_account.api.emial."""
    attributes = [(match[1], match[2]) for text in iter_strings(item.body) for match in ATTRIBUTE.finditer(text)]
    loop_attributes = ATTRIBUTE_OF_LOOP.findall(" ".join(iter_strings(item.body)))
    iterated = unquote(item.body.get("for_each"))
    attributes += [(iterated, name) for name in loop_attributes if iterated in resources]
    return [
        f"{item.address}: {address} has no attribute {name}"
        for address, name in attributes
        if address in resources and name not in resource_attributes(resources[address])
    ]


ATTRIBUTE = re.compile(r"(?<![\w.])((?:data\.)?google_\w+\.\w+)(?:\[[^\]]*\])?\.([a-z_]\w*)")
ATTRIBUTE_OF_LOOP = re.compile(r"\beach\.value\.(\w+)")


def resource_attributes(item: TerraformItem) -> set[str]:
    """The attributes of a resource or data source."""
    if item.kind == "data":
        module, _, result = DATA_SOURCES[item.type]
        return _properties(getattr(_module(module), result))
    resource_class = _find_resource_class(item.type)
    return _properties(getattr(*resource_class)) | {"id"} if resource_class else set()


def check_data_source(item: TerraformItem) -> list[str]:
    """The problems that the provider would report for a data source."""
    if item.type not in DATA_SOURCES:
        return [f"{item.address}: no data source {item.type} is known here; see DATA_SOURCES"]
    module, function, _ = DATA_SOURCES[item.type]
    known = set(inspect.signature(getattr(_module(module), function)).parameters)
    return [f"{item.address}: no attribute {name}" for name in item.body if name not in known | META_ARGUMENTS]


def check_provider(item: TerraformItem) -> list[str]:
    """The problems that the provider would report for its own block."""
    return list(_check_body(item.address, item.body, schema_fields(pulumi_gcp.ProviderArgs)))


def _check_body(path: str, body: Body, fields: Mapping[str, Field]) -> Iterator[str]:
    written = _expand_dynamic_blocks(body)
    for name in written:
        key = BLOCK_TO_ARGUMENT.get(name, name)
        if key not in fields or name in BLOCK_TO_ARGUMENT.values():
            yield f"{path}: no attribute or block {name}; known: {', '.join(sorted(fields))}"
        else:
            yield from _check_value(f"{path}.{name}", written[name], fields[key])
    for key, field in fields.items():
        if field.required and not any(BLOCK_TO_ARGUMENT.get(name, name) == key for name in written):
            yield f"{path}: {key} is missing"


def _check_value(path: str, value: Value, field: Field) -> Iterator[str]:
    if field.block_type is None:
        if is_block(value):
            yield f"{path} is an attribute, not a block"
        elif field.is_wrong_literal(value):
            yield f"{path} takes a {field.literal_type.__name__ if field.literal_type else ''}, not {value!r}"
        return
    if not is_block(value):
        yield f"{path} is a block, not an attribute"
        return
    assert isinstance(value, list)
    if len(value) > 1 and not field.repeated:
        yield f"{path} may occur only once"
    for block in value:
        assert isinstance(block, dict)
        yield from _check_body(path, strip_parser_keys(block), schema_fields(field.block_type))


def _expand_dynamic_blocks(body: Body) -> Body:
    """The body with each `dynamic "x" { content { … } }` replaced by the block x that it generates."""
    written = {name: value for name, value in body.items() if name != "dynamic"}
    blocks = body.get("dynamic", [])
    assert isinstance(blocks, list)
    for block in blocks:
        assert isinstance(block, dict)
        for label, inner in strip_parser_keys(block).items():
            assert isinstance(inner, dict)
            earlier, content = written.get(unquote(label), []), inner["content"]
            assert isinstance(earlier, list)
            assert isinstance(content, list)
            written[unquote(label)] = [*earlier, *content]
    return written


# Any: pulumi's classes are inspected here, not used.
@cache
def schema_fields(args: Any) -> dict[str, Field]:
    """The schema of a resource or a block, from the constructor of its Args class."""
    module = importlib.import_module(args.__module__)
    parameters = list(inspect.signature(args.__init__).parameters.values())[1:]
    return {
        parameter.name: _field(str(parameter.annotation), parameter.default is inspect.Parameter.empty, module) for parameter in parameters
    }


def _field(annotation: str, required: bool, module: ModuleType) -> Field:
    block = re.search(r"ForwardRef\('(\w+Args)'\)", annotation)
    repeated = "Sequence[" in annotation
    literals = {"bool": bool, "int": int, "float": float, "str": str}
    literal = re.match(r"typing\.Union\[(bool|int|float|str)\b", annotation) or re.match(r"Union\[(bool|int|float|str)\b", annotation)
    kind = literals[literal[1]] if literal and not repeated and "Mapping" not in annotation else None
    return Field(required, repeated, kind, getattr(module, block[1]) if block else None)


def _properties(cls: type) -> set[str]:
    return {name for name, value in inspect.getmembers(cls) if isinstance(value, property)}


@cache
def _module(name: str) -> ModuleType:
    module = importlib.import_module(f"pulumi_gcp.{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other classes in the module
        assert module.outputs, name  # loads the module, which is empty until an attribute is read
    return module


@cache
def _find_resource_class(type_: str) -> tuple[ModuleType, str] | None:
    """The module and the name of a resource's class; None for an unknown resource type."""
    if type_ in RESOURCE_CLASS_OVERRIDES:
        module, name = RESOURCE_CLASS_OVERRIDES[type_]
        return (_module(module), name)
    squashed = type_.removeprefix("google_").replace("_", "")
    for info in pkgutil.iter_modules(pulumi_gcp.__path__):
        if info.ispkg and squashed.startswith(info.name.replace("_", "")):
            rest = squashed.removeprefix(info.name.replace("_", ""))
            for name in dir(_module(info.name)):
                if name.lower() == f"{rest}args" and hasattr(_module(info.name), name.removesuffix("Args")):
                    return (_module(info.name), name.removesuffix("Args"))
    return None
