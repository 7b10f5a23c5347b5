"""A data file before anything is trained on it: what it holds, what is wrong with it, and its rows in canonical form.

``inspect`` looks at every row and never stops at the first that is bad; ``page.show``, ``html.write_html`` and
``summary.as_dict`` say what was found; ``convert`` writes the rows down anew.
"""

from .converting import Converted, convert
from .looking import Inspection, inspect
from .rows import Options

__all__ = ["Converted", "Inspection", "Options", "convert", "inspect"]
