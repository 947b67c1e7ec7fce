"""Explorers: widgets to look, touch and teach with in JupyterLab, such as `explore.massive(acts)`."""

from .dial.widget import Dial as dial
from .errors.widget import Errors as errors
from .generate.widget import Generate as generate
from .invariance.widget import Invariance as invariance
from .massive.widget import Massive as massive
from .playground.widget import Playground as playground
from .refinement import Refinement as refinement
from .take import together as together
from .worth.widget import Worth as worth
