"""Training causal language models: token files, recipes, a loop that survives.

    file = write_tokens("data/train", documents, vocabulary_size=13_566)
    recipe = Recipe(steps=5000, batch=8, length=128, rates=(("embedding", 0.1),))
    outcome = train(model, file, recipe, workdir="runs/first",
                    evaluations={"held-out": open_tokens("data/heldout")})
    jaxling.models.save(model, "runs/first/model")

`documents` are lists of token ids, or `Document(tokens, targets)` where only some
tokens count in the loss. `model` is any decoder of `jaxling.models`, trained in place.
The same call again resumes a run that was killed. `parameter_names(model)` are the
names that the patterns of `Recipe.rates` are searched in; a factor of 0 freezes.
"""

from .loop import Diverged as Diverged
from .loop import Evaluation as Evaluation
from .loop import Outcome as Outcome
from .loop import evaluate as evaluate
from .loop import loss_curve as loss_curve
from .loop import train as train
from .packing import Document as Document
from .packing import TokenFile as TokenFile
from .packing import joined as joined
from .packing import open_tokens as open_tokens
from .packing import verify_tokens as verify_tokens
from .packing import write_tokens as write_tokens
from .recipe import OLMO as OLMO
from .recipe import Recipe as Recipe
from .recipe import check_recipe as check_recipe
from .recipe import learning_rate as learning_rate
from .steps import parameter_names as parameter_names
from .text import lines_of as lines_of
from .text import tokenize as tokenize
