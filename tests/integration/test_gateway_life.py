"""The gateway's process life: a real model folder's text side, serving until told to stop."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import aiohttp
import pytest

from services.gateway.app import run_gateway
from services.gateway.model import load_model
from shared.errors import ConfigurationError
from shared.protocol.keys import Keys
from tests.fake_worker import FakeWorker
from tests.gateway_rig import CHAT, MESSAGES, make_settings
from tests.tiny_model import CONTEXT, VOCAB, write_tiny_model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until_live(url: str) -> None:
    async with asyncio.timeout(20), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url + "/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)


async def test_it_serves_a_model_folder_until_told_to_stop(redis_url: str, deployment: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    port = free_port()
    settings = make_settings(redis_url, deployment, model=str(folder), gateway={"port": port})
    url = f"http://127.0.0.1:{port}"
    stop = asyncio.Event()
    async with FakeWorker(redis_url, Keys(deployment), "tiny", lambda _job, _choice: [72, 105, 2]) as worker:
        running = asyncio.create_task(run_gateway(settings, stop))
        await until_live(url)
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + CHAT, json={"messages": MESSAGES}) as response,
        ):
            assert response.status == 200, await response.text()
        stop.set()
        async with asyncio.timeout(10):
            await running
        assert worker.jobs[0].params.stop_ids == (2,)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


def test_the_models_text_side_is_loaded_without_its_weights(redis_url: str, deployment: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    model = load_model(make_settings(redis_url, deployment, model=str(folder)))
    assert (model.name, model.max_model_len, model.vocab_size) == ("tiny", CONTEXT, VOCAB)
    assert model.defaults.temperature == 1.0
    renamed = make_settings(
        redis_url,
        deployment,
        **{"model": str(folder), "served_model_name": "org/name", "engine": {"max_model_len": 99}},
        gateway={"generation_defaults": False},
    )
    model = load_model(renamed)
    assert (model.name, model.max_model_len, model.defaults.temperature) == ("org/name", 99, None)


def test_the_operators_template_replaces_the_models(redis_url: str, deployment: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    for setting in (template, str(tmp_path / "own.jinja")):
        model = load_model(make_settings(redis_url, deployment, model=str(folder), chat_template=setting))
        assert model.codec.template.render(MESSAGES).text == "[Hello]"
    with pytest.raises(ConfigurationError, match="SLIPSTREAM_CHAT_TEMPLATE"):
        load_model(make_settings(redis_url, deployment, model=str(folder), chat_template="/no/such/file"))
