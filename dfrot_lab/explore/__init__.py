"""Explorers: functions that return a widget to look, touch and teach with in JupyterLab.
`explore.massive(acts)`, `explore.errors(acts)`, ...
"""

from .errors.widget import errors as errors
from .generate import generate as generate
from .invariance import invariance as invariance
from .massive.widget import massive as massive
from .playground import playground as playground
from .refinement import refinement as refinement
from .worth.widget import worth as worth
