"""A small OpenAI-like server around OpenVINO GenAI's continuous batching, which has none in its Python package.

    python benchmarks/openvino_server.py MODEL_FOLDER --port 8002

For `benchmarks.peers` only, run by an environment with `openvino-genai`, `tokenizers` and `aiohttp`; nothing of ours is
imported. One thread steps the pipeline; a token goes out as soon as the pipeline has it. Prompts are token ids or text,
decoding is greedy and does not end before `max_tokens`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from aiohttp import web
from tokenizers import Tokenizer

CACHE_GIB = 1
IDLE_S = 0.0005
YIELD_S = 0.0001
"""A step keeps the interpreter to itself; between two of them the server sends what came."""


class Pipeline:
    """The batching pipeline on a thread of its own; each request has a queue of new ids, None at its end."""

    def __init__(self, folder: str, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = CACHE_GIB, 64, 2048
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._new: list[tuple[Any, asyncio.Queue[list[int] | None]]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, prompt: list[int], max_tokens: int) -> asyncio.Queue[list[int] | None]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
        config.apply_chat_template = False
        queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        tensor = ov.Tensor(np.array([prompt], dtype=np.int64))
        with self._lock:
            self._new.append((self._pipeline.add_request(next(self._ids), tensor, config), queue))
        return queue

    def _run(self) -> None:
        running: list[tuple[Any, asyncio.Queue[list[int] | None]]] = []
        while True:
            with self._lock:
                running += self._new
                self._new = []
            if not self._pipeline.has_non_finished_requests():
                time.sleep(IDLE_S)
            else:
                self._pipeline.step()
            running = [pair for pair in running if not self._deliver(*pair)]
            time.sleep(YIELD_S)

    def _deliver(self, handle: Any, queue: asyncio.Queue[list[int] | None]) -> bool:
        """Hand over what is new; True once the request has ended."""
        while handle.can_read():
            for output in handle.read().values():
                self._loop.call_soon_threadsafe(queue.put_nowait, list(output.generated_ids))
        has_ended: bool = handle.get_status() != genai.GenerationStatus.RUNNING
        if has_ended:
            self._loop.call_soon_threadsafe(queue.put_nowait, None)
        return has_ended


class Server:
    def __init__(self, folder: str, threads: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._pipeline = Pipeline(folder, threads)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "openvino", "object": "model"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": self._tokenizer.encode(text, add_special_tokens=False).ids})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["prompt"]
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else prompt
        queue, count = self._pipeline.add(ids, body["max_tokens"]), 0
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while (new := await queue.get()) is not None:
            count += len(new)
            await _send(response, {"choices": [{"index": 0, "text": self._tokenizer.decode(new) or " "}]})
        usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
        await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def make_app(folder: str, threads: int) -> web.Application:
    server, app = Server(folder, threads), web.Application()
    app.router.add_get("/health", server.health)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/tokenize", server.tokenize)
    app.router.add_post("/v1/completions", server.completions)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    web.run_app(make_app(options.folder, options.threads), host="127.0.0.1", port=options.port, print=None)
