"""Pages to look at: one file that runs no script and loads nothing."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_nnunet.figures import FAST, for_page

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent
SIDES = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
PLANES = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}


def page_text(template: str, **content: Any) -> str:
    """A page as text.

    Args:
        template: File name of its template in the package.
        content: What the template names. All of it is escaped, since names of datasets, cases and files come from outside.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, form=".4f": (
        "–" if value is None or np.isnan(value) else format(value, form)
    )
    environment.filters["probability"] = _probability
    return environment.get_template(template).render(**content, image=image_address, sides=SIDES)


def figure_in_page(svg: str, name: str, title: str, description: str) -> Markup:
    """An SVG of ``figures.write_figure`` as a part of a page that is not escaped again.

    Args:
        svg: Which.
        name: Tells its identifiers from those of other figures of the page.
        title: What it is.
        description: What it shows.
    """
    from markupsafe import Markup

    # made by matplotlib and ElementTree, which escape what they are given
    return Markup(for_page(svg, name, title, description))


def image_address(pixels: np.ndarray) -> str:
    """Pixels, (H, W) or (H, W, 3) of uint8, as an address that holds the image itself."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **FAST)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _probability(value: float | None) -> str:
    """With three decimals; what is not certain is not rounded to certain: draws are few."""
    if value is None or np.isnan(value):
        return "–"
    return "<0.001" if value < 0.001 else ">0.999" if value > 0.999 else f"{value:.3f}"
