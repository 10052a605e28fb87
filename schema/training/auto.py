"""Numbers that the service chooses: a request sends "auto", and the job stores what was chosen."""

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

AUTO_WORD = "auto"
AUTO = 0  # what "auto" is until the service has chosen. No field that accepts it can be 0, so it never meets a number that was sent


class AcceptsAuto:
    """Marks an integer field that accepts "auto", in `Annotated` after its bounds."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401  # pydantic's signature
        return core_schema.no_info_wrap_validator_function(_accept_auto, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:  # Any: JSON
        return {"anyOf": [handler(schema), {"const": AUTO_WORD, "type": "string"}]}


def _accept_auto(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, str) and value != AUTO_WORD:
        raise PydanticCustomError("number_or_auto", 'must be a whole number, or "auto" to leave the choice to the service')
    return AUTO if value == AUTO_WORD else validate(value)
