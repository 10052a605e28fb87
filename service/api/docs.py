"""`GET /docs`: Swagger UI, from files of this service, under a policy that allows nothing else."""

import base64
import hashlib
import re

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

ASSETS_URL = "/docs/assets"
INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
SWAGGER_PARAMETERS = {"validatorUrl": None}  # or Swagger UI would send the schema to a validator on the internet

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def get_docs(request: Request) -> HTMLResponse:
    """The page. Its one inline script is allowed by its hash."""
    app: FastAPI = request.app
    prefix = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{prefix}{app.openapi_url}",
        title=f"{app.title} - Swagger UI",
        swagger_js_url=f"{prefix}{ASSETS_URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{prefix}{ASSETS_URL}/swagger-ui.css",
        swagger_favicon_url=f"{prefix}{ASSETS_URL}/favicon.png",
        swagger_ui_parameters=SWAGGER_PARAMETERS,
    )
    page.headers["Content-Security-Policy"] = _content_security_policy(bytes(page.body))
    return page


def _content_security_policy(page: bytes) -> str:
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in INLINE_SCRIPT.findall(page)]
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' {' '.join(hashes)}",
            "style-src 'self'",
            "img-src 'self' data:",  # the icons in the style sheet
            "connect-src 'self'",  # "Try it out"
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
