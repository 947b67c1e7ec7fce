"""Explorers: functions that return a widget to look, touch and teach with in JupyterLab. `explore.massive(acts)`, `explore.errors(acts)`, ..."""

from .errors import errors as errors
from .massive import massive as massive
