"""The teacher of on-policy distillation: a frozen model whose log-probs are credit for each token."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeAlias

from pydantic import Discriminator, Field, Tag

from groupwise.config.base import Variant, switched


class TeacherSettings(Variant):
    chosen_by: ClassVar[str] = "path"


class NoTeacher(TeacherSettings):
    choice: ClassVar[str] = "none"
    path: None = Field(
        default=None, description="a frozen model with the policy's vocabulary: folder, run, RUN@STEP or Hub name"
    )


class Teacher(TeacherSettings):
    choice: ClassVar[str] = "a model"
    path: str = Field(min_length=1)
    coef: float = Field(
        default=1.0, gt=0, description="weight of log(teacher / policy) in a token's advantage, in nats"
    )
    clamp: float | None = Field(
        default=None, gt=0, description="nats; log(teacher / policy) is cut at plus and minus this"
    )


TeacherPart: TypeAlias = Annotated[
    Annotated[NoTeacher, Tag(NoTeacher.choice)] | Annotated[Teacher, Tag(Teacher.choice)],
    Discriminator(switched(NoTeacher, Teacher)),
]
