"""The built-in models `demo` and `demo-small`, and what they were made from.

`verses()` is the text, `lexicon("eng", "swh", "test")` the word pairs; the models are
opened by name, `jaxling.models.load("demo")`, as every checkpoint is.
"""

from .lexicons import lexicon as lexicon
from .text import HELD_OUT_BOOKS as HELD_OUT_BOOKS
from .text import LANGUAGES as LANGUAGES
from .text import Verses as Verses
from .text import verses as verses
