"""The word-translation task: does the source word make its translation likelier?

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: items are word pairs with nine distractors, prompts hold five examples, and

    P(y | w) = exp(mean log-probability of the tokens of y after the prompt for w)
    Score(w) = P(y | w) - mean over the distractors w' of P(y | w')

Beyond the paper: the rank of w among its distractors, and how often it is first.
`task` holds the questions, `scores` what a model makes of them.
"""

from .scores import Interval as Interval
from .scores import PairSummary as PairSummary
from .scores import Question as Question
from .scores import Scores as Scores
from .scores import encode as encode
from .scores import matrix as matrix
from .scores import score_task as score_task
from .scores import summarize as summarize
from .task import DISTRACTORS as DISTRACTORS
from .task import Item as Item
from .task import Task as Task
from .task import build_task as build_task
from .task import draw_examples as draw_examples
from .task import keep_words as keep_words
from .task import load_task as load_task
from .task import prompt as prompt
from .task import read_lexicons as read_lexicons
from .task import save_task as save_task
from .task import tokens_of as tokens_of
from .task import word_vectors as word_vectors
from .task import words_of as words_of
