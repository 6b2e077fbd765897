"""`slipstream bench`: seeded load over HTTP against any OpenAI-compatible server, and what it cost.

options  what to run            prompts  texts of an exact number of tokens
client   one streamed request   load     when requests start: closed loop or Poisson
observe  Redis and memory       report   figures from all of it, as a table or JSON
"""

from services.bench.load import run_bench
from services.bench.options import BenchOptions
from services.bench.report import BenchReport, render

__all__ = ["BenchOptions", "BenchReport", "render", "run_bench"]
