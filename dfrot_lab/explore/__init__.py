"""Explorers: functions that return a widget to look, touch and teach with in JupyterLab.
`explore.massive(acts)`, `explore.errors(acts)`, ..."""

from .errors.widget import errors as errors
from .generate.widget import generate as generate
from .invariance.widget import invariance as invariance
from .massive.widget import massive as massive
from .playground.widget import playground as playground
from .refinement.widget import refinement as refinement
from .worth.widget import worth as worth
