"""Where models come from: timm, transformers, exported programs, factories, directories."""

from ptq.sources.load import KINDS as KINDS
from ptq.sources.load import load_model as load_model
from ptq.sources.loaded import LoadedModel as LoadedModel
