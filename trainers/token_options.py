"""What can be chosen about a new token that is trained."""

from pydantic import Field, ValidationInfo, field_validator

from studio.specs.base import Options, complete


class TokenOptions(Options):
    """Options of every method that can train a token."""

    token: str | None = Field(
        None,
        pattern=r"^\S+$",
        description="A new word to learn, such as '<toy>': captions must name it, and prompts do later. "
        "It is written to a file of its own.",
    )
    init_words: str | None = Field(
        None,
        description="Words whose embeddings the token starts from, such as 'toy robot'; default: at random, "
        "as large as the vocabulary's.",
    )
    vectors: int = Field(
        1,
        ge=1,
        le=64,
        description="Embeddings of the token: more say more, and each takes a place in prompts.",
    )

    @field_validator("init_words", "vectors")
    @classmethod
    def _of_a_token(cls, value: str | int | None, info: ValidationInfo) -> str | int | None:
        default = cls.model_fields[str(info.field_name)].default
        if value != default and info.data.get("token", "") is None:
            raise complete("is about a new token. Give token, or leave it out.")
        return value
