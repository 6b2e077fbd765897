"""From a validated body to jobs for the bus: tokenise, bound, resolve what was left open."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.gateway.auth import tenant_of
from services.gateway.health import ClusterView
from services.gateway.params import FIRST, SamplingDefaults, resolve_params, worker_priority
from services.gateway.presentation import Presentation
from services.gateway.schemas import Body, ChatBody, CompletionBody
from services.gateway.text import TextService
from shared.errors import InvalidRequest, ModelNotFound
from shared.protocol.keys import Keys
from shared.protocol.messages import Job


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of this gateway as clients see it."""

    name: str
    max_model_len: int
    defaults: SamplingDefaults
    created: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A request ready to be submitted, or one that was: an answer's jobs and how they are shown."""

    response_id: str
    created: int
    shown: Presentation
    jobs: tuple[Job, ...]

    @property
    def cost(self) -> int:
        """Tokens to compute at most."""
        return sum(len(job.prompt_ids) + job.params.max_tokens * job.params.n for job in self.jobs)


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """Bounds of one request that are this gateway's own."""

    max_prompts: int
    max_messages: int
    budget_ms: int


class Planner:
    """Turns bodies into plans; holds no state of a request."""

    def __init__(
        self,
        model: ServedModel,
        text: TextService,
        cluster: ClusterView,
        keys: Keys,
        gateway_id: str,
        limits: PlanLimits,
    ) -> None:
        self.model = model
        self._text = text
        self._cluster = cluster
        self._keys = keys
        self._gateway_id = gateway_id
        self._limits = limits

    def check_model(self, body: Body) -> None:
        """Raises ModelNotFound unless the body names this model or none."""
        if body.model is not None and body.model != self.model.name:
            raise ModelNotFound(f"This model does not exist here; the server has {self.model.name!r}.", "model")

    async def plan(self, body: ChatBody | CompletionBody, key_id: str) -> Plan:
        """Raises RequestError, and CapacityError when no worker could take the request."""
        self.check_model(body)
        if isinstance(body, ChatBody):
            self.check_messages(len(body.messages))
            prompts = [await self._text.encode_chat(body, body.messages)]
        else:
            prompts = await self._encode_prompts(body)
        self._cluster.require_ready()
        jobs = tuple(self._job(body, ids, key_id) for ids in prompts)
        prefix = "chatcmpl-" if isinstance(body, ChatBody) else "cmpl-"
        texts = await self._echo_texts(body, prompts) if isinstance(body, CompletionBody) and body.echo else ()
        return Plan(prefix + uuid.uuid4().hex, int(time.time()), Presentation.of(body, texts), jobs)

    def check_messages(self, count: int) -> None:
        """Raises InvalidRequest beyond the bound on messages."""
        if count > self._limits.max_messages:
            raise InvalidRequest(f"messages may hold at most {self._limits.max_messages} items.", "messages")

    def put_first(self, plan: Plan) -> Plan:
        """The plan of a newcomer: workers take its jobs before others and rank them before others.

        Where the client asked for a place behind others, it stays there.
        """
        return replace(plan, jobs=tuple(job if job.priority > 0 else self._first(job) for job in plan.jobs))

    def _first(self, job: Job) -> Job:
        prefill, decode = (self._keys.express_work(role, job.model) for role in ("prefill", "decode"))
        return replace(job, prefill_stream=prefill, decode_stream=decode, priority=min(job.priority, FIRST))

    async def _encode_prompts(self, body: CompletionBody) -> list[tuple[int, ...]]:
        if len(body.prompt) > self._limits.max_prompts:
            message = f"prompt may hold at most {self._limits.max_prompts} prompts, it has {len(body.prompt)}."
            raise InvalidRequest(message, "prompt")
        return [await self._text.encode_prompt(prompt, body.add_special_tokens) for prompt in body.prompt]

    async def _echo_texts(self, body: CompletionBody, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """What `echo` puts before each answer: the prompt as given, ids as their text."""
        texts = []
        for given, ids in zip(body.prompt, prompts, strict=True):
            texts.append(given if isinstance(given, str) else await self._text.decode(ids, skip_special=True))
        return tuple(texts)

    def _job(self, body: ChatBody | CompletionBody, ids: tuple[int, ...], key_id: str) -> Job:
        if not ids:
            raise InvalidRequest("prompt must not be empty.", "messages" if isinstance(body, ChatBody) else "prompt")
        vocab_size = self._text.vocab_size
        limits = self._cluster.limits(self.model.max_model_len, vocab_size)
        params = resolve_params(body, len(ids), limits, self.model.defaults, self._text.codec.eos_ids)
        return Job(
            request_id=uuid.uuid4().hex,
            model=self.model.name,
            prompt_ids=ids,
            params=params,
            gateway=self._gateway_id,
            prefill_stream=self._keys.work("prefill", self.model.name),
            decode_stream=self._keys.work("decode", self.model.name),
            tenant=tenant_of(key_id, body.cache_salt),
            priority=worker_priority(body.priority, key_id),
            budget_ms=self._limits.budget_ms,
        )
