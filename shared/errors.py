"""Every failure Slipstream reports, and whose fault it is.

    SlipstreamError
    ├── RequestError              the caller's fault; retrying the same request cannot help
    │   ├── InvalidRequest
    │   ├── ContextLengthExceeded
    │   ├── ModelNotFound
    │   ├── InvalidApiKey
    │   └── RequestTooLarge
    ├── CapacityError             nobody's fault: no room now; retry after a while
    │   ├── Overloaded
    │   ├── NoWorkers
    │   └── BusUnavailable
    ├── ConfigurationError        the operator's fault; the process stops and names the setting
    │   └── ModelFormatError      a model folder or file cannot be loaded
    └── InternalError             our fault, or a peer process's
        ├── ProtocolError         bytes from the bus or a peer that do not follow the protocol
        ├── TransferError         a KV hand-off failed; the receiver recomputes
        └── EngineError           one sequence failed inside the engine

Each class has a stable `code`. Only the gateway maps codes to HTTP statuses.
"""


class SlipstreamError(Exception):
    """Base of all; `code` is stable and may be shown to clients."""

    code = "internal_error"


class RequestError(SlipstreamError):
    """The request is wrong; `param` names the field at fault, in the client's own words."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(RequestError):
    code = "invalid_value"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    code = "model_not_found"


class InvalidApiKey(RequestError):
    code = "invalid_api_key"


class RequestTooLarge(RequestError):
    code = "request_too_large"


class CapacityError(SlipstreamError):
    """No room now; `retry_after` is in whole seconds, for the Retry-After header."""

    code = "overloaded"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(CapacityError):
    code = "overloaded"


class NoWorkers(CapacityError):
    code = "no_workers"


class BusUnavailable(CapacityError):
    code = "bus_unavailable"


class ConfigurationError(SlipstreamError):
    """The operator has to change something; the message names the setting and what to do."""

    code = "configuration_error"


class ModelFormatError(ConfigurationError):
    code = "model_format_error"


class InternalError(SlipstreamError):
    code = "internal_error"


class ProtocolError(InternalError):
    code = "protocol_error"


class TransferError(InternalError):
    """A hand-off failed. `reason` is one of the literal reasons in `shared.transfer.base`."""

    code = "transfer_error"

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class EngineError(InternalError):
    code = "engine_error"
