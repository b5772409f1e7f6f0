"""One file a verb."""

from ptq.commands.benchmark import benchmark
from ptq.commands.check import check
from ptq.commands.diagnose import diagnose
from ptq.commands.evaluate import evaluate
from ptq.commands.export import export
from ptq.commands.inspect import inspect
from ptq.commands.quantize import quantize
from ptq.commands.recipes import recipes
from ptq.commands.search import search
from ptq.commands.serve import serve
from ptq.commands.tune import tune
from ptq.commands.verify import verify

COMMANDS = (quantize, evaluate, export, inspect, verify, check, diagnose, search, benchmark, tune, serve, recipes)
