"""The model this gateway serves, and its tokenizer."""

from __future__ import annotations

from aiohttp import web

from services.gateway.bodies import BodyReader, json_response
from services.gateway.gateway import Gateway
from services.gateway.schemas import DetokenizeBody, TokenizeBody
from shared.errors import InvalidRequest, ModelNotFound


class ModelRoutes:
    """GET of models, POST of text to ids and back."""

    def __init__(self, gateway: Gateway, bodies: BodyReader) -> None:
        self._gateway = gateway
        self._bodies = bodies

    def table(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/v1/models/{id:.+}", self.model),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    async def models(self, _request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._model_object()]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name != self._gateway.planner.model.name:
            raise ModelNotFound("This model does not exist here; GET /v1/models names the one that does.", "model")
        return json_response(self._model_object())

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await self._bodies.read(request, TokenizeBody)
        text, planner = self._gateway.text, self._gateway.planner
        planner.check_model(body)
        if body.messages is not None:
            planner.check_messages(len(body.messages))
            ids = await text.encode_chat(body, body.messages)
        else:
            ids = await text.encode_prompt(body.prompt or "", body.add_special_tokens is not False)
        strings = await text.token_texts(ids) if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": planner.model.max_model_len, "tokens": list(ids)}
        return json_response({**answer, "token_strs": strings})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await self._bodies.read(request, DetokenizeBody)
        text, planner = self._gateway.text, self._gateway.planner
        planner.check_model(body)
        if len(body.tokens) > planner.model.max_model_len:
            raise InvalidRequest(f"tokens may hold at most {planner.model.max_model_len} ids.", "tokens")
        text.check_vocabulary(body.tokens, "tokens")
        return json_response({"prompt": await text.decode(body.tokens, skip_special=False)})

    def _model_object(self) -> dict[str, object]:
        model = self._gateway.planner.model
        return {
            **{"id": model.name, "object": "model", "created": model.created, "owned_by": "slipstream"},
            **{"root": model.name, "parent": None, "max_model_len": model.max_model_len},
        }
