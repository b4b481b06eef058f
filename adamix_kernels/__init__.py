from .functional import *
