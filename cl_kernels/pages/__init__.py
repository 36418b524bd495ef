"""What the self-contained pages share: the frame, the style, the colours of series, and the rendering.

`train`'s report and `compare`'s report are templates that extend `frame.html.jinja`. A page loads nothing: no script
but its own, allowed by its hash, no font, no file beside it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from cl_kernels.errors import BackendUnavailableError

__all__ = ["DARK", "LIGHT", "TEMPLATES", "render", "script_hash"]

TEMPLATES = Path(__file__).parent

# One colour a series, for the light and for the dark page: Okabe and Ito's hues (blue, vermilion, green, purple, ochre,
# grey, sky, violet), moved in lightness until each has 3:1 against its page (WCAG 1.4.11; as published, three of them
# have 2.2 to 2.9 on white) and any two differ by 12 in CIELAB also without red or green cones. Markers repeat it.
LIGHT = ("#0a4590", "#a03c00", "#0e9f74", "#d44fae", "#a08a10", "#3c4046", "#2a8fd6", "#4a22a8")
DARK = ("#3f9cf5", "#d9622b", "#4de8ac", "#e89be2", "#e8d84a", "#858a91", "#c3e2f5", "#8a5cf0")


def render(folder: Path, template: str, /, *, script: str = "", **values: Any) -> str:
    """`template` of `folder` as text; it may extend or include what lies in `TEMPLATES`.

    Every value is escaped unless the template says otherwise, and a name the template uses and `values` lacks raises.
    `script` is the page's only script; the frame allows it by its hash. Raises BackendUnavailableError without jinja2.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise BackendUnavailableError(
            'the report needs jinja2, which torch brings along: pip install "cl-kernels[cli]"'
        )
    allowed = script_hash(script) if script else ""
    text: str = _environment(folder).get_template(template).render(script=script, script_hash=allowed, **values)
    return text


@functools.cache
def _environment(folder: Path) -> Any:
    """Where templates are looked for; it keeps them compiled."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def script_hash(script: str) -> str:
    """The source expression by which a content security policy allows exactly this script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
