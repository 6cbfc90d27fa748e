"""What the server is asked and what it answers: one pydantic model for each, unknown fields refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StrictBool, StrictInt, StrictStr, StringConstraints

INPUTS = 2048  # texts of one request
CHARACTERS = 200_000  # of one text: far beyond what any model reads, and far below the limit of a body
TOKENS = 65_536  # ids of one text
Text = Annotated[StrictStr, StringConstraints(min_length=1, max_length=CHARACTERS)]
Id = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=TOKENS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=INPUTS)]
Role = Literal["query", "document", "text"]


def _stripped(query: str) -> str:
    """Without the white space around it, which is measured before: the schema speaks of what is sent."""
    if not (query := query.strip()):
        raise ValueError("there is nothing but white space")
    return query


Query = Annotated[StrictStr, StringConstraints(min_length=1, max_length=10_000), AfterValidator(_stripped)]


class EmbeddingsRequest(BaseModel, extra="forbid"):
    """OpenAI's `POST /v1/embeddings`; `role` is ours and picks the model's prompt for queries or documents."""

    input: Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=INPUTS)]
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: StrictStr | None = None
    role: Role = "text"


class EmbedRequest(BaseModel, extra="forbid"):
    """text-embeddings-inference's `POST /embed`; vectors are normalised unless `normalize` is false."""

    inputs: Text | Texts
    normalize: StrictBool | None = None
    truncate: StrictBool | None = None
    truncation_direction: Literal["right", "Right"] | None = None
    prompt_name: StrictStr | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class SearchRequest(BaseModel, extra="forbid"):
    """`POST /search`: by meaning (dense), by words (lexical, BM25), or both; `where` chooses by columns."""

    query: Query
    top: Annotated[StrictInt, Field(ge=1, le=100)] = 10
    mode: Literal["dense", "exact", "lexical", "hybrid"] = "dense"
    where: Annotated[dict[StrictStr, StrictStr], Field(max_length=16)] = Field(default_factory=dict)


class Feedback(BaseModel, extra="forbid"):
    """`POST /feedback`: whether a text fits a query."""

    query: Query
    id: Annotated[StrictStr, StringConstraints(min_length=1, max_length=1000)]
    verdict: Literal["up", "down"]
    model: Annotated[StrictStr, StringConstraints(max_length=1000)] | None = None


class Found(BaseModel):
    """A text that was found; `passage` is the part (first, last character) that is nearest to the query.

    Beside a second index: how many places it stands higher than there, or `new` where it is not in sight there.
    """

    id: str
    score: float
    text: str
    columns: dict[str, Any]
    passage: tuple[int, int]
    moved: int | None = None
    new: bool = False


class Results(BaseModel):
    """What one index found."""

    model: str
    hits: list[Found]


class SearchAnswer(BaseModel):
    """The answer to `POST /search`: the index, then the one beside it, where there is one."""

    results: list[Results]
    seconds: float


class About(BaseModel):
    """What is searched."""

    texts: int
    models: list[str]
    lexical: bool
    filters: dict[str, list[str]]


class Dot(BaseModel):
    """A text on the map, its place from 0 to 1."""

    id: str
    x: float
    y: float
    text: str
    columns: dict[str, Any]


class Atlas(BaseModel):
    """The map: at most 4,000 texts, and the share of the variance that it shows."""

    points: list[Dot]
    total: int
    explained: float
    columns: list[str]


class Kept(BaseModel):
    """An answer to a result was written down."""

    kept: Literal[True] = True


class Embedding(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the model read, special ones included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer to `POST /v1/embeddings`; `truncated` texts were longer than the model reads."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: int = 0


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "embedtune"


class Models(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Info(BaseModel):
    """The answer to `GET /info`, with the names of text-embeddings-inference."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    version: str


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The form of every error, on every path: OpenAI's."""

    error: Fault


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return ErrorBody(error=Fault(message=message, type=kind, param=param, code=code)).model_dump()
