"""What clients may send: every field with its range; anything else is a 400."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from headrace.files import MAX_NAME, NAME_CHARACTER

MAX_SEQUENCES = 128  # n * number of prompts in one HTTP request
INT64_MAX = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# fail_fast: one wrong item is enough; an error for each of a million takes seconds and gigabytes.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Strict(BaseModel):
    """Refuse unknown fields, and numbers in quotes, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """include_usage adds a last chunk with the token counts and no choices."""

    include_usage: bool = False


class SamplingFields(Strict):
    """Fields that completions and chat share. None: the model's default, or off."""

    model: str
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="-1 or 0: off")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[TokenIdText, Bias] | None = Field(None, max_length=1024)
    allowed_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=2**18)
    seed: int | None = Field(
        None, ge=-INT64_MAX, le=INT64_MAX, description="choice i of n draws with seed + i"
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=64)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="keep only the last tokens of the prompt"
    )
    user: str | None = Field(None, description="accepted for OpenAI's clients, otherwise ignored")

    @model_validator(mode="before")
    @classmethod
    def null_is_absent(cls, body: Any) -> Any:
        """Drop fields that are null: OpenAI's API takes them so, and its clients dump them."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @model_validator(mode="after")
    def stream_options_need_stream(self) -> SamplingFields:
        """Refuse options of a stream that isn't asked for."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES)]
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="default 16")
    echo: bool = Field(False, description="return the prompt, with logprobs its own too")
    logprobs: int | None = Field(None, ge=0, le=20)


class TextPart(Strict):
    """The one kind of content part that a text model reads."""

    type: Literal["text"]
    text: str


def form_of_content(content: Any) -> str:
    """Tell text from parts, so that an error is about the form that was sent."""
    return "[parts]" if isinstance(content, list) else "str"


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("[parts]")],
    Discriminator(form_of_content),
]


class InstructionMessage(Strict):
    """A system or developer message."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    """What the user said."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(Strict):
    """Arguments are JSON text, as the model wrote it."""

    name: FunctionName
    arguments: str


class ToolCall(Strict):
    """A call that the assistant made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class AssistantMessage(Strict):
    """An earlier answer; the null-only fields are what OpenAI's client dumps beside it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="vLLM's newer name of reasoning_content")
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionSpec(Strict):
    """strict=true would need constrained decoding, and is refused until there is some."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of the arguments")
    strict: Literal[False] | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    """The name of one of the functions in `tools`."""

    name: FunctionName


class NamedToolChoice(Strict):
    """Make the model call this function."""

    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(Strict):
    """Only text; JSON formats need constrained decoding."""

    type: Literal["text"]


class PromptFields(Strict):
    """The fields that the chat template reads."""

    messages: list[Message] = Field(min_length=1, max_length=2**14)
    tools: list[Tool] | None = Field(None, max_length=128)
    reasoning_effort: Literal["low", "medium", "high"] | None = None


class ChatRequest(SamplingFields, PromptFields):
    """POST /v1/chat/completions."""

    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="default: what fits")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    include_reasoning: bool = Field(True, description="false: leave out reasoning_content")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def top_logprobs_need_logprobs(self) -> ChatRequest:
        """Refuse alternatives without logprobs, as OpenAI does."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation as chat would render it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=2**14)
    tools: list[Tool] | None = Field(None, max_length=128)
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def one_of_prompt_and_messages(self) -> TokenizeRequest:
        """Exactly one of the two says what to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


AdapterName = Annotated[
    str, Field(pattern=f"^{NAME_CHARACTER}*$", min_length=1, max_length=MAX_NAME)
]


class LoadAdapterRequest(Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: AdapterName
    lora_path: str = Field(min_length=1, description="a PEFT directory on the server")
    load_inplace: bool = Field(False, description="replace the adapter that has this name")


class UnloadAdapterRequest(Strict):
    """POST /v1/unload_lora_adapter."""

    lora_name: AdapterName
    lora_int_id: int | None = Field(None, description="accepted for vLLM's clients, else ignored")
