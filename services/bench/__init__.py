"""`slipstream bench`: seeded load over HTTP against any OpenAI-compatible server, and what it cost.

options  the flags              prompts  texts of an exact number of tokens
client   one streamed request   load     when requests start: closed loop or Poisson
observe  Redis and memory       report   figures from all of it, as a table or JSON
"""
