"""What the application is told: `args` of serve/config.yaml, or the options of `distill serve`."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Frozen):
    """What one request may bring, and how many a replica takes."""

    requests: int = Field(
        default=128, ge=1, description="that one replica holds, the waiting ones too; more get 503 with Retry-After"
    )
    body_bytes: int = Field(default=2**20, ge=1)
    inputs: int = Field(default=256, ge=1)
    characters: int = Field(default=20_000, ge=1, description="of one input")


class Escalate(_Frozen):
    """The teacher that is asked where the student abstains. What users send goes to it."""

    url: str = Field(description="up to /v1, e.g. http://teacher:8000/v1")
    model: str
    prompt: Literal["completion", "chat"] = "chat"
    api_key_env: str = Field(default="DISTILL_TEACHER_API_KEY", description="the variable that holds the key")
    timeout_s: float = Field(default=5.0, gt=0, description="then the student's answer stands")
    requests_per_minute: float = Field(default=60.0, gt=0, description="of one replica; beyond it nothing waits")
    max_tokens: int = Field(default=256, ge=1)


class Traffic(_Frozen):
    """Which version of a model answers; `user_config` of the deployment, so that it changes without a restart."""

    shares: dict[str, dict[str, Share]] = Field(
        default={}, description="model -> version -> its share of requests; by default the last version has all"
    )
    shadow: dict[str, str] = Field(
        default={}, description="model -> version that answers besides; compared and counted, never returned"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name, shares in self.shares.items():
            if abs(sum(shares.values()) - 1) > 1e-6:
                raise ValueError(f"shares of {name} add up to {sum(shares.values()):g}, not 1")
        return self


class Scaling(_Frozen):
    """When replicas come and go, where `replicas` leaves room."""

    look_back_s: float = Field(
        default=30, gt=0, description="over which requests are averaged; replicas tell of them every 10 s"
    )
    ongoing: float = Field(default=64, gt=0, description="requests that each replica should hold, on average")
    up_s: float = Field(default=30, ge=0, description="of more load, before a replica is added")
    down_s: float = Field(default=600, ge=0, description="of less load, before one is taken away")


class Settings(_Frozen):
    """The arguments of `serve.app:build`."""

    bundles: tuple[str, ...] = Field(min_length=1, description="folders of exported bundles, on every node")
    default: str | None = Field(
        default=None, description="the model that answers where none is named; by default the first"
    )
    require_key: bool = Field(default=True, description="whether /v1/ asks for an API key")
    keys_file: str | None = Field(default=None, description="hashes of API keys, see serve/keys.py")
    limits: Limits = Limits()
    access_log: bool = Field(default=True, description="one JSON object a request on stdout, without its inputs")
    traffic: Traffic = Traffic()
    escalate: Escalate | None = None
    batch_tokens: int = Field(default=4096, ge=1, description="tokens that go through the model at once, at most")
    # resources
    replicas: tuple[int, int] = Field(default=(1, 1), description="[min, max]; between them by ongoing requests")
    scaling: Scaling = Scaling()
    cpus: float = Field(default=1, gt=0, description="of one replica, and threads of its model")
    gpus: float = Field(default=0, ge=0)
    node_labels: dict[str, str] = Field(
        default={}, description="only on nodes that bear these labels, e.g. {ray-subcluster: serving}"
    )
    drain_s: float = Field(default=30, gt=0, description="for requests under way, when a replica is stopped")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.replicas
        if not 1 <= low <= high:
            raise ValueError(f"replicas must be [min, max] with 1 <= min <= max, not [{low}, {high}]")
        return self
